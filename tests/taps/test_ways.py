"""A run at shapes that were met before is compared with the run before, call by call: whatever the
program does otherwise then is seen, and the numbers are right."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import sample_grads
from problems import Problem, energy, features, weights
from torch import Tensor, nn

import ghostfunc as gf
from ghostfunc._base import program as programs
from ghostfunc._taps import known_way, mode
from ghostfunc._trace.fitting import traced
from ghostfunc._trace.trace import Trace
from ghostfunc._trace.watch import plain_arguments

Program = Callable[[Any, Tensor, Any], Tensor]


def rolled(p: Any, x: Tensor, by: int) -> Tensor:
    return energy(x.roll(by, 1) @ p["w"])


def listed(p: Any, x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return energy(x.flip(dims) @ p["w"])


def cut(p: Any, x: Tensor, index: tuple[Any, ...]) -> Tensor:
    """What a call is told in slices, and in what else indexes without tensors."""
    return energy(x[index].reshape(len(x), -1).sum(1, keepdim=True).expand(-1, 4) @ p["w"])


def kept(p: Any, x: Tensor, keepdim: bool) -> Tensor:
    return energy(x @ p["w"] + x.mean(1, keepdim).view(-1, 1))


def scaled(p: Any, x: Tensor, alpha: float) -> Tensor:
    """What a use is told in numbers that are not whole."""
    return energy(torch.addmm(p["c"], x, p["w"], alpha=alpha))


def centred(p: Any, x: Tensor, eps: float) -> Tensor:
    return energy(F.layer_norm(x, (4,), p["b"], p["d"], eps))


def multiplied(p: Any, x: Tensor, by: float) -> Tensor:
    """What a call without parameters is told in such numbers changes values, and not the way."""
    return energy((x * by) @ p["w"])


def chosen(p: Any, x: Tensor, name: str) -> Tensor:
    return energy(F.linear(x, p[name]))


def met_or_not(p: Any, x: Tensor, met: bool) -> Tensor:
    """A parameter where there was a constant."""
    factor = p["b"] if met else torch.ones(4, dtype=x.dtype)
    return energy((x * factor) @ p["w"])


def without_bias(p: Any, x: Tensor, bias: bool) -> Tensor:
    return energy(F.linear(x, p["v"], p["c"] if bias else None))


def switched(p: Any, x: Tensor, grad: bool) -> Tensor:
    with torch.set_grad_enabled(grad):
        y = F.linear(x, p["v"])
    return energy(y + x @ p["w"])


def read(p: Any, x: Tensor, least: float) -> Tensor:
    return energy(x @ p["w"]) * (2 if float(x.abs().max()) > least else 3)


def one_more(p: Any, x: Tensor, more: bool) -> Tensor:
    out = energy(x @ p["w"])
    return out.square() if more else out


def named(p: Any, x: Tensor, by_name: bool) -> Tensor:
    y = F.linear(input=x, weight=p["v"]) if by_name else F.linear(x, p["v"])
    return energy(y)


PROGRAMS: list[tuple[Program, Any, Any]] = [
    (rolled, 1, 2),
    (listed, (1,), (-1,)),
    (kept, False, True),
    (scaled, 1.5, 2.5),
    (centred, 1e-5, 0.1),
    (multiplied, 1.5, 2.5),
    (chosen, "v", "u"),
    (met_or_not, False, True),
    (met_or_not, True, False),
    (without_bias, False, True),
    (without_bias, True, False),
    (switched, True, False),
    (read, 0.0, 1e9),
    (one_more, False, True),
    (one_more, True, False),
    (named, False, True),
]


@pytest.mark.parametrize(
    ("program", "first", "then"), PROGRAMS, ids=[f"{p[0].__name__}-{p[1]}" for p in PROGRAMS]
)
def test_another_way_at_the_same_shapes(program: Program, first: Any, then: Any) -> None:
    """Four runs are planned, each after one that may have gone another way."""
    now = [first]

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return program(p, x, now[0])

    torch.manual_seed(0)
    params = weights(w=(4, 3), v=(3, 4), u=(3, 4), b=(4,), c=(3,), d=(4,))
    problem = Problem(model_fn, params, features(4))
    x = features(4)(5, 1, torch.Generator().manual_seed(0))
    u = {name: torch.randn_like(w) for name, w in params.items()}
    for now[0] in (first, first, then, first, then, then):
        found = gf.ghost_value_and_grad(model_fn, params, x, direction=u)
        right = sample_grads(problem, x)
        named = dict(zip(sorted(params), right, strict=True))
        dots = sum(g.flatten(1) @ u[name].flatten() for name, g in named.items())
        torch.testing.assert_close(found.dot_prods, dots)
        for name, g in named.items():
            torch.testing.assert_close(found.grads[name], g.mean(0))


@pytest.mark.parametrize(
    ("program", "first", "then", "anew"),
    [
        (rolled, 1, 2, True),
        (listed, (1,), (-1,), True),
        (cut, (slice(None), slice(1, 3)), (slice(None), slice(0, 2)), True),
        (kept, False, True, True),
        (multiplied, 1.5, 2.5, False),
        (scaled, 1.5, 2.5, False),
    ],
)
def test_what_calls_are_told_is_proved(
    program: Program, first: Any, then: Any, *, anew: bool
) -> None:
    now, passes = [first], []

    def model_fn(p: Any, x: Tensor) -> Tensor:
        passes.append(x.shape[:1].numel())
        return program(p, x, now[0])

    params = weights(w=(4, 3), c=(3,))
    x = features(4)(6, 1, torch.Generator().manual_seed(0))

    def during() -> list[int]:
        passes.clear()
        gf.ghost_norm(model_fn, params, x)
        return list(passes)

    during()
    assert during() == [6]
    now[0] = then
    assert during() == ([6, 6, 2, 2, 2, 2] if anew else [6])
    assert during() == [6]
    now[0] = first
    assert during() == [6]


def only_trace(model_fn: Any, params: Any, x: Tensor) -> Trace:
    return traced(programs.Program.of(model_fn, params), x).trace


def test_a_run_is_compared_with_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of calls that come again nothing is hashed, save where values go to Python."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3))
    model_fn, params = gf.from_module(module, lambda m, x: energy(m(x)))
    x = torch.randn(5, 4)
    first = gf.ghost_norm(model_fn, params, x)

    def refuse(values: Any) -> Any:
        raise AssertionError("hashed")

    monkeypatch.setattr(mode, "plain_arguments", refuse)
    assert torch.equal(gf.ghost_norm(model_fn, params, x), first)


def test_ways_that_are_remembered_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    params = weights(w=(4, 3))

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return energy(x @ p["w"])

    def batch(n: int) -> Tensor:
        return torch.ones(n, 4, dtype=torch.float64).cumsum(0)

    gf.ghost_norm(model_fn, params, batch(2))
    trace = only_trace(model_fn, params, batch(2))
    length, step = 1, next(iter(trace.ways.values()))
    while step.next is not None:
        length, step = length + 1, step.next
    monkeypatch.setattr(known_way, "MAX_STEPS", 3 * length + 1)
    for n in range(3, 9):
        gf.ghost_norm(model_fn, params, batch(n))
    assert len(trace.ways) == 3


@pytest.mark.parametrize("value", [True, 1.0])
def test_lists_of_other_numbers_are_other_lists(value: Any) -> None:
    """`[1]` equals `[True]` and `[1.0]`."""
    step = known_way.Step(torch.flip, 0, 0)
    x = torch.ones(2, 2)
    step.learn((x, [1]), {})
    assert step.plain
    assert step.again((x, [1]))
    assert not step.again((x, [value]))
    assert not step.again((x, [0]))


def test_layers_that_were_exchanged_are_lent_their_parameters() -> None:
    """As `torch.func.functional_call` does, by name."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    model_fn, params = gf.from_module(module, lambda m, x: energy(m(x)))
    module[0] = nn.Linear(4, 3)
    own = [id(x) for x in module.parameters()]
    x = torch.randn(2, 4)
    losses = model_fn(params, x)
    expected = energy(F.linear(x, params["0.weight"], params["0.bias"]).tanh())
    torch.testing.assert_close(losses, expected)
    assert [id(x) for x in module.parameters()] == own


