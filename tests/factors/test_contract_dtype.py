"""`contract_dtype` rounds what it says it rounds, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import assert_close, leaves_of, random_direction
from problems import CASES, Problem, energy, features, sequences, tokens, weights
from torch import Tensor

import ghostfunc as gf
from ghostfunc._factors import beside_total, cost, pairs
from ghostfunc._factors.factor import Dense, Factor, Grouped, OneHot, Outer
from ghostfunc._factors.matmul import matmul

TYPES = (torch.bfloat16, torch.float16)
types = pytest.mark.parametrize("dtype", TYPES, ids=str)
LARGEST = {torch.bfloat16: 2e-2, torch.float16: 2e-3}


def error(actual: Any, exact: Any) -> float:
    """The largest difference, relative to the largest value."""
    got, want = leaves_of(actual), leaves_of(exact)
    assert [x.dtype for x in got] == [x.dtype for x in want]
    scale = max(float(x.abs().max()) for x in want)
    return max(float((a - e).abs().max()) for a, e in zip(got, want, strict=True)) / scale


def projected(kind: str) -> Callable[..., Any]:
    def call(p: Problem, train: Any, val: Any, **options: Any) -> Any:
        projection = gf.kronecker_projection(p.params, rank_total=6, rank_min=2, kind=kind, seed=0)
        return gf.ghost_project(p.model_fn, p.params, train, projection, **options)

    return call


def several(p: Problem, train: Any, val: Any, **options: Any) -> Any:
    quantities = {"dot": gf.Dot(random_direction(p.params)), "gram": gf.Gram()}
    return gf.ghost_vjp(p.model_fn, p.params, train, quantities, **options).values


CALLS: dict[str, Callable[..., Any]] = {
    "dot": lambda p, x, y, **o: gf.ghost_dot_prod(p.model_fn, p.params, x, y, **o),
    "pairs": lambda p, x, y, **o: gf.ghost_dot_prod(
        p.model_fn, p.params, x, y, reduction="none", **o
    ),
    "along": lambda p, x, y, **o: gf.ghost_dot_prod(
        p.model_fn, p.params, x, direction=random_direction(p.params), **o
    ),
    "step": lambda p, x, y, **o: gf.ghost_value_and_grad(p.model_fn, p.params, x, y, **o).dot_prods,
    "two": lambda p, x, y, **o: gf.ghost_dot_prod(
        p.model_fn, p.params, x, direction={k: random_direction(p.params, k) for k in (0, 1)}, **o
    ),
    "norm": lambda p, x, y, **o: gf.ghost_norm(p.model_fn, p.params, x, **o),
    "cosine": lambda p, x, y, **o: gf.ghost_cosine(p.model_fn, p.params, x, y, **o),
    "project": projected("gaussian"),
    "project-dense": projected("dense"),
    "several": several,
}
calls = pytest.mark.parametrize("call", CALLS)


def two_batches(p: Problem) -> tuple[Any, Any]:
    return p.batch(5, 6), p.batch(3, 4, seed=1)


@types
@calls
@pytest.mark.parametrize("case", ["tied_lm", "mlp_on_sequences", "lora"])
def test_scores_are_rounded_a_little(case: str, call: str, dtype: torch.dtype) -> None:
    problem = CASES[case]()
    args = problem, *two_batches(problem)
    exact = CALLS[call](*args)
    # LoRA's gradients are formed before their norms are taken, and its dot products are read off
    # the training gradient: there is no product to round.
    least = -1.0 if case == "lora" and call in ("norm", "step") else 1e-8
    assert least < error(CALLS[call](*args, contract_dtype=dtype), exact) < LARGEST[dtype]
    assert error(CALLS[call](*args, contract_dtype=None), exact) == 0


def test_losses_and_training_gradient_stay_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = CASES["tied_lm"]()
    train, val = two_batches(problem)
    args = problem.model_fn, problem.params, train
    u = gf.direction(*args[:2], val)
    exact = gf.ghost_value_and_grad(*args, val)
    for given in ({"val": val}, {"direction": u}):
        for shares in (True, False):
            monkeypatch.setattr(cost, "share_dots", lambda *_, shares=shares, **__: shares)
            step = gf.ghost_value_and_grad(*args, **given, contract_dtype=torch.bfloat16)
            assert_close([step.losses, step.grads], [exact.losses, exact.grads], 1e-12)
            # What is read off the exact gradient along an exact direction is exact too.
            off = error(step.dot_prods, exact.dot_prods)
            assert off < 1e-12 if shares and "direction" in given else off > 1e-8


@pytest.mark.parametrize("with_total", [True, False])
def test_several_directions_at_once(with_total: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    factor, us = Outer(normal(3, 5, 8), normal(3, 5, 6)), [normal(8, 6), normal(8, 6)]
    for shares in (True, False):
        monkeypatch.setattr(cost, "share_dots", lambda *_, shares=shares, **__: shares)
        exact, total = beside_total.dots_and_total(factor, us, with_total=with_total)
        dots, same = beside_total.dots_and_total(
            factor, us, with_total=with_total, contract_dtype=torch.bfloat16
        )
        off = error(dots, exact)
        assert off < 1e-12 if shares and with_total else 1e-8 < off < LARGEST[torch.bfloat16]
        if with_total:
            assert_close(same, total, 1e-12)


@types
@pytest.mark.parametrize("case", ["conv1d_of_gpt2", "weight_and_its_transpose", "cast_up", "lora"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_dense_direction_is_rounded_too(
    case: str, reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation gradient of transposes and casts, and of what is derived by other ways."""
    monkeypatch.setattr(cost, "keep_direction_factored", lambda *_, **__: False)
    problem = CASES[case]()
    args = problem, *two_batches(problem)
    exact = CALLS["dot"](*args, reduction=reduction)
    got = CALLS["dot"](*args, reduction=reduction, contract_dtype=dtype)
    assert 1e-8 < error(got, exact) < LARGEST[dtype]


