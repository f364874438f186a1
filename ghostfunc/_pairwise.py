"""Norms, cosines and Gram matrices of per-sample gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ghostfunc import _bundles, _norms, _pairs
from ghostfunc._blocks import GramBlocks
from ghostfunc._book import collect
from ghostfunc._capture import compilable, symbolic
from ghostfunc._direction import validation_readers
from ghostfunc._errors import OptionError, one_of
from ghostfunc._factors import add_up
from ghostfunc._quantities import (
    Dot,
    DotReader,
    PairReader,
    Prepared,
    Quantity,
    SqNorm,
    TurnReader,
)
from ghostfunc._tree import ParamSpec, batch_size, flatten_like, flatten_params, take
from ghostfunc._types import Mode, ModelFn, PyTree, Randomness, Reduction
from ghostfunc._vjp import run

_MODES = ("ghost", "materialized")


@compilable()
def ghost_norm(
    model_fn: ModelFn,
    params: PyTree,
    batch: PyTree,
    *,
    per_param: bool = False,
    mode: Mode = "ghost",
    vectorize: bool = True,
    randomness: Randomness = "error",
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
        vectorize: for "materialized", False loops over samples.
        randomness: "error" or "different".

    Returns:
        `[n]`, float32 or wider; for `per_param` a pytree like `params` of those. NaN or infinite
        where the gradient has such an entry. Samples whose square over- or underflows are run once
        more, at another scale (not with `randomness="different"`); what is below 1e-22 in float32
        may read as zero.

    Raises:
        GhostError: one of its children, as for `ghost_vjp`.

    Reference:
        Goodfellow, "Efficient Per-Example Gradient Computations", 2015; Li et al., "Large Language
        Models Can Be Strong Differentially Private Learners", ICLR 2022 (ghost norms).
    """
    one_of("mode", mode, _MODES)
    one_of("randomness", randomness, ("error", "different"))
    leaves, spec = flatten_params(params)
    if mode == "ghost":
        taken = run(model_fn, leaves, spec, batch, [SqNorm()], randomness=randomness)
        rows = _roots(model_fn, leaves, spec, batch, taken.values[0], randomness)
    else:
        book = collect(
            model_fn, leaves, spec, batch, mode=mode, vectorize=vectorize, randomness=randomness
        )
        rows = book.param_norms()
    return spec.unflatten(list(rows)) if per_param else _norms.joint(rows)


def _roots(
    model_fn: ModelFn,
    leaves: Sequence[Tensor],
    spec: ParamSpec,
    batch: PyTree,
    squares: Sequence[Tensor],
    randomness: Randomness,
) -> Tensor:
    """Norms `[params, n]` from squares; extreme samples are run once more."""
    table = torch.stack(list(squares))
    if symbolic(table):
        return _norms.trusted_roots(table)
    rows = _norms.root(table)
    extreme = _norms.extremes(table.sum(0))
    if randomness == "error" and bool(extreme.any()):
        index = extreme.nonzero().flatten()
        again = collect(model_fn, leaves, spec, take(batch, index.tolist()))
        rows[:, index] = again.param_norms().to(rows.dtype)
    return rows


@compilable()
def ghost_gram(
    model_fn: ModelFn,
    params: PyTree,
    batch: PyTree,
    other: PyTree | None = None,
    *,
    per_param: bool = False,
    mode: Mode = "ghost",
    memory_budget: int | None = None,
    vectorize: bool = True,
    randomness: Randomness = "error",
) -> PyTree:
    """Inner products of all pairs of per-sample gradients.

        G_ij = <g_i, g_j>   (with `other`: g_i of batch, g_j of other)

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses [n]`.
        params: pytree of floating-point tensors.
        batch: pytree of tensors `[n, ...]`.
        other: pytree of tensors `[m, ...]`; lengths may differ from those of `batch`.
        per_param: return the contributions of every parameter; they sum to the total.
        mode: "ghost" or "materialized" (`vmap(grad)`, as large as n models).
        memory_budget: bytes that may be allocated at one time, apart from the result. Samples are
            then run in blocks, one against the other, as large as the budget allows: k blocks take
            `k (k + 1) / 2` forward and backward passes of one block (with `other`, one for every
            pair of blocks and one for every block of it). By default everything is run at once.
            What a sample takes is measured, on two of them, at the first call with given shapes.
        vectorize: for "materialized", False loops over samples.
        randomness: "error" or "different" (not with a budget: every block would draw anew).

    Returns:
        `[n, n]`, symmetric, or `[n, m]`; float32 or wider; for `per_param` a pytree like `params`
        of those. The diagonal is `ghost_norm(...) ** 2`.

    Raises:
        OptionError: not even one sample at a time fits into the budget.
        GhostError: another of its children, as for `ghost_vjp`.
    """
    one_of("mode", mode, _MODES)
    one_of("randomness", randomness, ("error", "different"))
    if memory_budget is not None and (mode, randomness) != ("ghost", "error"):
        raise OptionError(
            'memory_budget needs mode="ghost" and randomness="error": it runs samples in blocks, '
            "some more than once."
        )
    leaves, spec = flatten_params(params)
    if mode == "ghost":
        blocks = GramBlocks(model_fn, leaves, spec, per_param, memory_budget, randomness)
        grams = blocks.within(batch) if other is None else blocks.between(batch, other)
    else:
        books = [
            collect(
                model_fn, leaves, spec, b, mode=mode, vectorize=vectorize, randomness=randomness
            )
            for b in ([batch] if other is None else [batch, other])
        ]
        grams = books[0].param_grams(*books[1:])
    return spec.unflatten(grams) if per_param else add_up(grams)


