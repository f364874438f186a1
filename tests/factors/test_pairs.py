"""Bundles of factors against the gradients they stand for, by either way and in any blocks."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ghostfunc._factors import bundles, cost, extreme_norms, pairs
from ghostfunc._factors.contract import materialize
from ghostfunc._factors.factor import Dense, Factor, Grouped, OneHot, Outer

P, D = 7, 3


def factor(kind: str, n: int, t: int, seed: int) -> Factor:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    match kind:
        case "outer":
            return Outer(normal(n, t, P), normal(n, t, D))
        case "one-hot":
            return OneHot(torch.randint(P, (n, t), generator=g), normal(n, t, D), P)
        case "dense":
            return Dense(normal(n, P, D))
        case "flat":
            return Dense(normal(n, P * D))
        case "grouped":
            return Grouped(normal(n, P, t, 1), normal(n, P, t, D))
    raise ValueError(kind)


def bundle(kinds: tuple[str, ...], n: int, seed: int) -> list[Factor]:
    return [factor(kind, n, 4 + i, seed + i) for i, kind in enumerate(kinds)]


def formed(factors: list[Factor]) -> Tensor:
    n = bundles.samples(factors)
    return sum(materialize(f).reshape(n, -1) for f in factors)


BUNDLES = [
    *itertools.chain.from_iterable(
        itertools.combinations(("outer", "one-hot", "dense", "flat", "grouped"), r)
        for r in (1, 2, 3, 5)
    ),
    ("outer", "outer"),
    ("one-hot", "one-hot", "outer", "outer"),
    ("grouped", "grouped"),
]


@pytest.fixture(params=["tokens", "rows", "both"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether costs say tokens or rows, or rows for the first part; by rows goes what cannot go by
    tokens."""

    def norms(t: cost.Positions, *args: object) -> bool:
        return request.param != "rows" and not t.dense

    def gram(mine: cost.Parts, theirs: cost.Parts, *_: int, same: bool) -> int:
        if request.param == "rows" or any(t.dense for _, t in (*mine, *theirs)):
            return len(mine)
        return 1 if request.param == "both" and same else 0

    monkeypatch.setattr(cost, "norms_by_tokens", norms)
    monkeypatch.setattr(cost, "gram_formed", gram)
    monkeypatch.setattr(cost, "TOKENS", 3)
    return request.param


@pytest.mark.parametrize("workspace", [1, 17, 200, 10**6])
@pytest.mark.parametrize("kinds", BUNDLES, ids="+".join)
def test_norms_and_grams(kinds: tuple[str, ...], workspace: int, way: str) -> None:
    mine = bundle(kinds, 3, seed=0)
    g = formed(mine)
    assert_close(pairs.sqnorms(mine, workspace=workspace), g.square().sum(1))
    assert_close(extreme_norms.norms(mine), g.norm(dim=1))
    gram = pairs.gram(mine, workspace=workspace)
    assert_close(gram, g @ g.mT)
    assert torch.equal(gram, gram.mT)
    for theirs in (bundle(kinds, 2, seed=9), [factor("one-hot", 2, 5, 9)]):
        assert_close(pairs.gram(mine, theirs, workspace=workspace), g @ formed(theirs).mT)


@pytest.mark.parametrize("workspace", [17, 10**6])
@pytest.mark.parametrize("kinds", BUNDLES, ids="+".join)
def test_grams_of_parts(kinds: tuple[str, ...], workspace: int, way: str) -> None:
    """As those of all samples side by side, whichever of two batches comes in parts."""
    parts = [bundle(kinds, n, seed=n) for n in (3, 1, 2)]
    g = torch.cat(list(map(formed, parts)))
    gram = pairs.gram_of_parts(parts, workspace=workspace)
    assert_close(gram, g @ g.mT)
    assert torch.equal(gram, gram.mT)
    theirs = bundle(kinds, 2, seed=9)
    beside = pairs.gram_of_parts(parts, [theirs], workspace=workspace)
    assert_close(beside, g @ formed(theirs).mT)
    assert_close(pairs.gram_of_parts([theirs], parts, workspace=workspace), beside.mT)


