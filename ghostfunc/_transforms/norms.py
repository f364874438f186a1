"""Norms, cosines and Gram matrices of per-sample gradients."""

from __future__ import annotations

from torch import Tensor

from ghostfunc._base import batches
from ghostfunc._base.compilable import compilable
from ghostfunc._base.errors import OptionError
from ghostfunc._base.losses import FiniteLosses
from ghostfunc._base.options import (
    CHECKS,
    check_contract_dtype,
    check_flags,
    check_vectorize,
    one_of,
)
from ghostfunc._base.processes.pieces import chunks_of_all, of_all_ranks, refuse_pieces
from ghostfunc._base.program import Program
from ghostfunc._base.types import Check, ContractDtype, Mode, ModelFn, PyTree, Randomness
from ghostfunc._factors import extreme_norms
from ghostfunc._quantities.quantity import SqNorm
from ghostfunc._taps.run import run
from ghostfunc._transforms.factored import collect
from ghostfunc._transforms.scores.lengths import sample_norms

_MODES = ("ghost", "materialized")


@compilable()
@of_all_ranks("gf.ghost_norm")
def ghost_norm(
    model_fn: ModelFn,
    params: PyTree,
    batch: PyTree,
    *,
    per_param: bool = False,
    mode: Mode = "ghost",
    vectorize: bool | None = None,
    contract_dtype: ContractDtype = None,
    chunk_size: int | None = None,
    check: Check = "new",
    randomness: Randomness = "error",
    check_finite: bool = True,
) -> PyTree:
    """Norms of per-sample gradients.

        ||g_i|| = sqrt(sum_p ||g_i^p||^2),   g_i = d losses[i] / d params

    A linear layer's share is `sum_ts <b_it, b_is> <a_it, a_is>`: two Gram matrices of T positions
    instead of a gradient, or blocks of the gradient where those are cheaper. Parameters that
    samples meet at several places (tied, called twice) count all cross terms between the places:
    their inputs and cotangents are kept until the backward pass is over.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses [n]`.
        params: pytree of floating-point tensors.
        batch: pytree of tensors `[n, ...]`.
        per_param: return the norm of every parameter's gradient; their squares add up.
        mode: "ghost" or "materialized" (`vmap(grad)`, as large as n models).
        vectorize: for "materialized": True for vmap, False for a loop over samples, None for the
            loop where vmap cannot run the model.
        contract_dtype: torch.bfloat16 or torch.float16 rounds the operands of matrix products to
            it, as in `ghost_dot_prod`. Squares are sums of T x T terms that may cancel, so a norm
            can lose more digits than each term does.
        chunk_size: the most samples to run at one time; by default all of them.
        check: when numbers are held against plain autograd: "new", where the way through the
            program or the shapes are new, in two more passes; "always", there and with one sample
            drawn at random in every call; or "never".
        randomness: "error" or "different".
        check_finite: whether to look for losses that are NaN or infinite, and for squares that
            over- or underflow: one wait for the device, when all is queued. Without it nothing
            waits, and norms of such squares are NaN. Ghost mode only.

    Returns:
        `[n]`, float32 or wider; for `per_param` a pytree like `params` of those. NaN or infinite
        where the gradient has such an entry. Samples whose square over- or underflows are run once
        more, at another scale. Norms below 1e-22 in float32 read as zero where that is not done:
        with `randomness="different"`, with `check_finite=False`, and when compiled.

    Raises:
        GhostError: one of its children, as for `ghost_vjp`.

    Reference:
        Goodfellow, "Efficient Per-Example Gradient Computations", 2015; Li et al., "Large Language
        Models Can Be Strong Differentially Private Learners", ICLR 2022 (ghost norms).
    """
    one_of("mode", mode, _MODES)
    one_of("randomness", randomness, ("error", "different"))
    one_of("check", check, CHECKS)
    check_contract_dtype(contract_dtype, mode)
    check_flags(per_param=per_param, check_finite=check_finite)
    check_vectorize(vectorize)
    if not check_finite and mode != "ghost":
        raise OptionError(f'check_finite=False needs mode="ghost"; got mode={mode!r}.')
    if mode != "ghost":
        refuse_pieces(model_fn, f"mode={mode!r}")
    program = Program.of(model_fn, params, randomness)
    squares = SqNorm().contracting(contract_dtype)

    def of_chunk(chunk: PyTree) -> list[Tensor]:
        if mode == "ghost":
            finite = FiniteLosses(check_finite)
            result = run(program, chunk, [squares], check=check, finite=finite)
            return [sample_norms(program, chunk, result.values[0], result.losses, finite)]
        book = collect(program, chunk, mode=mode, vectorize=vectorize, check=check)
        return [book.param_norms()]

    least = chunks_of_all(model_fn, batch, chunk_size)
    (rows,) = batches.joined(batches.each(of_chunk, batch, chunk_size, least=least), axis=1)
    return program.spec.unflatten(list(rows)) if per_param else extreme_norms.joint(rows)