REFUSALS = gf.SampleAxisError, gf.ControlFlowError, gf.CoupledSamplesError


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def norms_like_a_loop(model_fn: Any, params: Any, x: Tensor) -> None:
    got = gf.ghost_norm(model_fn, params, x)
    want = gf.ghost_norm(model_fn, params, x, mode="materialized", vectorize=False)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_list_of_the_programs_own_may_change() -> None:
    """It is compared with what was in it, and not with itself."""
    order = [0, 1, 2]
    params = weights(w=(4, 5))
    x = draw(4, 4, 4)

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return energy(torch.tanh(x.permute(order) @ p["w"]).permute(order))

    for axes in ([0, 1, 2], [0, 1, 2], [1, 0, 2], [0, 1, 2], [1, 0, 2]):
        order[:] = axes
        norms_like_a_loop(model_fn, params, x)


def test_a_call_that_raises_is_another_than_one_that_does_not() -> None:
    fails = [False]
    params = weights(w=(4, 5))

    def model_fn(p: Any, x: Tensor) -> Tensor:
        try:
            torch.ones(3).reshape(2 if fails[0] else 3)
        except RuntimeError:
            x = x.transpose(0, 1)
        y = torch.tanh(x @ p["w"])
        return energy(y.transpose(0, 1) if fails[0] else y)

    for raises in (False, False, True, False, True, True):
        fails[0] = raises
        norms_like_a_loop(model_fn, params, draw(4, 4, 4))


