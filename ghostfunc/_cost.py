"""What a contraction costs, in floating-point operations, from shapes alone. No tensors here.

Matrix products are counted as `2 x` the product of their sizes. Passes over memory are counted at
the number of operations a matrix product does in the same time, `PASS` per element: on the CPUs
this was measured on a core does 100-130 GFLOP/s in products and moves about 2 elements a
nanosecond.
"""

from __future__ import annotations

from collections.abc import Iterator

PASS = 32
"""Operations that cost as much as one pass (read or write) over one element."""

CACHE_ELEMENTS = 1 << 19
"""Elements of a temporary that is still at home in a core's cache (2 MiB of float32)."""

BLOCK_ELEMENTS = 1 << 22
"""Elements of the largest temporary block of one sample's gradient (16 MiB of float32)."""


def samples_per_block(n: int, elements_per_sample: int) -> int:
    """How many samples to contract at once so that their temporaries stay in cache."""
    return max(1, min(n, CACHE_ELEMENTS // max(1, elements_per_sample)))


def row_blocks(p: int, d: int) -> Iterator[slice]:
    """Cut the rows of a `[p, d]` gradient into blocks of at most `BLOCK_ELEMENTS`."""
    step = max(1, BLOCK_ELEMENTS // max(1, d))
    for start in range(0, p, step):
        yield slice(start, min(start + step, p))


def outer_total(n: int, t: int, p: int, d: int) -> int:
    """`sum_i g_i` of an outer-product factor."""
    return 2 * n * t * p * d


def outer_dot(n: int, t: int, p: int, d: int) -> int:
    """`<g_i, u>` with a dense direction."""
    return 2 * n * t * p * d + 2 * PASS * n * t * min(p, d)


def outer_pair_dots(n: int, t: int, m: int, s: int, p: int, d: int) -> int:
    """`<g_i, g_j^val>` from factors on both sides."""
    return 2 * (n * t) * (m * s) * (p + d) + 3 * PASS * (n * t) * (m * s)


def share_dot_with_total(n: int, t: int, p: int, d: int) -> bool:
    """Whether dot products should be read off the blocks that make the total gradient.

    That costs a few passes over `n` gradients instead of a second product of `t` terms.
    """
    return 4 * PASS * n * p * d < outer_dot(n, t, p, d)


def gram_is_cheaper(t: int, s: int, p: int, d: int) -> bool:
    """Token Gram matrices (`t x s` inner products) against materialising one sample's gradient."""
    return 2 * t * s * (p + d) < (t + s) * p * d


def direction_is_cheaper_factored(
    uses: list[tuple[int, int]], val_uses: list[tuple[int, int]], p: int, d: int, *, grads: bool
) -> bool:
    """Whether one parameter's validation gradient should stay factored.

    `uses` and `val_uses` hold `(samples, positions)` of every use in train and validation batch.
    Dense, the validation gradient costs its own product and one more per train use (or only
    passes, where the training gradient is formed anyway); factored, every pair of uses meets.
    """
    dense = sum(outer_total(m, s, p, d) for m, s in val_uses)
    for n, t in uses:
        shared = grads and share_dot_with_total(n, t, p, d)
        dense += 4 * PASS * n * p * d if shared else outer_dot(n, t, p, d)
    factored = sum(outer_pair_dots(n, t, m, s, p, d) for n, t in uses for m, s in val_uses)
    return factored < dense
