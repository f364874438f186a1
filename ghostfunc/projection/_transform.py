"""`Project`, the quantity, and `ghost_project`, the transform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ghostfunc._base import batches
from ghostfunc._base.compilable import compilable, node
from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import check_contract_dtype, check_vectorize, one_of
from ghostfunc._base.processes.pieces import of_all_ranks
from ghostfunc._base.trees import ParamSpec
from ghostfunc._base.types import Check, ContractDtype, ModelFn, PyTree, Randomness
from ghostfunc._quantities.quantity import Quantity
from ghostfunc._transforms.grads import per_sample_grads
from ghostfunc._transforms.vjp import ghost_vjp
from ghostfunc.projection._projection import Projection


@node("projection")
class Project(Quantity):
    """The projected gradient: `[n, block.k]` per parameter, None where there is no block.

    `projection.join(values)` makes `[n, k]` of what `ghost_vjp` returns.
    """

    degree = 1
    takes_contract_dtype = True

    def __init__(self, projection: Projection) -> None:
        if not isinstance(projection, Projection):
            raise OptionError(
                f"Project takes a projection such as gf.kronecker_projection(...) makes, not a "
                f"{type(projection).__name__}."
            )
        self.projection = projection

    def readers(self, leaves: Sequence[Tensor], spec: ParamSpec) -> list[Any]:
        readers = self.projection.readers(dict(zip(spec.names, leaves, strict=True)))
        return [
            None if reader is None else reader._replace(contract_dtype=self.contract_dtype)
            for reader in readers
        ]


@compilable()
@of_all_ranks("gf.ghost_project")
def ghost_project(
    model_fn: ModelFn,
    params: PyTree,
    batch: PyTree,
    projection: Projection,
    *,
    mode: str = "ghost",
    vectorize: bool | None = None,
    contract_dtype: ContractDtype = None,
    chunk_size: int | None = None,
    check: Check = "new",
    randomness: Randomness = "error",
) -> Float[Tensor, "n k"]:
    """Every sample's gradient, projected to k numbers; no per-sample gradient is formed.

        out_i = projection(g_i),    g_i = d losses[i] / d params

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses [n]`.
        params: pytree of floating-point tensors.
        batch: pytree of tensors `[n, ...]`.
        projection: made by `kronecker_projection`.
        mode: "ghost" (from factors, in one backward pass without weight gradients) or
            "materialized" (`projection.apply(per_sample_grads(...))`, the definition).
        vectorize: for `mode="materialized"`: True for vmap, False for a loop over samples, None for
            the loop where vmap cannot run the model.
        contract_dtype: torch.bfloat16 or torch.float16 rounds the operands of matrix products,
            projection matrices among them, to it, as in `ghost_dot_prod`.
        chunk_size: the most samples to run at one time; by default all of them.
        check: when numbers are held against plain autograd: "new", where the way through the
            program or the shapes are new, in two more passes; "always", there and with one sample
            drawn at random in every call; or "never".
        randomness: "error" refuses a model that draws random numbers; "different" allows it.

    Returns:
        `[n, k]`, float32 or wider, columns as in `projection.blocks`. Scale: `g_i` is the gradient
        of sample i's own loss, not divided by n; the row of a sample does not depend on the batch
        it comes in.

    Raises:
        GhostError: one of its children: what was given and what to do.

    Reference:
        Choe et al., "What is Your Data Worth to GPT?" (LoGra), 2024.
    """
    one_of("mode", mode, ("ghost", "materialized"))
    check_contract_dtype(contract_dtype, mode)
    check_vectorize(vectorize)
    quantity = Project(projection)
    if mode == "ghost":
        return projection.join(
            ghost_vjp(
                model_fn,
                params,
                batch,
                quantity,
                contract_dtype=contract_dtype,
                chunk_size=chunk_size,
                check=check,
                randomness=randomness,
            ).values
        )

    def of_chunk(chunk: PyTree) -> list[Tensor]:
        grads = per_sample_grads(
            model_fn, params, chunk, vectorize=vectorize, randomness=randomness
        )
        return [projection.apply(grads)]

    return batches.joined(batches.each(of_chunk, batch, chunk_size))[0]
