"""Sums of clipped per-sample gradients, for differentially private and for robust training."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import optree
import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base import batches
from ghostfunc._base.compilable import compilable
from ghostfunc._base.errors import OptionError
from ghostfunc._base.losses import FiniteLosses
from ghostfunc._base.options import (
    CHECKS,
    check_chunk_size,
    check_flags,
    check_vectorize,
    one_of,
)
from ghostfunc._base.processes.pieces import (
    chunks_of_all,
    of_all_ranks,
    on_any_rank,
    refuse_pieces,
    together,
)
from ghostfunc._base.program import Program
from ghostfunc._base.reprs import brief
from ghostfunc._base.torch_private import in_transform, symbolic
from ghostfunc._base.trees import ParamSpec, batch_size, flatten
from ghostfunc._base.types import Check, Mode, ModelFn, PyTree, Randomness
from ghostfunc._factors import extreme_norms
from ghostfunc._transforms.factored import check_weight_shape, check_weights, collect_by_length
from ghostfunc._transforms.sums_over_ranks import sums_of_all


class ClippedGrad(NamedTuple):
    """What `ghost_clipped_grad` returns.

    Attributes:
        grads: `sum_i w_i c_i g_i`, a pytree like `params` and of their dtypes.
        norms: `||g_i||` before clipping, `[n]`; for `per_layer` a pytree like `params` of those.
    """

    grads: PyTree
    norms: PyTree

    def __repr__(self) -> str:
        return brief("ClippedGrad", **self._asdict())


@compilable(ClippedGrad)
@of_all_ranks("gf.ghost_clipped_grad")
def ghost_clipped_grad(
    model_fn: ModelFn,
    params: PyTree,
    batch: PyTree,
    *,
    max_norm: float | PyTree,
    per_layer: bool = False,
    normalize: bool = False,
    weights: Float[Tensor, " n"] | None = None,
    mode: Mode = "ghost",
    vectorize: bool | None = None,
    check: Check = "new",
    chunk_size: int | None = None,
    randomness: Randomness = "error",
    check_finite: bool = True,
    group: Any = None,
) -> ClippedGrad:
    """The sum of clipped per-sample gradients, from one forward and one backward pass.

        sum_i w_i c_i g_i,   c_i = min(1, C / ||g_i||)   (normalize: c_i = C / ||g_i||)

    **Sensitivity.** Adding or removing one sample moves the sum by at most `C * max_i |w_i|` in
    Euclidean norm, to rounding; replacing one by at most twice that. With `per_layer` the same
    holds for every parameter and its own C, and for the whole with the root of the sum of their
    squares: `max_norm` again, if that is a single number. Only the sum is bounded. `norms`, and
    whether an exception is raised, depend on single samples without bound: publish neither.

    | sample                             | contributes                   | its norm   |
    |------------------------------------|-------------------------------|------------|
    | `||g_i|| <= C`                     | `w_i g_i` (normalize: scaled) | finite     |
    | `||g_i|| > C`, however large       | `w_i C g_i / ||g_i||`         | finite     |
    | `||g_i|| = 0`                      | `w_i g_i` (normalize: zero)   | 0          |
    | `g_i` has a NaN or infinite entry  | zero                          | NaN or inf |
    | `||g_i||` is beyond the dtype      | zero                          | inf        |
    | `w_i = 0`                          | zero: it is left out          | any        |
    | `losses[i]` is NaN or infinite     | raises `NonFiniteLossError`   | -          |

    `max_norm=0` gives zero, `max_norm=inf` the plain sum of what is finite (not with `normalize`).

    **Time and memory.** Norms and sum are contracted from factors that are kept until the backward
    pass is over (`factored_grads`): there is no second pass. What is kept grows while the
    activations of a training step are freed, so the peak is about a step's; with a `chunk_size` it
    is that of a chunk.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses [n]`.
        params: pytree of floating-point tensors.
        batch: pytree of tensors `[n, ...]`.
        max_norm: the bound C. With `per_layer` it may be a pytree like `params` of numbers; a
            single number is then split evenly, `C / sqrt(number of parameters)` for each.
        per_layer: clip the gradient of every parameter by itself.
        normalize: scale every gradient to the norm C, small ones up (automatic clipping).
        weights: `[n]`, multiplied on after clipping; ones by default.
        mode: "ghost" (book-keeping) or "materialized" (`vmap(grad)`, as large as n models).
        vectorize: for "materialized": True for vmap, False for a loop over samples, None for the
            loop where vmap cannot run the model.
        check: when numbers are held against plain autograd: "new", where the way through the
            program or the shapes are new, in two more passes; "always", there and with one sample
            drawn at random in every call; or "never".
        chunk_size: the most samples to run at one time; by default all of them.
        randomness: "error" or "different".
        check_finite: whether to look for what is not finite, and for squares that over- or
            underflow: one wait for the device, when all is queued. Without it nothing waits, and
            the lines of the table below the second hold for none but finite gradients with squares
            in the dtype's range: the sum is bounded only if you see to that. Ghost mode only.
        group: a process group of `torch.distributed`: every rank gives samples of its own, `grads`
            is the sum over all ranks' samples, the same on every rank, and `norms` are those of the
            rank's own. Noise has to be the same on all ranks, or be drawn on one.

    Returns:
        `ClippedGrad(grads, norms)`. `grads` is a sum, not a mean: divide by the (expected) batch
        size yourself, after adding noise.

    Raises:
        OptionError: `max_norm` is negative or NaN or not like `params`; `weights` are not n finite
            numbers.
        NonFiniteLossError: a loss is NaN or infinite.
        RankError: with a `group`, another rank failed, is gone, or was given something else.
        GhostError: another of its children, as for `ghost_vjp`.

    Reference:
        Abadi et al., "Deep Learning with Differential Privacy", CCS 2016; Bu et al.,
        "Differentially Private Optimization on Large Model at Small Cost", ICML 2023; Bu et al.,
        "Automatic Clipping", NeurIPS 2023.
    """
    if group is not None:
        alike: dict[str, Any] = {"max_norm": max_norm, "per_layer": per_layer}
        alike["normalize"] = normalize
        own = partial(ghost_clipped_grad, model_fn, params, batch, **alike)
        rest = partial(own, weights=weights, mode=mode, vectorize=vectorize, check=check)
        rest = partial(rest, chunk_size=chunk_size, randomness=randomness)
        rest = partial(rest, check_finite=check_finite)
        asked = group, "ghost_clipped_grad", model_fn, params, batch, alike, rest
        total, clipped = sums_of_all(*asked, lambda x: x.grads, mean=False)
        return ClippedGrad(total, clipped.norms)
    one_of("randomness", randomness, ("error", "different"))
    one_of("check", check, CHECKS)
    check_chunk_size(chunk_size)
    check_flags(per_layer=per_layer, normalize=normalize, check_finite=check_finite)
    check_vectorize(vectorize)
    _check_mode(mode, model_fn, check_finite)
    program = Program.of(model_fn, params, randomness)
    bounds = _bounds(max_norm, program.spec, per_layer=per_layer, normalize=normalize)
    if weights is not None:
        check_weight_shape(weights, batch_size(batch))
    clipped_of = partial(
        _clipped,
        program,
        bounds=bounds,
        per_layer=per_layer,
        normalize=normalize,
        mode=mode,
        vectorize=vectorize,
        check=check,
        check_finite=check_finite,
    )
    least = chunks_of_all(model_fn, batch, chunk_size)
    sums, norms = _over_chunks(clipped_of, batch, weights, chunk_size, least)
    unflatten = program.spec.unflatten
    return ClippedGrad(unflatten(sums), unflatten(norms) if per_layer else norms[0])


def _check_mode(mode: Mode, model_fn: ModelFn, check_finite: bool) -> None:
    one_of("mode", mode, ("ghost", "materialized"))
    if not check_finite and mode != "ghost":
        raise OptionError(f'check_finite=False needs mode="ghost"; got mode={mode!r}.')
    if mode != "ghost":
        refuse_pieces(model_fn, f"mode={mode!r}")


def _over_chunks(
    clipped_of: Callable[..., ClippedGrad],
    batch: PyTree,
    weights: Tensor | None,
    chunk_size: int | None,
    least: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Sums of clipped gradients and norms of all samples, a chunk at a time."""
    start = 0

    def of_chunk(chunk: PyTree) -> ClippedGrad:
        nonlocal start
        stop = start + batch_size(chunk)
        own = None if weights is None else weights[start:stop]
        start = stop
        return clipped_of(chunk, weights=own)

    norms, sums = [], batches.Sums()
    for part in batches.each(of_chunk, batch, chunk_size, least=least):
        sums.add(flatten(part.grads)[0])
        norms.append(flatten(part.norms)[0])
        del part
    return sums.result(), batches.joined(norms)


def _clipped(
    program: Program,
    batch: PyTree,
    bounds: list[float],
    weights: Tensor | None,
    *,
    per_layer: bool,
    normalize: bool,
    mode: Mode,
    vectorize: bool | None,
    check: Check,
    check_finite: bool,
) -> ClippedGrad:
    """The clipped sum of one chunk."""
    n = batch_size(batch)
    finite = FiniteLosses(check_finite)
    book = collect_by_length(
        program, batch, mode=mode, vectorize=vectorize, check=check, finite=finite
    )

    def clipped(rows: Tensor, *, finite: bool) -> ClippedGrad:
        joint = extreme_norms.joint(rows)
        compared = rows if per_layer else joint[None]
        like = rows.new_full((len(bounds), 1), bounds[0])
        for k in range(1, len(bounds)):
            like[k].fill_(bounds[k])
        factors = _factors_of(compared, like, normalize=normalize)
        # A gradient with one entry that is not finite is left out as a whole.
        factors = torch.where(rows.isfinite().all(0) & joint.isfinite(), factors, 0)
        if weights is not None:
            factors = factors * weights.to(factors)
        grads = book.param_sums(list(factors.expand(len(program.leaves), n)), finite=finite)
        return ClippedGrad(grads, program.spec.unflatten(list(rows)) if per_layer else joint)

    with together(program.model_fn, f"clipping to {bounds}, normalize={normalize}"):
        squares = book.squares()
        if not symbolic(squares) and not in_transform():
            # As if all were finite, which one look tells when everything is queued.
            taken = clipped(extreme_norms.root(squares), finite=True)
            unlikely = extreme_norms.extremes(squares.sum(0), book.losses)
            if weights is not None:
                unlikely = unlikely | ~weights.isfinite()
            again = check_finite and finite.look(unlikely)
            if not on_any_rank(program.model_fn, "asking whether all is finite", flag=again):
                return taken
        if weights is not None:
            check_weights(weights, n)
        return clipped(book.param_norms(squares), finite=False)


def _factors_of(norms: Tensor, bounds: Tensor, *, normalize: bool) -> Tensor:
    """`c_i`, zero where it overflows: there the gradient is as good as zero."""
    factors = bounds / norms
    if not normalize:
        return torch.where(norms > bounds, factors, 1)
    return torch.where(factors.isfinite(), factors, 0)


def _bounds(
    max_norm: float | PyTree, spec: ParamSpec, *, per_layer: bool, normalize: bool
) -> list[float]:
    """One bound for every norm that is compared: one in all, or one per parameter."""
    if isinstance(max_norm, (int, float)):
        count = len(spec.names) if per_layer else 1
        bounds = [max_norm / math.sqrt(count)] * count
    elif per_layer:
        bounds, treedef = optree.tree_flatten(max_norm)
        if treedef != spec.treedef or not all(isinstance(c, (int, float)) for c in bounds):
            raise OptionError(
                "max_norm must be a number, or a pytree like params of numbers (Python floats), "
                f"one bound per parameter; its structure is {treedef}."
            )
    else:
        raise OptionError(
            f"max_norm is a {type(max_norm).__name__}; it must be a number. Bounds per parameter "
            "need per_layer=True."
        )
    allowed = (lambda c: 0 <= c < math.inf) if normalize else (lambda c: c >= 0)
    if not all(map(allowed, bounds)):
        finite = " and finite (normalize=True)" if normalize else ""
        raise OptionError(f"max_norm must not be negative{finite}; got {max_norm!r}.")
    return [float(c) for c in bounds]