@pytest.mark.parametrize("kinds", BUNDLES, ids="+".join)
def test_weighted_totals_and_pooling(kinds: tuple[str, ...]) -> None:
    mine = bundle(kinds, 4, seed=0)
    g = formed(mine)
    weights = torch.tensor([0.5, 0.0, -2.0, 1.0], dtype=torch.float64)
    assert_close(bundles.weighted_total(mine, weights).flatten(), weights @ g)
    assert_close(formed([bundles.pooled(f) for f in mine]), g.sum(0, keepdim=True))


def test_products_smaller_than_their_sum_are_one() -> None:
    draw = partial(torch.randn, dtype=torch.float64)
    small = [Outer(draw(n, 1, 20), draw(n, 1, 30)) for n in (2, 3, 4)]
    others: list[Factor] = [
        OneHot(torch.randint(20, (2, 5)), draw(2, 5, 30), 20),
        Dense(draw(3, 20, 30)),
    ]
    mine = [small[0], others[0], *small[1:], others[1]]
    assert len(bundles._few_products(mine)) == 3
    expected = sum(materialize(f).sum(0) for f in mine)
    assert_close(bundles.summed(mine), expected)


def test_weight_zero_leaves_a_poisoned_sample_out() -> None:
    left, right = torch.randn(3, 4, P), torch.randn(3, 4, D)
    left[1], right[1] = torch.nan, torch.inf
    weights = torch.tensor([1.0, 0.0, 2.0])
    total = bundles.weighted_total([Outer(left, right)], weights)
    assert_close(total, left[0].mT @ right[0] + 2 * left[2].mT @ right[2])
    assert not bundles.weighted_total([Outer(left, right)], torch.zeros(3)).any()


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30], ids=str)
@pytest.mark.parametrize("kinds", BUNDLES, ids="+".join)
def test_norms_beyond_the_range_of_squares(kinds: tuple[str, ...], scale: float) -> None:
    mine = bundle(kinds, 3, seed=0)
    extreme = [in_float32(f, scale) for f in mine]
    norms = extreme_norms.norms(extreme)
    assert_close(norms, scale * formed(mine).norm(dim=1), rtol=1e-5, atol=0)


def in_float32(f: Factor, scale: float) -> Factor:
    match f:
        case Outer(left, right) | Grouped(left, right):
            return type(f)(left.float(), right.float() * scale)
        case OneHot(ids, b, size):
            return OneHot(ids, b.float() * scale, size)
        case Dense(g):
            return Dense(g.float() * scale)


def test_joint_norms() -> None:
    norms = torch.tensor([[3e30, 0.0, 3e-30, torch.inf, torch.nan], [4e30, 0.0, 4e-30, 1.0, 1.0]])
    joint = extreme_norms.joint(norms)
    assert_close(joint[:3], torch.tensor([5e30, 0.0, 5e-30]))
    assert joint[3] == torch.inf
    assert joint[4].isnan()


def test_extremes() -> None:
    squares = torch.tensor([1.0, 0.0, 1e-35, torch.inf, torch.nan, 1e30])
    assert extreme_norms.extremes(squares).tolist() == [False, False, True, True, True, False]


@pytest.mark.parametrize("t", [cost.Positions(9, 0, 0), cost.Positions(3, 4, 0)])
def test_choice_by_cost(t: cost.Positions) -> None:
    """Few positions and a large parameter go by tokens; many positions and a small one by rows."""
    assert cost.norms_by_tokens(t, 500, 500)
    assert not cost.norms_by_tokens(cost.Positions(4000, 0, 0), 16, 16)
    assert cost.gram_formed([(2, t)], [(2, t)], 5000, 5000, same=True) == 0
    assert cost.gram_formed([(99, t)], [(99, t)], 4, 4, same=True) == 1
    parts = [(4, cost.Positions(200, 0, 0)), (4, t)]
    assert cost.gram_formed(parts, parts, 500, 500, same=True) == 1
    dense = cost.Positions(1, 0, 1)
    assert not cost.norms_by_tokens(dense, 10**6, 10**6)
    assert cost.gram_formed([(1, t)], [(1, dense)], 10**6, 10**6, same=False) == 1
