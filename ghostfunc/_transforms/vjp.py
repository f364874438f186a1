"""`ghost_vjp`: the transform everything else is written in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ghostfunc._base import batches
from ghostfunc._base.compilable import compilable
from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import CHECKS, check_contract_dtype, check_flags, one_of
from ghostfunc._base.processes.pieces import chunks_of_all, of_all_ranks
from ghostfunc._base.program import Program
from ghostfunc._base.reprs import brief
from ghostfunc._base.types import Check, ContractDtype, ModelFn, PyTree, Randomness
from ghostfunc._quantities.quantity import Quantity
from ghostfunc._taps.run import RunResult, run


class GhostVjp(NamedTuple):
    """What `ghost_vjp` returns.

    Attributes:
        losses: per-sample losses, `[n]`.
        values: like `quantities`, each a pytree like `params` of what was read per parameter.
        grads: gradient of the summed losses, a pytree like `params`; None unless asked for.
    """

    losses: Tensor
    values: Any
    grads: PyTree | None

    def __repr__(self) -> str:
        return brief("GhostVjp", **self._asdict())


@compilable(GhostVjp)
@of_all_ranks("gf.ghost_vjp")
def ghost_vjp(
    model_fn: ModelFn,
    params: PyTree,
    batch: PyTree,
    quantities: Quantity | dict[str, Quantity],
    *,
    grads: bool | Literal["autograd"] = False,
    contract_dtype: ContractDtype = None,
    chunk_size: int | None = None,
    check: Check = "new",
    randomness: Randomness = "error",
) -> GhostVjp:
    """Quantities of per-sample gradients `g_i = d losses[i] / d params`, in one backward pass.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses [n]`.
        params: pytree of floating-point tensors.
        batch: pytree of tensors `[n, ...]`.
        quantities: one quantity (`gf.Dot(u)`, `gf.SampleGrad()`, ...) or a dict of them: all are
            read in the same backward pass.
        grads: also return the gradient of `sum_i losses[i]`. True adds it up from what the values
            are made of, in float32 or wider. "autograd" leaves it to plain autograd, bit for bit:
            in half precision and under `torch.autocast` it is rounded as `loss.backward()` rounds
            it, and the values' products come on top of it. Inside transforms and compiled programs
            that is the same as True.
        contract_dtype: torch.bfloat16 or torch.float16, to round the operands of the matrix
            products that make the values to it, as in `ghost_dot_prod`. Not for `SampleGrad`.
        chunk_size: the most samples to run at one time, where all of them do not fit into memory.
            Not for quantities that pair the samples of a batch (`Gram`).
        check: when numbers are held against plain autograd: "new", where the way through the
            program or the shapes are new, in two more passes; "always", there and with one sample
            drawn at random in every call; or "never".
        randomness: "error" refuses a model that draws random numbers; "different" lets every sample
            have its own draws.

    Returns:
        `GhostVjp(losses, values, grads)`. `values` is like `quantities`: a pytree like `params` for
        each. A quantity that is a dot product has `[n]` per parameter; sum them for the whole
        model.

    Raises:
        GhostError: one of its children, which names what was given and what to do.
    """
    one_of("randomness", randomness, ("error", "different"))
    one_of("check", check, CHECKS)
    check_contract_dtype(contract_dtype)
    if grads != "autograd":
        check_flags(grads=grads)
    named = quantities if isinstance(quantities, dict) else {"": quantities}
    for name, quantity in named.items():
        if not isinstance(quantity, Quantity):
            raise OptionError(
                f"quantities[{name!r}] is a {type(quantity).__name__}; expected a quantity such as "
                "gf.Dot(direction)."
            )
        if chunk_size is not None and quantity.pairs_samples:
            raise OptionError(
                f"{type(quantity).__name__} pairs the samples of a batch, so it cannot be taken in "
                "chunks. gf.ghost_gram has a chunk_size of its own."
            )
    rounded = [quantity.contracting(contract_dtype) for quantity in named.values()]
    program = Program.of(model_fn, params, randomness)

    everything, unflatten = range(len(program.leaves)), program.spec.unflatten

    def taken(chunk: PyTree) -> RunResult:
        return run(
            program,
            chunk,
            rounded,
            grads=everything if grads else (),
            check=check,
            by_autograd=grads == "autograd",
        )

    losses, found, sums = [], [], batches.Sums()
    least = chunks_of_all(model_fn, batch, chunk_size)
    for part in batches.each(taken, batch, chunk_size, least=least):
        losses.append(part.losses)
        found.append(part.values)
        if grads:
            sums.add(part.grads)
        del part
    values = {
        name: unflatten([_joined(x) for x in zip(*parts, strict=True)])
        for name, parts in zip(named, zip(*found, strict=True), strict=True)
    }
    return GhostVjp(
        losses[0] if len(losses) == 1 else torch.cat(losses),
        values if isinstance(quantities, dict) else values[""],
        unflatten(sums.result()) if grads else None,
    )


def _joined(parts: Sequence[Any]) -> Any:
    """One parameter's values, chunk after chunk; None where nothing is read."""
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(list(parts))
