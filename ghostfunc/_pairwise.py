"""Norms, cosines and Gram matrices of per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghostfunc import _bundles, _chunks, _norms, _pairs
from ghostfunc._blocks import GramBlocks
from ghostfunc._book import FactoredGrads, collect
from ghostfunc._capture import compilable, symbolic
from ghostfunc._direction import dense_direction, validation_readers
from ghostfunc._errors import OptionError, one_of
from ghostfunc._factors import add_up
from ghostfunc._quantities import (
    DotReader,
    PairReader,
    Prepared,
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
    chunk_size: int | None = None,
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
        chunk_size: the most samples to run at one time; by default all of them.
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

    def of_chunk(chunk: PyTree) -> list[Tensor]:
        if mode == "ghost":
            taken = run(model_fn, leaves, spec, chunk, [SqNorm()], randomness=randomness)
            return [_roots(model_fn, leaves, spec, chunk, taken.values[0], randomness)]
        book = collect(
            model_fn, leaves, spec, chunk, mode=mode, vectorize=vectorize, randomness=randomness
        )
        return [book.param_norms()]

    (rows,) = _chunks.joined(_chunks.each(of_chunk, batch, chunk_size), axis=1)
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
    chunk_size: int | None = None,
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
        chunk_size: the most samples to run at one time, as in `ghost_dot_prod`.
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
    _chunks.check_chunk_size(chunk_size)
    ask = _Cosines(model_fn, leaves, spec, train, mode, vectorize, chunk_size, randomness)
    if direction is not None:
        us = flatten_like(direction, leaves, spec, "direction")
        cosines = ask.along(us, per_param=per_param)
    elif reduction != "none" and chunk_size is not None and batch_size(val, "val") > chunk_size:
        us = dense_direction(
            model_fn, leaves, spec, val, mean=True, chunk_size=chunk_size, randomness=randomness
        )
        cosines = ask.along(us, per_param=per_param)
    else:
        cosines = _chunks.joined(
            (
                ask.between(part, reduction, per_param=per_param)
                for _, part in _chunks.chunks(val, chunk_size, "val")
            ),
            axis=1,
        )
    return spec.unflatten(cosines) if per_param else cosines[0]


@dataclass(frozen=True)
class _Cosines:
    """Cosines with the gradients of one batch: `[n]` or `[n, m]`, per parameter or one in all."""

    model_fn: ModelFn
    leaves: Sequence[Tensor]
    spec: ParamSpec
    train: PyTree
    mode: Mode
    vectorize: bool
    chunk_size: int | None
    randomness: Randomness

    def along(self, us: Sequence[Tensor], *, per_param: bool) -> list[Tensor]:
        """With one direction."""
        if self.mode == "ghost":
            return self._ghost([DotReader(u) for u in us], per_param=per_param)
        lengths = torch.stack([u.double().norm()[None] for u in us])
        return self._each(
            lambda book: (book.param_dots(us), book.param_norms(), lengths), per_param=per_param
        )

    def between(self, val: PyTree, reduction: Reduction, *, per_param: bool) -> list[Tensor]:
        """With the gradients of validation samples, all together or each."""
        if self.mode == "ghost":
            readers = validation_readers(
                self.model_fn,
                self.leaves,
                self.spec,
                self.train,
                val,
                reduction=reduction,
                grads=False,
                randomness=self.randomness,
            )
            return self._ghost(readers, per_param=per_param)
        theirs = self._collect(val)
        if reduction == "none":
            lengths = theirs.param_norms()
            return self._each(
                lambda book: (book.param_grams(theirs), book.param_norms(), lengths),
                per_param=per_param,
            )
        m = batch_size(val, "val")
        mean = theirs.weighted_sum(self.leaves[0].new_full((m,), 1 / m))
        us = flatten_like(mean, self.leaves, self.spec, "direction")
        del theirs
        return self.along(us, per_param=per_param)

    def _ghost(self, readers: Sequence[Any], *, per_param: bool) -> list[Tensor]:
        quantities = [Prepared(readers, degree=1), SqNorm()]

        def of_chunk(train: PyTree) -> list[Tensor]:
            taken = run(
                self.model_fn, self.leaves, self.spec, train, quantities, randomness=self.randomness
            )
            dots, squares = taken.values
            rows = _roots(self.model_fn, self.leaves, self.spec, train, squares, self.randomness)
            lengths = torch.stack([_length(r, rows) for r in readers])
            return _cosines(dots, rows, lengths, per_param=per_param)

        return _chunks.joined(_chunks.each(of_chunk, self.train, self.chunk_size, "train"))

    def _each(
        self,
        read: Callable[[FactoredGrads], tuple[list[Tensor], Tensor, Tensor]],
        *,
        per_param: bool,
    ) -> list[Tensor]:
        return _chunks.joined(
            _chunks.each(
                lambda train: _cosines(*read(self._collect(train)), per_param=per_param),
                self.train,
                self.chunk_size,
                "train",
            )
        )

    def _collect(self, batch: PyTree) -> FactoredGrads:
        return collect(
            self.model_fn,
            self.leaves,
            self.spec,
            batch,
            mode="materialized",
            vectorize=self.vectorize,
            randomness=self.randomness,
        )


def _cosines(
    dots: Sequence[Tensor], norms: Tensor, lengths: Tensor, *, per_param: bool
) -> list[Tensor]:
    if per_param:
        return [_cosine(d, g, u) for d, g, u in zip(dots, norms, lengths, strict=True)]
    return [_cosine(add_up(dots), _norms.joint(norms), _norms.joint(lengths))]


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
