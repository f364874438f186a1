"""Gradients themselves: of a validation batch, and of every sample."""

from __future__ import annotations

from functools import partial
from typing import Any

from ghostfunc._base import definition
from ghostfunc._base.compilable import compilable
from ghostfunc._base.options import CHECKS, check_vectorize, one_of
from ghostfunc._base.processes.pieces import of_all_ranks, refuse_pieces
from ghostfunc._base.program import Program
from ghostfunc._base.purity import prove_independent
from ghostfunc._base.trees import batch_size
from ghostfunc._base.types import Check, Mode, ModelFn, PyTree, Randomness, Reduction
from ghostfunc._quantities.quantity import SampleGrad
from ghostfunc._taps.run import run
from ghostfunc._transforms.scores.validation import dense_direction
from ghostfunc._transforms.sums_over_ranks import sums_of_all


@compilable()
@of_all_ranks("gf.direction")
def direction(
    model_fn: ModelFn,
    params: PyTree,
    val: PyTree,
    *,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    randomness: Randomness = "error",
    group: Any = None,
) -> PyTree:
    """The validation gradient `u`, to dot with as often as wanted.

        u = mean_j d losses[j] / d params        (reduction="sum": the sum)

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses`.
        params: pytree of floating-point tensors.
        val: pytree of tensors `[m, ...]`.
        reduction: "mean" or "sum" over the m validation samples.
        chunk_size: the most samples to run at one time; by default all of them.
        randomness: "error" or "different".
        group: a process group of `torch.distributed`: the mean or sum over all ranks' samples, the
            same on every rank; `val` is one batch then.

    Returns:
        A pytree like `params`.

    Raises:
        RankError: with a `group`, another rank failed, is gone, or was given something else.
        OptionError: another reduction. `reduction="none"` would be m models large: use
            `ghost_dot_prod(..., reduction="none")`, which never forms it.
    """
    if group is not None:
        own = partial(direction, model_fn, params, val, reduction=reduction)
        return sums_of_all(
            group,
            "direction",
            model_fn,
            params,
            val,
            {"reduction": reduction},
            partial(own, chunk_size=chunk_size, randomness=randomness),
            lambda u: u,
            mean=reduction == "mean",
        )[0]
    one_of("reduction", reduction, ("mean", "sum"))
    one_of("randomness", randomness, ("error", "different"))
    program = Program.of(model_fn, params, randomness)
    u = dense_direction(program, val, mean=reduction == "mean", chunk_size=chunk_size)
    return program.spec.unflatten(u)


@compilable()
@of_all_ranks("gf.per_sample_grads")
def per_sample_grads(
    model_fn: ModelFn,
    params: PyTree,
    batch: PyTree,
    *,
    mode: Mode = "materialized",
    vectorize: bool | None = None,
    check: Check = "new",
    randomness: Randomness = "error",
) -> PyTree:
    """Every sample's gradient itself: as large as n models.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses`.
        params: pytree of floating-point tensors.
        batch: pytree of tensors `[n, ...]`.
        mode: "materialized" (`vmap(grad)`, the definition) or "ghost" (from the factors, in one
            batched backward pass: how op rules are tested, and a way for models vmap cannot run).
        vectorize: for `mode="materialized"`: True for vmap, False for a loop over samples, None for
            the loop where vmap cannot run the model.
        check: when numbers are held against plain autograd: "new", where the way through the
            program or the shapes are new, in two more passes; "always", there and with one sample
            drawn at random in every call; or "never".
        randomness: "error" or "different".

    Returns:
        A pytree like `params` of `[n, *shape]`; row i is the gradient of sample i's own loss.
    """
    one_of("mode", mode, ("materialized", "ghost"))
    one_of("randomness", randomness, ("error", "different"))
    one_of("check", check, CHECKS)
    check_vectorize(vectorize)
    program = Program.of(model_fn, params, randomness)
    batch_size(batch)
    if mode == "ghost":
        taken = run(program, batch, [SampleGrad()], check=check)
        return program.spec.unflatten(taken.values[0])
    refuse_pieces(model_fn, f"mode={mode!r}")
    prove_independent(program, batch)
    return program.spec.unflatten(definition.materialize(program, batch, vectorize=vectorize))