def test_nothing_but_matrix_products_is_rounded() -> None:
    """Elementwise parameters, biases, and the look-ups of a table."""

    def model_fn(p: Any, ids: Tensor) -> Tensor:
        return energy(torch.nn.functional.embedding(ids, p["table"]) * p["scale"] + p["bias"])

    problem = Problem(model_fn, weights(table=(7, 3), scale=(3,), bias=(3,)), tokens(7))
    args = problem, *two_batches(problem)
    rounded = CALLS["along"](*args, contract_dtype=torch.bfloat16)
    assert torch.equal(rounded, CALLS["along"](*args))


@pytest.mark.parametrize("scale", [1e-7, 1e7])
def test_float16_has_few_exponents_but_enough(scale: float) -> None:
    """Products whose operands float16 cannot hold, in all of their rows or in some."""
    x, y = torch.randn(4, 5, 30), torch.randn(4, 30, 6)
    x[:, 0] *= scale
    y[..., 1] *= scale
    got, want = matmul(x * scale, y, torch.float16), x * scale @ y
    assert bool(((got - want).abs() <= 1e-2 * want.abs().amax((0,), keepdim=True)).all())
    assert torch.equal(matmul(0 * x, y, torch.float16), torch.zeros(4, 5, 6))
    ones = torch.ones(1, 1 << 17)  # a sum that float16 cannot hold either
    assert matmul(ones, ones.mT, torch.float16).item() == pytest.approx(1 << 17, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_it_a_product_is_that_of_torch(dtype: torch.dtype) -> None:
    x, y = torch.randn(5, 7).to(dtype), torch.randn(7, 3).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(matmul(x, y), x.to(wide) @ y.to(wide))
    assert {matmul(x, y, t).dtype for t in TYPES} == {wide}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@types
@pytest.mark.parametrize("by_tokens", [True, False])
def test_norms_and_grams_by_either_way(
    by_tokens: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def norms(t: cost.Positions, *_: int) -> bool:
        return by_tokens and not t.dense

    def grams(mine: cost.Parts, theirs: cost.Parts, *_: int, same: bool) -> int:
        return 0 if by_tokens and not any(t.dense for _, t in (*mine, *theirs)) else len(mine)

    monkeypatch.setattr(cost, "norms_by_tokens", norms)
    monkeypatch.setattr(cost, "gram_formed", grams)
    outer = Outer(normal(3, 5, 8), normal(3, 5, 6))
    one_hot = OneHot(torch.randint(8, (3, 4)), normal(3, 4, 6), 8)
    bundles: list[list[Factor]] = [
        [outer],
        [outer, one_hot],
        [one_hot, one_hot],
        [outer, Dense(normal(3, 8, 6))],
        [Grouped(normal(3, 2, 5, 4), normal(3, 2, 5, 6))],
    ]
    for bundle in bundles:
        for read in (pairs.sqnorms, pairs.gram):
            assert error(read(bundle, contract_dtype=dtype), read(bundle)) < LARGEST[dtype]
    assert error(pairs.sqnorms([outer], contract_dtype=dtype), pairs.sqnorms([outer])) > 0


def linear(p: Any, x: Tensor) -> Tensor:
    return energy(x @ p["w"])


def a_linear_layer() -> Problem:
    return Problem(linear, weights(w=(4, 3)), features(4))


@calls
def test_a_dtype_that_is_none(call: str) -> None:
    problem = CASES["mlp"]()
    for dtype in (torch.float64, torch.int8, "bfloat16"):
        with pytest.raises(gf.OptionError, match=r"contract_dtype=.*torch\.bfloat16, torch\.float"):
            CALLS[call](problem, *two_batches(problem), contract_dtype=dtype)


@pytest.mark.parametrize(
    ("call", "mode"),
    [
        *((call, "materialized") for call in ("dot", "step", "norm", "cosine", "project")),
        ("dot", "jvp"),
        ("step", "jvp"),
    ],
)
def test_other_modes_contract_nothing(call: str, mode: str) -> None:
    problem = a_linear_layer()
    with pytest.raises(gf.OptionError, match=r'contracts none.*mode="ghost"'):
        CALLS[call](problem, *two_batches(problem), mode=mode, contract_dtype=torch.bfloat16)


def test_positions_are_not_rounded() -> None:
    problem = Problem(linear, weights(w=(4, 3)), sequences(4))
    with pytest.raises(gf.OptionError, match="per_position=True needs contract_dtype=None"):
        CALLS["dot"](
            problem, *two_batches(problem), per_position=True, contract_dtype=torch.bfloat16
        )


def test_a_quantity_that_cannot_be_rounded() -> None:
    problem = a_linear_layer()
    with pytest.raises(gf.OptionError, match="SampleGrad has no contract_dtype"):
        gf.ghost_vjp(
            linear,
            problem.params,
            problem.batch(3),
            {"g": gf.SampleGrad(), "dot": gf.Dot(problem.params)},
            contract_dtype=torch.bfloat16,
        )
    dot = gf.Dot(problem.params)
    gf.ghost_vjp(linear, problem.params, problem.batch(3), dot, contract_dtype=torch.bfloat16)
    assert dot.contract_dtype is None, "a quantity is not changed by the call that it is given to"


def test_verify_measures_it() -> None:
    problem = CASES["mlp_on_sequences"]()
    args = problem.model_fn, problem.params, *two_batches(problem)
    report = gf.verify(*args, contract_dtype=torch.bfloat16)
    assert report.ok
    assert 1e-6 < report.max_error < 2e-2
    assert "contractions in torch.bfloat16: within a tolerance of 5.0e-02" in str(report)
    tight = gf.verify(*args, contract_dtype=torch.bfloat16, tolerance=1e-6)
    assert not tight.ok
    assert "NOT WITHIN a tolerance of 1.0e-06" in str(tight)
    assert "exact to a tolerance of 1.0e-10" in str(gf.verify(*args))


def test_compiled() -> None:
    problem = Problem(linear, weights(w=(4, 3)), sequences(4))
    args = problem.model_fn, problem.params, *two_batches(problem)

    def step(p: Any, train: Any, val: Any) -> Any:
        return gf.ghost_value_and_grad(linear, p, train, val, contract_dtype=torch.bfloat16)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*args[1:])
    assert_close(compiled.dot_prods, step(*args[1:]).dot_prods, 1e-10)
    assert error(compiled.dot_prods, gf.ghost_value_and_grad(*args).dot_prods) > 1e-8