@compilable()
def ghost_cosine(
    model_fn: ModelFn,
    params: PyTree,
    train: PyTree,
    val: PyTree | None = None,
    *,
    direction: PyTree | None = None,
    reduction: Reduction = "mean",
    per_param: bool = False,
    mode: Mode = "ghost",
    vectorize: bool = True,
    randomness: Randomness = "error",
) -> PyTree:
    """Cosines between every train sample's gradient and the validation gradient.

        c_i = <g_i, u> / (||g_i|| ||u||),   u = mean_j d losses_val[j] / d params

    `ghost_dot_prod` without the lengths: a sample does not score by having a large loss. One
    backward pass over `train` gives dot products and norms.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses`, one loss per sample.
        params: pytree of floating-point tensors.
        train: pytree of tensors `[n, ...]`.
        val: pytree of tensors `[m, ...]`.
        direction: instead of `val`, a pytree like `params`.
        reduction: "mean" (or "sum", which has the same cosine), or "none" for the cosine with every
            validation sample's gradient, `[n, m]`.
        per_param: cosines parameter by parameter, each between the gradients of that parameter
            alone. They do not sum to the total.
        mode: "ghost" or "materialized" (`vmap(grad)`, as large as n + m models).
        vectorize: for "materialized", False loops over samples.
        randomness: "error" or "different".

    Returns:
        `[n]` (`[n, m]` for `reduction="none"`) in [-1, 1]; for `per_param` a pytree like `params`
        of those. Where one of the two gradients is zero the cosine is 0: no direction, no
        similarity. NaN where a gradient is not finite.

    Raises:
        GhostError: one of its children, as for `ghost_dot_prod`.
    """
    one_of("mode", mode, _MODES)
    one_of("randomness", randomness, ("error", "different"))
    one_of("reduction", reduction, ("mean", "sum", "none"))
    if (val is None) == (direction is None):
        given = "both" if val is not None else "neither"
        raise OptionError(f"Give exactly one of val and direction; {given} was given.")
    leaves, spec = flatten_params(params)
    if mode == "ghost":
        if direction is not None:
            quantity: Quantity = Dot(direction)
            readers: Sequence[Any] = quantity.readers(leaves, spec)
        else:
            readers = validation_readers(
                model_fn,
                leaves,
                spec,
                train,
                val,
                reduction=reduction,
                grads=False,
                randomness=randomness,
            )
            quantity = Prepared(readers, degree=1)
        taken = run(model_fn, leaves, spec, train, [quantity, SqNorm()], randomness=randomness)
        dots = taken.values[0]
        rows = _roots(model_fn, leaves, spec, train, taken.values[1], randomness)
        lengths = torch.stack([_length(r, rows) for r in readers])
    else:
        dots, rows, lengths = _materialized(
            model_fn, leaves, spec, train, val, direction, reduction, vectorize, randomness
        )
    if per_param:
        return spec.unflatten(
            [_cosine(d, g, u) for d, g, u in zip(dots, rows, lengths, strict=True)]
        )
    return _cosine(add_up(dots), _norms.joint(rows), _norms.joint(lengths))


def _length(reader: DotReader | PairReader | TurnReader, like: Tensor) -> Tensor:
    """`||u||` in float64: `[1]`, or `[m]` for every validation sample."""
    match reader:
        case DotReader(u):
            return u.double().norm()[None]
        case TurnReader(turns, m):
            us = (add_up([turn.gradient(j) for turn in turns]) for j in range(m))
            return torch.stack([u.double().norm() for u in us])
        case PairReader(()):  # the validation losses do not depend on the parameter
            return like.new_zeros(reader.m if reader.each else 1, dtype=torch.float64)
        case PairReader(factors, each):
            bundle = factors if each else [_bundles.pooled(f) for f in factors]
            return _norms.root(_pairs.sqnorms(bundle)).double()


def _cosine(dots: Tensor, norms: Tensor, lengths: Tensor) -> Tensor:
    """`dots / (norms * lengths)`, zero where a length is zero."""
    norms = norms.view(-1, *[1] * (dots.ndim - 1))
    cosines = dots / torch.where(norms == 0, 1, norms) / torch.where(lengths == 0, 1, lengths)
    return torch.where((norms == 0) | (lengths == 0), 0, cosines.clamp(-1, 1)).to(dots.dtype)


def _materialized(
    model_fn: ModelFn,
    leaves: Sequence[Tensor],
    spec: ParamSpec,
    train: PyTree,
    val: PyTree | None,
    direction: PyTree | None,
    reduction: Reduction,
    vectorize: bool,
    randomness: Randomness,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Dot products and both sides' norms, parameter by parameter, from gradients themselves."""
    books = [
        collect(
            model_fn,
            leaves,
            spec,
            batch,
            mode="materialized",
            vectorize=vectorize,
            randomness=randomness,
        )
        for batch in ([train] if val is None else [train, val])
    ]
    norms = books[0].param_norms()
    if reduction == "none" and val is not None:
        return books[0].param_grams(books[1]), norms, books[1].param_norms()
    if val is not None:
        m = batch_size(val, "val")
        direction = books[1].weighted_sum(norms.new_full((m,), 1 / m))
    us = flatten_like(direction, leaves, spec, "direction")
    dots = books[0].param_dots(us)
    return dots, norms, torch.stack([u.double().norm()[None] for u in us])