@pytest.mark.parametrize("number", [np.int64, int])
def test_integers_of_numpy_are_told(number: Any) -> None:
    swap = [False]
    params = weights(w=(4, 5))

    def model_fn(p: Any, x: Tensor) -> Tensor:
        axes = number(0), number(1 if swap[0] else 0)
        return energy(torch.tanh(x.transpose(*axes) @ p["w"]).transpose(*axes))

    for swapped in (False, False, True, False, True):
        swap[0] = swapped
        norms_like_a_loop(model_fn, params, draw(4, 4, 4))


def test_arrays_of_numpy_and_dtypes_are_told() -> None:
    one, other = np.array([0, 1, 2]), np.array([1, 0, 2])
    assert plain_arguments((one,), {}) == plain_arguments((one.copy(),), {})
    assert plain_arguments((one,), {}) != plain_arguments((other,), {})
    assert plain_arguments((torch.float32,), {}) != plain_arguments((torch.float64,), {})
    assert plain_arguments(([np.int64(1)],), {}) != plain_arguments(([np.int64(2)],), {})


def test_a_verdict_that_is_written_down_is_read() -> None:
    """Or printed, or a size."""
    params = weights(w=(4, 5))

    def written(x: Tensor) -> bool:
        noted = torch.zeros(2, dtype=torch.bool)
        noted[0] = (x > 0).all()
        return bool(noted[:1].all())

    def printed(x: Tensor) -> bool:
        return "True" in str((x > 0).all())

    def sized(x: Tensor) -> bool:
        return torch.bincount((x > 0).all().long()[None]).shape[0] == 2

    for verdict in (written, printed, sized):

        def model_fn(p: Any, x: Tensor, verdict: Any = verdict) -> Tensor:
            over = verdict(x)
            y = torch.tanh((x.transpose(0, 1) if over else x) @ p["w"])
            return energy(y.transpose(0, 1) if over else y)

        x = draw(4, 4, 4)
        for batch in (x, x, x.abs() + 0.1, x, x.abs() + 0.1):
            with contextlib.suppress(*REFUSALS):
                norms_like_a_loop(model_fn, params, batch)
