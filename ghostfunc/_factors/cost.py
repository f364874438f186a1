"""What a contraction costs, in floating-point operations, from shapes alone. No tensors here.

Matrix products are counted as `2 x` the product of their sizes. Passes over memory are counted at
the number of operations a matrix product does in the same time, `OPS_PER_ELEMENT` per element: on
the CPUs this was measured on, a core does 100-130 GFLOP/s in products and moves about 2 elements a
nanosecond.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, TypeAlias

from ghostfunc._base.torch_private import known

OPS_PER_ELEMENT = 32
"""Operations that cost as much as one pass (read or write) over one element: at 2 elements a
nanosecond a core that does 64 operations in that time waits for 32 of them."""

OPS_PER_CACHED_ELEMENT = 20
"""The same for a block that stays in cache, which is read about 1.6 times as fast."""

BFLOAT16_SPEED = 3
"""How many times as fast as in float32 by MKL a matrix product is in bfloat16, where the processor
multiplies it. Every `speed` below is such a ratio."""

CACHE_ELEMENTS = 1 << 19
"""Elements of a temporary that is still at home in a core's cache (2 MiB of float32)."""

BLOCK_ELEMENTS = 1 << 22
"""Elements of the largest temporary block of several gradients (16 MiB of float32)."""

ROWS_ELEMENTS = 1 << 21
"""Elements of a block of one sample's gradient that is read several times (8 MiB of float32)."""


