"""Gram matrices: inner products of pairs of samples' gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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
from ghostfunc._base.processes.pieces import of_all_ranks, refuse_pieces
from ghostfunc._base.program import Program
from ghostfunc._base.types import Check, Mode, ModelFn, PyTree, Randomness
from ghostfunc._factors import extreme_norms
from ghostfunc._factors.contract import add_up
from ghostfunc._quantities.quantity import Gram, Prepared, Quantity, SqNorm
from ghostfunc._quantities.readers import PairReader
from ghostfunc._taps.run import run
from ghostfunc._transforms.factored import FactoredGrads, collect
from ghostfunc._transforms.norms import _MODES
from ghostfunc._transforms.scores.lengths import sample_norms


@compilable()
@of_all_ranks("gf.ghost_gram")
def ghost_gram(
    model_fn: ModelFn,
    params: PyTree,
    batch: PyTree,
    other: PyTree | None = None,
    *,
    per_param: bool = False,
    normalize: bool = False,
    mode: Mode = "ghost",
    chunk_size: int | None = None,
    vectorize: bool | None = None,
    check: Check = "new",
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
        normalize: cosines instead, `G_ij / (||g_i|| ||g_j||)`; 0 where a gradient is zero, NaN
            where a product of norms underflows. With `other`, both batches are run once more for
            their norms.
        mode: "ghost" or "materialized" (`vmap(grad)`, as large as n models).
        chunk_size: the most samples to run at one time. Samples then run in chunks, one against the
            other: k chunks take `k (k + 1) / 2` forward and backward passes of one chunk (with
            `other`, one for every pair of chunks and one for every chunk of it). The factors of two
            chunks are in memory at one time. By default everything is run at once.
        vectorize: for "materialized": True for vmap, False for a loop over samples, None for the
            loop where vmap cannot run the model.
        check: when numbers are held against plain autograd: "new", where the way through the
            program or the shapes are new, in two more passes; "always", there and with one sample
            drawn at random in every call; or "never".
        randomness: "error" or "different" (not with chunks: every pass would draw anew).

    Returns:
        `[n, n]`, symmetric, or `[n, m]`; float32 or wider; for `per_param` a pytree like `params`
        of those. The diagonal is `ghost_norm(...) ** 2`.

    Raises:
        OptionError: `chunk_size` in a mode that does not run chunks.
        GhostError: another of its children, as for `ghost_vjp`.
    """
    check_flags(per_param=per_param, normalize=normalize)
    _check_options(mode, chunk_size, normalize and other is not None, check, randomness)
    check_vectorize(vectorize)
    if mode != "ghost" or chunk_size is not None:
        refuse_pieces(model_fn, f"ghost_gram with mode={mode!r} and chunk_size={chunk_size}")
    program = Program.of(model_fn, params, randomness)
    lengths: list[list[Tensor]] = []
    if mode == "ghost":
        model = _Gradients(program, per_param, check)
        mine = [chunk for _, chunk in batches.chunks(batch, chunk_size)]
        if other is None:
            grams, losses = model.within(mine)
            if normalize:
                lengths = [model.lengths(batch, [g.diagonal() for g in grams], losses)]
        else:
            theirs = [chunk for _, chunk in batches.chunks(other, chunk_size, "other")]
            grams = model.between(mine, theirs)
            if normalize:
                sides = (batch, mine), (other, theirs)
                lengths = [model.lengths(side, *model.squares(x)) for side, x in sides]
    else:
        book, *others = (
            collect(program, b, mode=mode, vectorize=vectorize, check=check)
            for b in ([batch] if other is None else [batch, other])
        )
        grams = book.param_grams(*others)
        grams = grams if per_param else [add_up(grams)]
        if normalize:
            books = [book, *others]
            lengths = [list(b.param_norms()) if per_param else [b.norms()] for b in books]
    if normalize:
        grams = list(map(extreme_norms.cosine, grams, lengths[0], lengths[-1]))
    return program.spec.unflatten(grams) if per_param else grams[0]


