"""Norms, Gram matrices and cosines against materialized gradients, on every problem."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, leaves_of, sample_grads
from problems import CASES, Problem
from torch import Tensor

import ghostfunc as gf

SIZES = {
    "T_is_n": {"n": 4, "t": 4},
    "T_is_a_multiple_of_n": {"n": 2, "t": 4},
    "one_sample": {"n": 1, "t": 3},
}


def rows(problem: Problem, batch: Any) -> list[Tensor]:
    """Per-sample gradients, `[n, elements]` per parameter."""
    grads = sample_grads(problem, batch)
    return [(g.float() if g.dtype == torch.bfloat16 else g).reshape(len(g), -1) for g in grads]


@pytest.fixture(params=SIZES.values(), ids=SIZES)
def batch(request: pytest.FixtureRequest, problem: Problem) -> Any:
    return problem.batch(**request.param)


@pytest.fixture(params=["ghost", "materialized"])
def mode(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"mode": request.param, "vectorize": False}


def test_norm(problem: Problem, batch: Any, mode: dict[str, Any]) -> None:
    g = rows(problem, batch)
    norms = gf.ghost_norm(problem.model_fn, problem.params, batch, **mode)
    assert_close(norms, torch.cat(g, 1).norm(dim=1), problem.tolerance)
    each = gf.ghost_norm(problem.model_fn, problem.params, batch, per_param=True, **mode)
    assert_close(each, [x.norm(dim=1) for x in g], problem.tolerance)


def test_gram(problem: Problem, batch: Any, mode: dict[str, Any]) -> None:
    g = rows(problem, batch)
    gram = gf.ghost_gram(problem.model_fn, problem.params, batch, **mode)
    assert_close(gram, sum(x @ x.mT for x in g), problem.tolerance)
    assert torch.equal(gram, gram.mT)
    eigenvalues = torch.linalg.eigvalsh(gram.double())
    assert eigenvalues.min() >= -problem.tolerance * eigenvalues.max()
    norms = gf.ghost_norm(problem.model_fn, problem.params, batch, **mode)
    assert_close(gram.diagonal(), norms.square(), problem.tolerance)
    each = gf.ghost_gram(problem.model_fn, problem.params, batch, per_param=True, **mode)
    assert_close(each, [x @ x.mT for x in g], problem.tolerance)
    cosines = gf.ghost_gram(problem.model_fn, problem.params, batch, normalize=True, **mode)
    unit = F.normalize(torch.cat(g, 1))
    assert_close(cosines, unit @ unit.mT, problem.tolerance)


def test_gram_with_another_batch(problem: Problem, mode: dict[str, Any]) -> None:
    batch, other = problem.batch(3, t=4), problem.batch(2, t=5, seed=1)
    g, h = rows(problem, batch), rows(problem, other)
    fn, params = problem.model_fn, problem.params
    gram = gf.ghost_gram(fn, params, batch, other, **mode)
    assert_close(gram, sum(x @ y.mT for x, y in zip(g, h, strict=True)), problem.tolerance)
    each = gf.ghost_gram(fn, params, batch, other, per_param=True, **mode)
    assert_close(each, [x @ y.mT for x, y in zip(g, h, strict=True)], problem.tolerance)
    cosines = gf.ghost_gram(fn, params, batch, other, normalize=True, **mode)
    units = [F.normalize(torch.cat(x, 1)) for x in (g, h)]
    assert_close(cosines, units[0] @ units[1].mT, problem.tolerance)


def test_cosines_of_parameters() -> None:
    problem = CASES["tied_lm"]()
    batch, other = problem.batch(3), problem.batch(2, t=5, seed=1)
    g, h = rows(problem, batch), rows(problem, other)
    fn, params = problem.model_fn, problem.params
    book, others = (gf.factored_grads(fn, params, b) for b in (batch, other))
    u = gf.direction(fn, params, other)
    for theirs, options in (([*h], (other,)), ([*g], ())):
        expected = [F.normalize(x) @ F.normalize(y).mT for x, y in zip(g, theirs, strict=True)]
        each = gf.ghost_gram(fn, params, batch, *options, per_param=True, normalize=True)
        assert_close(each, expected, 1e-10)
        second = (others,) if options else ()
        assert_close(book.gram(*second, per_param=True, normalize=True), expected, 1e-10)
        whole = gf.ghost_gram(fn, params, batch, *options, normalize=True)
        assert_close(book.gram(*second, normalize=True), whole, 1e-10)
    cosines = gf.ghost_cosine(fn, params, batch, direction=u)
    assert_close(book.dot_prods(u, normalize=True), cosines, 1e-10)
    each = gf.ghost_cosine(fn, params, batch, direction=u, per_param=True)
    assert_close(book.dot_prods(u, per_param=True, normalize=True), each, 1e-10)
    with pytest.raises(gf.OptionError, match="norms come from a run of their own"):
        gf.ghost_gram(fn, params, batch, other, normalize=True, randomness="different")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cosine(problem: Problem, reduction: str, mode: dict[str, Any]) -> None:
    train, val = problem.batch(3, t=4), problem.batch(2, t=5, seed=1)
    g, h = rows(problem, train), rows(problem, val)

    def cosine(x: Tensor, y: Tensor) -> Tensor:
        if reduction != "none":
            return F.cosine_similarity(x, y.mean(0, keepdim=True))
        return F.cosine_similarity(x[:, None], y[None], dim=2)

    fn, params = problem.model_fn, problem.params
    cosines = gf.ghost_cosine(fn, params, train, val, reduction=reduction, **mode)
    assert_close(cosines, cosine(torch.cat(g, 1), torch.cat(h, 1)), problem.tolerance)
    each = gf.ghost_cosine(fn, params, train, val, reduction=reduction, per_param=True, **mode)
    expected = [cosine(x, y) for x, y in zip(g, h, strict=True)]
    # A gradient that is zero but for rounding has any direction.
    noise = 1e-8 * torch.cat(g, 1).norm()
    for got, want, x in zip(leaves_of(each), expected, g, strict=True):
        if x.norm(dim=1).min() > noise or not x.any():
            assert_close(got, want, max(problem.tolerance, 1e-8))


@pytest.mark.parametrize("per_param", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_cosines_of_gradients_whose_squares_underflow(
    per_param: bool, chunk_size: int | None
) -> None:
    """One sample's gradient is tiny, and another's is zero beside a loss that is not."""
    torch.manual_seed(0)
    params = {"w": torch.randn(3, 2), "b": torch.randn(2)}
    x, size = torch.randn(4, 3), torch.tensor([1.0, 1e-24, 1.0, 0.0])

    def model_fn(p: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return (batch["x"] @ p["w"] + p["b"]).tanh().sum(1) * batch["size"] + 1

    def cosines(size: Tensor, dtype: torch.dtype) -> Any:
        batch = {"x": x.to(dtype), "size": size.to(dtype)}
        p = {k: v.to(dtype) for k, v in params.items()}
        return gf.ghost_gram(
            model_fn, p, batch, normalize=True, per_param=per_param, chunk_size=chunk_size
        )

    found = leaves_of(cosines(size, torch.float32))
    for mine, exact in zip(found, leaves_of(cosines(size, torch.float64)), strict=True):
        told = mine.isfinite()
        assert_close(mine[told].double(), exact[told], 1e-6)
        assert told[[0, 2, 3]][:, [0, 2, 3]].all()
        assert not mine[1, 1].isfinite()  # and not zero
        assert (mine[3] == 0).all()
