"""Parts of a batch: every sample once, in other company, at the cost of one pass."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ghostfunc._base.company import PARTS, in_parts

SIZES = [*range(1, 14), 40]


def together(n: int, chosen: list[int]) -> float:
    """The share of pairs of samples that are in one part."""
    order = np.random.default_rng(n).permutation(n).tolist()
    parts = in_parts(order, None, chosen)
    own = [[i for i, counts in zip(*part, strict=True) if counts] for part in parts]
    return sum(len(x) * (len(x) - 1) for x in own) / (n * (n - 1))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("few", [0, 1, 2])
def test_every_sample_counts_once(n: int, few: int) -> None:
    order = np.random.default_rng(n).permutation(n).tolist()
    parts = in_parts(order, None, order[:few])
    own = [i for rows, counts in parts for i, c in zip(rows, counts, strict=True) if c]
    assert sorted(own) == list(range(n))
    assert all(list(part.rows) == sorted(part.rows) for part in parts)
    assert all(len(part.rows) > 1 for part in parts) or n == 1
    assert sum(len(part.rows) for part in parts) == max(n, min(2 * n, 2 * PARTS) if n > 1 else 1)
    if n >= 2 * PARTS and few == 2:
        assert parts[0].rows == sorted(order[:2])


@pytest.mark.parametrize("n", [x for x in SIZES if x > 1])
def test_no_more_pairs_stay_together_than_in_halves_and_two_alone(n: int) -> None:
    """Two samples are in one of two halves, and neither or both of them are the two."""
    k, rest = n // 2, n - 2
    same_half = (k * (k - 1) + (n - k) * (n - k - 1)) / (n * (n - 1))
    neither_or_both = (2 + rest * (rest - 1)) / (n * (n - 1))
    assert together(n, [0, 1]) <= same_half * neither_or_both


def test_samples_apart_are_by_themselves() -> None:
    parts = in_parts(range(9), None, [3, 4], apart=[4, 7])
    assert [part.rows for part in parts[:2]] == [[4, 4], [7, 7]]
    others = [i for part in parts[2:] for i, c in zip(*part, strict=True) if c]
    assert sorted(others) == [0, 1, 2, 3, 5, 6, 8]
    assert not any(set(a.rows) & set(b.rows) for a, b in itertools.combinations(parts, 2))