def _check_options(
    mode: Mode, chunk_size: int | None, norms_apart: bool, check: Check, randomness: Randomness
) -> None:
    """`norms_apart`: norms are asked for that come from a run of their own."""
    one_of("mode", mode, _MODES)
    one_of("randomness", randomness, ("error", "different"))
    one_of("check", check, CHECKS)
    check_chunk_size(chunk_size)
    if chunk_size is not None and (mode, randomness) != ("ghost", "error"):
        raise OptionError(
            'chunk_size needs mode="ghost" and randomness="error" here: it runs samples in chunks, '
            "some more than once."
        )
    if norms_apart and randomness != "error":
        raise OptionError(
            'normalize=True with other needs randomness="error": norms come from a run of their '
            'own. ghost_cosine(..., reduction="none") takes them from the same one.'
        )


@dataclass(frozen=True)
class _Gradients:
    """Per-sample gradients of one model function, whose inner products are asked for.

    Attributes:
        per_param: one matrix for every parameter instead of one in all.
    """

    program: Program
    per_param: bool
    check: Check

    def within(self, chunks: Sequence[PyTree]) -> tuple[list[Tensor], Tensor]:
        """`[n, n]`, and the losses: the factors of one chunk are kept while those after it stream
        past them."""
        table: list[list[list[Tensor]]] = [[[] for _ in chunks] for _ in chunks]
        losses = []
        for j, chunk in enumerate(chunks[:-1]):
            kept = self._factors(chunk)
            losses.append(kept.losses)
            table[j][j] = self._summed(kept.param_grams())
            for i in range(j + 1, len(chunks)):
                table[i][j] = self._beside(kept, chunks[i])
                table[j][i] = [g.mT for g in table[i][j]]
            del kept
        table[-1][-1], last = self._read(chunks[-1], Gram())
        return _joined(table), torch.cat([*losses, last]) if losses else last

    def between(self, mine: Sequence[PyTree], theirs: Sequence[PyTree]) -> list[Tensor]:
        """`[n, m]`: the factors of one chunk of `theirs` are kept while all of `mine` stream past
        them."""
        columns = []
        for chunk in theirs:
            kept = self._factors(chunk)
            columns.append([self._beside(kept, other) for other in mine])
            del kept
        return _joined([list(row) for row in zip(*columns, strict=True)])

    def squares(self, chunks: Sequence[PyTree]) -> tuple[list[Tensor], Tensor]:
        """`||g_i||^2`, `[n]`, and the losses."""
        parts, losses = zip(*(self._read(chunk, SqNorm()) for chunk in chunks), strict=True)
        return list(map(torch.cat, zip(*parts, strict=True))), torch.cat(losses)

    def lengths(self, batch: PyTree, squares: list[Tensor], losses: Tensor) -> list[Tensor]:
        """`||g_i||`, `[n]`; samples whose square over- or underflows are run once more."""
        return list(sample_norms(self.program, batch, squares, losses, FiniteLosses()))

    def _factors(self, chunk: PyTree) -> FactoredGrads:
        return collect(self.program, chunk, check=self.check)

    def _beside(self, kept: FactoredGrads, chunk: PyTree) -> list[Tensor]:
        """`<g_i, g_j>`, i in `chunk` and j in `kept`."""
        readers = [PairReader(bundle, True, len(kept.losses)) for bundle in kept.bundles]
        return self._read(chunk, Prepared(readers, degree=1))[0]

    def _read(self, chunk: PyTree, quantity: Quantity) -> tuple[list[Tensor], Tensor]:
        """A quantity, and the losses."""
        result = run(self.program, chunk, [quantity], check=self.check)
        return self._summed(result.values[0]), result.losses

    def _summed(self, values: list[Tensor]) -> list[Tensor]:
        return values if self.per_param else [add_up(values)]


def _joined(table: list[list[list[Tensor]]]) -> list[Tensor]:
    """One matrix per parameter, from a table of blocks of all parameters."""
    rows = [[torch.cat(blocks, 1) for blocks in zip(*row, strict=True)] for row in table]
    return [torch.cat(column) for column in zip(*rows, strict=True)]
