"""Gradients kept as factors answer every question that gradients themselves would."""

from __future__ import annotations

import pytest
import torch
from compare import assert_close, leaves_of, random_direction, sample_grads
from problems import Problem

import ghostfunc as gf


def test_a_book(problem: Problem) -> None:
    fn, params = problem.model_fn, problem.params
    batch, other = problem.batch(4, t=4), problem.batch(2, t=3, seed=1)
    grads, others = sample_grads(problem, batch), sample_grads(problem, other)
    wide = [(g.float() if g.dtype == torch.bfloat16 else g).reshape(4, -1) for g in grads]
    theirs = [(g.float() if g.dtype == torch.bfloat16 else g).reshape(2, -1) for g in others]
    book, second = gf.factored_grads(fn, params, batch), gf.factored_grads(fn, params, other)
    with torch.no_grad():
        assert_close(book.losses, fn(params, batch), problem.tolerance)
    each = [x.norm(dim=1) for x in wide]
    assert_close(book.norms(per_param=True), each, problem.tolerance)
    assert_close(book.norms(), torch.stack(each).norm(dim=0), problem.tolerance)
    u = random_direction(params)
    dots = [x @ v.to(x.dtype).flatten() for x, v in zip(wide, leaves_of(u), strict=True)]
    assert_close(book.dot_prods(u, per_param=True), dots, problem.tolerance)
    assert_close(book.dot_prods(u), sum(dots), problem.tolerance)
    grams = [x @ x.mT for x in wide]
    assert_close(book.gram(per_param=True), grams, problem.tolerance)
    assert_close(book.gram(), sum(grams), problem.tolerance)
    between = [x @ y.mT for x, y in zip(wide, theirs, strict=True)]
    assert_close(book.gram(second, per_param=True), between, problem.tolerance)
    weights = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
    sums = [
        (weights.to(x.dtype) @ x).reshape(g.shape[1:]).to(g.dtype)
        for x, g in zip(wide, grads, strict=True)
    ]
    assert_close(book.weighted_sum(weights), sums, problem.tolerance)


def test_choose_then_sum_is_the_gradient_of_the_chosen(problem: Problem) -> None:
    fn, params = problem.model_fn, problem.params
    batch = problem.batch(5, t=4)
    book = gf.factored_grads(fn, params, batch)
    chosen = gf.select.greats(book.dot_prods(params), book.gram(), 2, step=0.01)
    grads = book.weighted_sum(gf.select.uniform_weights(chosen, 5))
    rows = [
        g[chosen].float() if g.dtype == torch.bfloat16 else g[chosen]
        for g in sample_grads(problem, batch)
    ]
    expected = [r.mean(0).to(p.dtype) for r, p in zip(rows, leaves_of(params), strict=True)]
    assert_close(grads, expected, max(problem.tolerance, 1e-7))


def test_a_direction_of_another_shape_is_refused() -> None:
    params = {"w": torch.randn(3, 2)}
    book = gf.factored_grads(lambda p, x: (x @ p["w"]).sum(1), params, torch.randn(2, 3))
    with pytest.raises(gf.ParamsError, match="direction"):
        book.dot_prods({"w": torch.randn(2, 3)})
    with pytest.raises(gf.OptionError, match=r"shape \[2\]"):
        book.weighted_sum(torch.ones(3))
    with pytest.raises(gf.OptionError, match="finite"):
        book.weighted_sum(torch.tensor([1.0, torch.inf]))
