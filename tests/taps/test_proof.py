"""Runs are held against plain autograd where something about them is new, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import assert_close, gram, sample_grads
from problems import Problem, energy, sequences, weights
from torch import Tensor

import ghostfunc as gf
from ghostfunc._factors.factor import Outer
from ghostfunc._rules.registry import RULES, FactorRule
from ghostfunc._trace.layout import Layout


class Counted:
    """A model function, and the numbers of samples that it was called on."""

    def __init__(self, f: Callable[[Any, Any], Tensor]) -> None:
        self.calls: list[int] = []
        self._f = f

    def __call__(self, params: Any, batch: Any) -> Tensor:
        self.calls.append(len(batch))
        return self._f(params, batch)

    def during(self, ask: Callable[[], Any]) -> list[int]:
        self.calls.clear()
        ask()
        return list(self.calls)


def linear(p: Any, x: Tensor) -> Tensor:
    return energy(torch.tanh(x @ p["w"]))


def choosing(p: Any, x: Tensor) -> Tensor:
    """All samples are chosen, which an op that chooses does not say."""
    return energy(torch.tanh(x[x[:, 0, 0] < 100] @ p["w"]))


def problem_of(f: Callable[[Any, Any], Tensor]) -> tuple[Counted, Problem]:
    counted = Counted(f)
    return counted, Problem(counted, weights(w=(4, 6)), sequences(4))


def norm(problem: Problem, n: int, t: int, **options: Any) -> Callable[[], Tensor]:
    batch = problem.batch(n, t)
    return lambda: gf.ghost_norm(problem.model_fn, problem.params, batch, **options)


def test_what_is_known_costs_nothing() -> None:
    counted, problem = problem_of(linear)
    norm(problem, 4, 3)()
    assert counted.during(norm(problem, 4, 3)) == [4]
    # Two passes more, the second in parts.
    assert counted.during(norm(problem, 8, 3)) == [8, 8, 2, 2, 2, 2]
    assert counted.during(norm(problem, 8, 3)) == [8]
    assert counted.during(norm(problem, 13, 5)) == [13, 13, 2, 3, 4, 4]
    assert counted.during(norm(problem, 8, 3)) == [8]
    # Of fewer samples, those that would be alone have a copy for company.
    assert counted.during(norm(problem, 6, 3)) == [6, 6, 2, 2, 2, 2]
    assert counted.during(norm(problem, 3, 3)) == [3, 3, 2, 2, 2]
    assert counted.during(norm(problem, 2, 3)) == [2, 2, 2, 2]


def test_always_and_never() -> None:
    counted, problem = problem_of(linear)
    norm(problem, 4, 3)()
    for _ in range(2):
        assert counted.during(norm(problem, 4, 3, check="always")) == [4, 2]
        assert counted.during(norm(problem, 5, 3, check="never")) == [5]
    with pytest.raises(gf.OptionError, match="check='sometimes'"):
        norm(problem, 4, 3, check="sometimes")()


def test_always_beside_a_validation_batch_in_the_same_run() -> None:
    """The company of the sample that is looked at is any other one, of either batch."""
    counted, problem = problem_of(linear)
    train, val = problem.batch(8, 3), problem.batch(2, 3, seed=1)

    def ask() -> None:
        gf.ghost_dot_prod(counted, problem.params, train, val, check="always")

    ask()
    for _ in range(12):
        assert counted.during(ask) == [10, 2, 2]


def test_passes_are_bounded_by_the_number_of_shapes() -> None:
    counted, problem = problem_of(linear)
    lengths = [1 + (7 * k) % 20 for k in range(60)]
    norm(problem, 4, 1)()
    total = sum(len(counted.during(norm(problem, 4, t))) for t in lengths)
    assert total == len(lengths) + 5 * (len(set(lengths)) - 1)


def test_what_may_reorder_is_proved_every_time() -> None:
    """The same shapes may come in another order."""
    counted, problem = problem_of(choosing)
    norm(problem, 4, 3)()
    for _ in range(2):
        assert counted.during(norm(problem, 4, 3)) == [4, 4, 2, 2, 2, 2]


def exact(f: Callable[[Any, Any], Tensor], first: tuple[int, int], then: tuple[int, int]) -> None:
    problem = Problem(f, weights(w=(4, 6)), sequences(4))
    for n, t in (first, then, first, then):
        train, val = problem.batch(n, t), problem.batch(2, t, seed=1)
        dots = gf.ghost_dot_prod(f, problem.params, train, val, per_param=True)
        pairs = gram(sample_grads(problem, train), sample_grads(problem, val))
        assert_close(dots, [x.mean(1) for x in pairs], problem.tolerance)


def test_another_trace_is_made_where_one_is_disproved() -> None:
    def by_length(p: Any, x: Tensor) -> Tensor:
        k = int(x.shape[1] > 3)
        return energy(torch.tanh(x.transpose(0, k) @ p["w"]).transpose(0, k))

    exact(by_length, (4, 2), (4, 4))


# --- planted faults ------------------------------------------------------------------------------


def swapped(rule: FactorRule) -> FactorRule:
    """The rule, which takes two samples' cotangents for each other's."""

    def fn(b: Tensor, *args: Any, **kwargs: Any) -> Any:
        order = torch.arange(len(b))
        if len(b) > 3:
            order[[0, 1]] = order[[1, 0]]
        return rule.fn(b[order], *args, **kwargs)

    return FactorRule(fn, rule.signature, rule.check)


def doubled(rule: FactorRule) -> FactorRule:
    def fn(*args: Any, **kwargs: Any) -> Any:
        made = rule.fn(*args, **kwargs)

        def twice(make: Callable[[], Any]) -> Any:
            factor = make()
            return Outer(2 * factor.left, factor.right) if isinstance(factor, Outer) else factor

        return {name: (lambda make=make: twice(make)) for name, make in made.items()}

    return FactorRule(fn, rule.signature, rule.check)


@pytest.mark.parametrize("fault", [swapped, doubled], ids=lambda f: f.__name__)
def test_a_wrong_rule_is_caught(
    fault: Callable[[FactorRule], FactorRule], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, problem = problem_of(linear)
    op = Tensor.__matmul__
    monkeypatch.setitem(RULES, op, fault(RULES[op]))
    monkeypatch.setitem(RULES, torch.matmul, fault(RULES[torch.matmul]))
    monkeypatch.setitem(RULES, Tensor.matmul, fault(RULES[Tensor.matmul]))
    with pytest.raises(gf.SampleAxisError, match="not those of plain autograd at parameter 'w'"):
        norm(problem, 5, 3)()


def test_a_wrong_layout_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples' cotangents are taken for each other's wherever layouts are read."""
    _, problem = problem_of(linear)
    norm(problem, 3, 3)()
    stack = Layout.stack

    def exchanged(self: Layout, x: Tensor, n: int) -> Tensor:
        out = stack(self, x, n)
        swap = n > 3 and x.shape[-1] == 6
        return torch.cat([out[1:2], out[:1], out[2:]]) if swap else out

    monkeypatch.setattr(Layout, "stack", exchanged)
    with pytest.raises(gf.SampleAxisError, match="plain autograd"):
        norm(problem, 5, 3)()


