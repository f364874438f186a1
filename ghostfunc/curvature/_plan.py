"""Which way influences are computed, by counted operations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ghostfunc._base.program import Program
from ghostfunc._base.reprs import preformatted
from ghostfunc._base.trees import batch_size
from ghostfunc._base.types import PyTree
from ghostfunc._factors import cost
from ghostfunc._factors.cost import UseShape
from ghostfunc._taps.use_shapes import use_shapes
from ghostfunc.curvature._blocks import Block
from ghostfunc.curvature._operator import EKFAC

Way: TypeAlias = Literal["cheaper", "directions", "rows"]

MOST = 1 << 28
"""Elements of the rows that are held, at most, unless rows are asked for (1 GiB of float32)."""


@dataclass(frozen=True)
class InfluencePlan:
    """How `influence` computes its scores. `print` it.

    Attributes:
        way: "directions" or "rows".
        why: the reason for it.
        n, m: train samples and queries.
        directions, rows: operations of both ways; a pass over an element of memory counts as 32.
            None where they were not counted.
        held: elements of the rows or directions that are held at one time.
    """

    way: str
    why: str
    n: int
    m: int
    directions: int | None
    rows: int | None
    held: int

    def __str__(self) -> str:
        lines = [f"influence of {self.n} samples on {self.m} queries: {self.way}, {self.why}"]
        for name, ops in (("directions", self.directions), ("rows", self.rows)):
            if ops is not None:
                lines.append(f"  {name:10}  {ops:.3e} operations")
        return "\n".join([*lines, f"  held        {self.held:.3e} elements"])

    def _repr_html_(self) -> str:
        return preformatted(self)


@dataclass(frozen=True)
class Side:
    """Samples of one side: how many, and the uses of every parameter by one of them."""

    count: int
    uses: list[list[UseShape]]

    @staticmethod
    def of(program: Program, batch: PyTree) -> Side:
        _, shapes = use_shapes(program, batch, exact=False)
        one = [[UseShape(u.kind, u.shape, 1, u.positions, u.direct) for u in x] for x in shapes]
        return Side(batch_size(batch), one)

    @property
    def run(self) -> int:
        """A sample's forward and backward pass through the products with parameters."""
        return 2 * sum(cost.total_cost(use) for uses in self.uses for use in uses)


def count(curvature: EKFAC, turned: Side, other: Side, at_once: int) -> tuple[int, int]:
    """Operations by directions, and by rows, where the curvature is applied to `turned`."""
    blocks = curvature.blocks
    few, many = turned.count, other.count
    directions = few * (
        turned.run
        + sum(2 * _turn(b) for b in blocks)
        + sum(cost.total_cost(use) for uses in turned.uses for use in uses)
    )
    directions += many * -(-few // at_once) * other.run
    for start in range(0, few, at_once):
        k = min(at_once, few - start)
        directions += many * sum(_dots(use, k) for uses in other.uses for use in uses)
    rows = 0
    for side in (turned, other):
        each = side.run + sum(
            _rotate(block, use)
            for block, uses in zip(blocks, side.uses, strict=True)
            for use in uses
        )
        rows += side.count * each
    k = sum(math.prod(b.shape) for b in blocks)
    return directions, rows + 2 * few * many * k + cost.OPS_PER_ELEMENT * (few + many) * k


def _dots(use: UseShape, k: int) -> int:
    """One sample's dot products with k directions."""
    alone: int = k * cost.dot_choice(use, with_total=False).ops
    if use.kind != "Outer":
        return alone
    p, d = use.matrix
    formed = cost.outer_total(1, use.positions, p, d)
    return min(alone, formed + cost.shared_dots(1, p, d, k, with_total=False))


def _turn(block: Block) -> int:
    """Into the eigenbasis, of a whole gradient."""
    groups, rows, columns = block.sizes
    return 2 * groups * rows * columns * (block.left * rows + block.right * columns)


def _rotate(block: Block, use: UseShape) -> int:
    """One sample's gradient of one use, in the eigenbasis."""
    if use.kind != "Outer":
        return cost.total_cost(use) + _turn(block)
    p, d = use.matrix
    turned = 2 * use.positions * (block.left * p * p + block.right * d * d)
    return turned + cost.outer_total(1, use.positions, p, d) + 2 * cost.OPS_PER_ELEMENT * p * d