def samples_per_block(n: int, elements_per_sample: int) -> int:
    """How many samples to contract at once so that their temporaries stay in cache."""
    return max(1, min(n, CACHE_ELEMENTS // max(1, known(elements_per_sample))))


def row_blocks(p: int, d: int) -> Iterator[slice]:
    """Cut the rows of a `[p, d]` gradient into equal blocks of at most `ROWS_ELEMENTS`."""
    most = max(1, ROWS_ELEMENTS // max(1, d))
    step = -(-p // -(-p // most)) if p else 1  # few rows make a slow product
    for start in range(0, p, step):
        yield slice(start, min(start + step, p))


def outer_total(n: int, t: int, p: int, d: int) -> int:
    """`sum_i g_i` of an outer-product factor."""
    return 2 * n * t * p * d


@dataclass(frozen=True)
class UseShape:
    """One use of one parameter, seen from outside: what it costs follows from it.

    Attributes:
        kind: type of its factor: "Outer", "OneHot" or "Dense".
        shape: shape of the factor, `(p, d)` for the first two.
        n, positions: samples, and positions per sample.
        direct: the parameter itself, or a mere transpose or cast of it, meets the samples.
    """

    kind: str
    shape: tuple[int, ...]
    n: int
    positions: int
    direct: bool

    @property
    def tokens(self) -> int:
        return self.n * self.positions

    @property
    def size(self) -> int:
        """Elements of the gradient."""
        return prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of an outer product or a table."""
        p, d = self.shape
        return p, d

    @property
    def factorable(self) -> bool:
        """Whether factors of two batches can meet without a gradient being formed."""
        return self.direct and self.kind in ("Outer", "OneHot")


class Choice(NamedTuple):
    """One decision: the way that is taken, and the operations of all ways that were weighed.

    `gf.explain` prints the choices that a run makes, so its numbers are those weighed.

    Attributes:
        way: the way that is taken.
        ops: its operations.
        others: the operations of the ways that are not taken, by name.
    """

    way: str
    ops: int
    others: dict[str, int]


def _cheapest(ways: dict[str, int]) -> Choice:
    """The cheapest way; of equals the first."""
    way = min(ways, key=lambda name: ways[name])
    return Choice(way, ways[way], {k: v for k, v in ways.items() if k != way})


# --- dot products and totals ----------------------------------------------------------------------


def outer_dot(n: int, t: int, p: int, d: int, speed: int = 1) -> int:
    """`<g_i, u>` of an outer-product factor with a dense direction."""
    return 2 * n * t * p * d // speed + 2 * OPS_PER_ELEMENT * n * t * min(p, d)


def total_cost(use: UseShape, speed: int = 1) -> int:
    """`sum_i g_i`, dense."""
    if use.kind == "Outer":
        return outer_total(use.n, use.positions, *use.matrix) // speed
    if use.kind == "OneHot":
        p, d = use.matrix
        return OPS_PER_ELEMENT * (p * d + 2 * use.tokens * d)
    return OPS_PER_ELEMENT * use.n * use.size


def dot_choice(use: UseShape, *, with_total: bool, speed: int = 1) -> Choice:
    """How `<g_i, u>` of one use is read, beyond the total where that is formed too."""
    if use.kind == "OneHot":
        return Choice("looked up", 3 * OPS_PER_ELEMENT * use.tokens * use.matrix[1], {})
    if use.kind != "Outer":
        return Choice("g itself", 2 * use.n * use.size, {})
    p, d = use.matrix
    alone = outer_dot(use.n, use.positions, p, d, speed)
    if not with_total:
        return Choice("product", alone, {})
    beside = shared_dots(use.n, p, d, 1, with_total=True)
    if share_dots(use.n, use.positions, p, d, 1, with_total=True, speed=speed):
        return Choice("beside the gradient", beside, {"product": alone})
    return Choice("product", alone, {"beside the gradient": beside})


def pair_cost(use: UseShape, other: UseShape, speed: int = 1) -> int:
    """`<g_i, g_j>` from the factors of two uses: inner products of all tokens, multiplied."""
    p, d = use.shape
    pairs = use.tokens * other.tokens
    inner = p + d if use.kind == other.kind == "Outer" else d
    return 2 * pairs * inner // speed + 3 * OPS_PER_ELEMENT * pairs


def shared_dots(n: int, p: int, d: int, k: int, *, with_total: bool) -> int:
    """`<g_i, u>` for k directions read off blocks of `g_i`: products of vectors, and a sum that a
    single large product would not have needed. The blocks themselves are not counted."""
    return (2 * k + 3 * with_total) * OPS_PER_CACHED_ELEMENT * n * p * d


def share_dots(n: int, t: int, p: int, d: int, k: int, *, with_total: bool, speed: int = 1) -> bool:
    """Whether `<g_i, u>` for k directions should be read off blocks of `g_i`, formed once: those
    that make the total where it is wanted. Each by itself takes a product of t terms."""
    t = known(t)
    shared = shared_dots(n, p, d, k, with_total=with_total)
    if not with_total:
        shared += outer_total(n, t, p, d) // speed
        if speed > 1:  # one of the factors is copied first
            shared += 2 * OPS_PER_ELEMENT * n * t * p
    return shared < k * outer_dot(n, t, p, d, speed)


def direction_choice(
    ours: Sequence[UseShape], theirs: Sequence[UseShape], *, grads: bool, speed: int = 1
) -> Choice:
    """In which form one parameter's validation gradient is kept, "dense" or "factored".

    Dense, it costs its own total and a dot product at every train use; factored, every train use
    meets every validation use. `grads` says whether the training gradient is formed too.
    """
    dense = sum(total_cost(x, speed) for x in theirs)
    dense += sum(dot_choice(x, with_total=grads, speed=speed).ops for x in ours)
    ways = {"dense": dense}
    if ours and theirs and all(x.factorable for x in (*ours, *theirs)):
        ways["factored"] = sum(pair_cost(x, y, speed) for x in ours for y in theirs)
    return _cheapest(ways)


def keep_direction_factored(
    ours: Sequence[UseShape], theirs: Sequence[UseShape], *, grads: bool, speed: int = 1
) -> bool:
    """Whether one parameter's validation gradient stays factored."""
    return direction_choice(ours, theirs, grads=grads, speed=speed).way == "factored"


# --- norms and Gram matrices ----------------------------------------------------------------------

TOKENS = 128
"""Positions per block of a sample's token Gram matrix; of two equal blocks one is computed."""


class Positions(NamedTuple):
    """Positions per sample of one parameter, added up over its uses, by kind of factor.

    `dense` counts the uses whose gradient is at hand as it is.
    """

    outer: int
    one_hot: int
    dense: int

    @property
    def tokens(self) -> int:
        return self.outer + self.one_hot


def _token_norms(t: Positions, p: int, d: int) -> int:
    """`||g_i||^2` of one sample from inner products of positions."""
    blocks = -(-t.tokens // TOKENS)
    share = (blocks + 1) / (2 * blocks)  # the block matrix is symmetric
    products = 2 * t.tokens**2 * d + 2 * t.outer**2 * p
    return round(share * (products + 6 * OPS_PER_ELEMENT * t.tokens**2))


def norm_choice(t: Positions, p: int, d: int) -> Choice:
    """How `||g_i||^2` of one sample is taken: from inner products of positions ("tokens"), or from
    the gradient itself ("rows")."""
    rows = 2 * t.outer * p * d + OPS_PER_ELEMENT * (2 * p * d + t.one_hot * d)
    ways = {"rows": rows}
    if t.tokens > 0 and not t.dense:
        ways["tokens"] = _token_norms(t, p, d)
    return _cheapest(ways)


def norms_by_tokens(t: Positions, p: int, d: int) -> bool:
    """Whether norms come from inner products of positions rather than from rows."""
    return norm_choice(t, p, d).way == "tokens"


Parts: TypeAlias = Sequence[tuple[int, Positions]]
"""How many samples there are of so many positions, part by part."""


def _all(parts: Parts) -> tuple[int, Positions]:
    """How many samples and positions there are in all."""
    if len(parts) == 1:
        ((n, t),) = parts
        return n, Positions(n * t.outer, n * t.one_hot, n * t.dense)
    n = sum(k for k, _ in parts)
    return n, Positions(*(sum(k * t[kind] for k, t in parts) for kind in range(3)))


def gram_choice(mine: Parts, theirs: Parts, p: int, d: int, *, same: bool) -> Choice:
    """How `<g_i, g_j>` of two batches are taken: from inner products of positions ("tokens"), or
    from blocks of rows ("rows"); `same` if both are one batch."""
    n, t = _all(mine)
    m, s = (n, t) if same else _all(theirs)
    sides = [(n, t)] if same else [(n, t), (m, s)]
    form = sum(2 * x.outer * p * d + OPS_PER_ELEMENT * x.one_hot * d for _, x in sides)
    rows = form + 2 * n * m * p * d + 2 * OPS_PER_ELEMENT * sum(k for k, _ in sides) * p * d
    ways = {"rows": rows}
    pairs = t.tokens * s.tokens
    if not (t.dense or s.dense) and pairs:
        products = 2 * pairs * d + 2 * t.outer * s.outer * p
        ways["tokens"] = products + 6 * OPS_PER_ELEMENT * pairs
    return _cheapest(ways)


def gram_formed(mine: Parts, theirs: Parts, p: int, d: int, *, same: bool) -> int:
    """How many parts, from the first on, are formed for a Gram matrix; the others meet all of them
    by inner products of positions. Of two batches all parts or none."""
    if not same or len(mine) == 1:
        by_tokens = gram_choice(mine, theirs, p, d, same=same).way == "tokens"
        return 0 if by_tokens else len(mine)
    _, t = _all(mine)
    if t.dense:
        return len(mine)
    ops = []
    for k in range(len(mine) + 1):
        m, s = _all(mine[:k])
        rows = 2 * s.outer * p * d + OPS_PER_ELEMENT * s.one_hot * d
        rows += 2 * m * (m + OPS_PER_ELEMENT) * p * d
        tokens = (2 * d + 6 * OPS_PER_ELEMENT) * (t.tokens - s.tokens) * t.tokens
        ops.append(rows + tokens + 2 * (t.outer - s.outer) * t.outer * p)
    return ops.index(min(ops))


# --- squares beside dot products with the sum -----------------------------------------------------

SPREAD_ELEMENTS = 1 << 21
"""Elements of a block of the gradients of all samples: smaller ones are read faster, and their
products are slower."""

SPREAD_ROWS = 64
"""Rows of a block below which a product of positions is slow."""


def spread_choice(n: int, t: Positions, p: int, d: int) -> Choice:
    """How `||g_i||^2` and `<g_i, sum_j g_j>` of n samples are taken beside the sum: off blocks of
    the gradients ("rows"), or one after the other ("apart")."""
    looked_up = 3 * OPS_PER_ELEMENT * t.one_hot * d
    dense = OPS_PER_ELEMENT * p * d if t.dense else 0
    dots = outer_dot(1, t.outer, p, d) + looked_up + 2 * dense
    ways = {"apart": n * (dense + norm_choice(t, p, d).ops + dots)}
    if t.outer + t.dense:
        passes = 4 if t.dense else 5
        ways["rows"] = n * (looked_up + passes * OPS_PER_CACHED_ELEMENT * p * d)
    return _cheapest(ways)


def spread_ways(parts: Parts, p: int, d: int) -> list[str]:
    """The way of `spread_choice` for every part; "tokens" for all where the Gram matrix of all
    samples, from inner products of positions, is cheapest."""
    choices = [spread_choice(n, t, p, d) for n, t in parts]
    _, t = _all(parts)
    products = 2 * t.tokens**2 * d + 2 * t.outer**2 * p
    gram = products + 6 * OPS_PER_ELEMENT * t.tokens**2
    if t.tokens > 0 and not t.dense and gram < sum(choice.ops for choice in choices):
        return ["tokens"] * len(parts)
    return [choice.way for choice in choices]


def spread_rows(n: int, p: int, d: int) -> int:
    """How many rows of n gradients to form at one time: as many as stay in cache, but not so few
    that their products are slow."""
    fits, most = SPREAD_ELEMENTS // (n * d), BLOCK_ELEMENTS // (n * d)
    step = max(1, fits, min(SPREAD_ROWS, most))
    return -(-p // -(-p // step))
