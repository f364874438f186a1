"""Gram matrices within a memory budget: blocks of samples, one against the other.

The factors of one block are kept while the other blocks stream past them. How large a block may be
is not guessed: one sample and two are run with every allocation counted, and what grows is taken
to grow on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import OptionError
from ghostfunc._base.remembered import memory, shapes_key, structure
from ghostfunc._base.trees import ParamSpec, batch_size, take
from ghostfunc._base.types import Check, ModelFn, PyTree, Randomness
from ghostfunc._factors import cost
from ghostfunc._factors.contract import add_up
from ghostfunc._quantities.quantity import Gram, Prepared, Quantity, SqNorm
from ghostfunc._quantities.readers import PairReader
from ghostfunc._taps.run import run
from ghostfunc._trace.find import trace_of
from ghostfunc._transforms.factored import FactoredGrads, collect
from ghostfunc._transforms.live_bytes import Linear, LiveBytes, line_through

_TEMPORARIES = 4
"""A contraction's temporaries, in multiples of its workspace."""

_SMALLEST_WORKSPACE = 1 << 12


@dataclass(frozen=True)
class GramBlocks:
    """Gram matrices of one model function's gradients.

    Attributes:
        budget: bytes that may be allocated at one time; None runs everything at once.
        per_param: one matrix for every parameter instead of one in all.
    """

    model_fn: ModelFn
    leaves: Sequence[Tensor]
    spec: ParamSpec
    per_param: bool
    budget: int | None
    check: Check
    randomness: Randomness

    def within(self, batch: PyTree) -> list[Tensor]:
        """`[n, n]`, every pair of samples of one batch."""
        n = batch_size(batch)
        size, workspace = self._plan(batch, None)
        blocks = list(_blocks(n, size))
        table: list[list[list[Tensor]]] = [[[] for _ in blocks] for _ in blocks]
        for j, block in enumerate(blocks[:-1]):
            book = self._collect(_cut(batch, block))
            table[j][j] = self._kept(book.param_grams(workspace=workspace))
            for i in range(j + 1, len(blocks)):
                table[i][j] = self._against(book, _cut(batch, blocks[i]), workspace)
                table[j][i] = [g.mT for g in table[i][j]]
            del book
        table[-1][-1] = self._alone(_cut(batch, blocks[-1]), workspace)
        return _joined(table)

    def between(self, batch: PyTree, other: PyTree) -> list[Tensor]:
        """`[n, m]`, every sample of one batch with every sample of another."""
        size, workspace = self._plan(batch, other)
        mine = list(_blocks(batch_size(batch), size))
        columns = []
        for theirs in _blocks(batch_size(other, "other"), size):
            book = self._collect(_cut(other, theirs))
            columns.append([self._against(book, _cut(batch, i), workspace) for i in mine])
            del book
        return _joined([list(row) for row in zip(*columns, strict=True)])

    def squares(self, batch: PyTree, beside: PyTree) -> list[Tensor]:
        """`||g_i||^2` of a batch, in the blocks that it has in a Gram matrix beside another."""
        size, _ = self._plan(batch, beside)
        blocks = [self._run(_cut(batch, b), SqNorm()) for b in _blocks(batch_size(batch), size)]
        return [torch.cat(parts) for parts in zip(*blocks, strict=True)]

    def _collect(self, batch: PyTree) -> FactoredGrads:
        return collect(
            self.model_fn,
            self.leaves,
            self.spec,
            batch,
            check=self.check,
            randomness=self.randomness,
        )

    def _alone(self, batch: PyTree, workspace: int) -> list[Tensor]:
        return self._run(batch, Gram(workspace=workspace))

    def _against(self, book: FactoredGrads, batch: PyTree, workspace: int) -> list[Tensor]:
        """`<g_i, g_j>`, i in `batch` and j in `book`."""
        m = len(book.losses)
        readers = [PairReader(bundle, True, m, workspace) for bundle in book.bundles]
        return self._run(batch, Prepared(readers, degree=1))

    def _run(self, batch: PyTree, quantity: Quantity) -> list[Tensor]:
        taken = run(
            self.model_fn,
            self.leaves,
            self.spec,
            batch,
            [quantity],
            check=self.check,
            randomness=self.randomness,
        )
        return self._kept(taken.values[0])

    def _kept(self, grams: list[Tensor]) -> list[Tensor]:
        return grams if self.per_param else [add_up(grams)]

    # --- how large a block ---------------------------------------------------------------------

    def _plan(self, batch: PyTree, other: PyTree | None) -> tuple[int, int]:
        """Samples per block, and elements of a contraction's temporaries."""
        n = max(batch_size(b) for b in (batch, other) if b is not None)
        if self.budget is None:
            return n, cost.BLOCK_ELEMENTS
        itemsize = max(wide(x.new_zeros(())).element_size() for x in self.leaves)
        workspace = self.budget // (4 * _TEMPORARIES * itemsize)
        workspace = max(_SMALLEST_WORKSPACE, min(cost.BLOCK_ELEMENTS, workspace))
        alone, pair = self._needs(batch, other)

        def fits(need: Linear, size: int) -> bool:
            matrices = 2 * len(self.leaves) * size**2 * itemsize
            total = need(size) + _TEMPORARIES * workspace * itemsize + matrices
            return total <= (self.budget or 0)

        if other is None and fits(alone, n):
            return n, workspace
        size = max((b for b in range(1, n + 1) if fits(pair, b)), default=0)
        if not size:
            least = pair(1) + _TEMPORARIES * _SMALLEST_WORKSPACE * itemsize
            raise OptionError(
                f"memory_budget={self.budget:,} bytes is too small: one sample beside another "
                f"takes {least:,}."
            )
        return size, workspace

    def _needs(self, batch: PyTree, other: PyTree | None) -> _Needs:
        """Measured once for a structure and the shapes of a sample."""
        trace_of(self.model_fn, self.leaves, self.spec, batch, randomness=self.randomness)
        theirs = batch if other is None else other
        key = (
            "bytes of Gram blocks",
            tuple(
                (
                    structure(self.model_fn, self.spec, self.leaves, b, self.randomness),
                    shapes_key(take(b, [0])),
                )
                for b in (batch, theirs)
            ),
        )
        remembered = memory(self.model_fn)
        if key not in remembered:
            ones, twos = (self._count(take(batch, [0] * k), take(theirs, [0] * k)) for k in (1, 2))
            remembered[key] = _Needs(*map(line_through, ones, twos))
        needs: _Needs = remembered[key]
        return needs

    def _count(self, batch: PyTree, other: PyTree) -> tuple[int, int]:
        """Bytes at the peak: a block by itself, and one beside the factors of another."""
        self._collect(other)  # so that nothing is traced while bytes are counted
        trusted = replace(self, check="never")
        alone, pair = LiveBytes(), LiveBytes()
        with alone:
            trusted._alone(batch, _SMALLEST_WORKSPACE)
        with pair:
            trusted._against(trusted._collect(other), batch, _SMALLEST_WORKSPACE)
        return alone.peak, pair.peak


class _Needs(NamedTuple):
    """Bytes that blocks take, without the workspace of contractions: a block by itself, and one
    beside the factors of another."""

    alone: Linear
    pair: Linear


def _blocks(n: int, size: int) -> Iterator[range]:
    for start in range(0, n, size):
        yield range(start, min(start + size, n))


def _cut(batch: PyTree, block: range) -> PyTree:
    return batch if len(block) == batch_size(batch) else take(batch, block)


def _joined(table: list[list[list[Tensor]]]) -> list[Tensor]:
    """One matrix per parameter, from a table of blocks of all parameters."""
    rows = [[torch.cat(blocks, 1) for blocks in zip(*row, strict=True)] for row in table]
    return [torch.cat(column) for column in zip(*rows, strict=True)]