def test_one_large_sample_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples 0 and 1 are exchanged; another one's gradient is a million times as large."""

    def uneven(p: Any, x: Tensor) -> Tensor:
        return linear(p, x) * (1 + 1e6 * (x[:, 0, 0] > 50))

    _, problem = problem_of(uneven)
    batch = problem.batch(5, 3)
    batch[4, 0, 0] = 100.0
    for op in (Tensor.__matmul__, torch.matmul, Tensor.matmul):
        monkeypatch.setitem(RULES, op, swapped(RULES[op]))
    with pytest.raises(gf.SampleAxisError, match="plain autograd"):
        gf.ghost_norm(problem.model_fn, problem.params, batch)


def test_parameters_that_meet_samples_in_another_dtype() -> None:
    """Kept factors and sums have the dtype of the product, gradients that of the parameter."""

    def wider(p: Any, x: Tensor) -> Tensor:
        return energy(torch.tanh(x @ p["w"].double()))

    problem = Problem(wider, {"w": weights(w=(4, 6))["w"].float()}, sequences(4))
    train, val = problem.batch(4, 3), problem.batch(2, 3, seed=1)
    for reduction in ("mean", "none"):
        for other in (val, problem.batch(2, 5, seed=1)):
            got = gf.ghost_dot_prod(wider, problem.params, train, other, reduction=reduction)
            pairs = gram(sample_grads(problem, train), sample_grads(problem, other))[0]
            assert_close(got, pairs.mean(1) if reduction == "mean" else pairs, 1e-5)
    step = gf.ghost_value_and_grad(wider, problem.params, train, val)
    assert step.grads["w"].dtype == torch.float32


def test_rounding_noise_is_no_fault() -> None:
    """A softmax takes no notice of the bias of the keys: in float32 its gradient is noise."""

    def attentive(p: Any, x: Tensor) -> Tensor:
        keys = x @ p["w"] + p["b"]
        return energy(torch.softmax((x @ p["w"]) @ keys.mT, -1) @ x)

    drawn = weights(w=(4, 4), b=(4,))
    params = {name: x.float() for name, x in drawn.items()}
    counted = Counted(attentive)
    for seed, (n, t) in enumerate([(2, 3), (5, 7), (8, 20), (16, 40)]):
        x = torch.randn(n, t, 4, generator=torch.Generator().manual_seed(seed))
        calls = counted.during(lambda x=x: gf.ghost_norm(counted, params, x))
        assert max(calls) <= n + 1  # it is proved, and not refused
        # Where noise is looked at, a few samples run twice more.
        assert counted.during(lambda x=x: gf.ghost_norm(counted, params, x)) == [n]


def test_zeros_cost_a_pass_where_they_hide_something() -> None:
    def adapted(p: Any, x: Tensor) -> Tensor:
        return energy(x @ p["w"] + x @ p["a"] @ p["b"] + p["shift"])

    counted = Counted(adapted)
    params = weights(w=(4, 6), a=(4, 2), b=(2, 6), shift=(6,))
    params["shift"] = torch.zeros_like(params["shift"])
    ask = norm(Problem(counted, params, sequences(4)), 4, 3)
    ask()
    more = norm(Problem(counted, params, sequences(4)), 6, 3)
    assert counted.during(more) == [6, 6, 2, 2, 2, 2]  # zeros that hide nothing
    params["b"] = torch.zeros_like(params["b"])
    more = norm(Problem(counted, params, sequences(4)), 6, 5)
    assert counted.during(more) == [6, 6, 6, 2, 2, 2, 2, 2]
