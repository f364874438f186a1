"""Noise scale, conflicts and norms of a step, beside their definitions from formed gradients."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import Allocations
from compare import assert_close, leaves_of, sample_grads, wide
from problems import CASES, Problem
from torch import Tensor, nn

import ghostfunc as gf
from ghostfunc._factors import cost
from ghostfunc._factors.bundles import take
from ghostfunc._factors.factor import Dense, Factor, OneHot, Outer
from ghostfunc._factors.spread import spread, spread_of_parts

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def rows(problem: Problem, batch: Any) -> list[Tensor]:
    return [wide(g).double().reshape(len(g), -1) for g in sample_grads(problem, batch)]


def defined(g: Tensor) -> dict[str, float]:
    """By pairs of different samples, `[n, n]`, and the variance as it is taught."""
    n = len(g)
    products = (g @ g.mT).fill_diagonal_(0)
    return {
        "noise": float(g.var(0, correction=1).sum()),
        "signal": float(products.sum() / (n * (n - 1))),
        "conflicting": float((products.sum(1) < 0).double().mean()),
    }


@pytest.mark.parametrize(("n", "t"), [(2, 4), (5, 2)])
def test_health_is_what_the_definitions_say(problem: Problem, n: int, t: int) -> None:
    batch = problem.batch(n, t)
    step = gf.ghost_health(problem.model_fn, problem.params, batch)
    g = rows(problem, batch)
    assert_close(step.losses, problem.model_fn(problem.params, batch), problem.tolerance)
    wanted = [x.mean(0).reshape(p.shape) for x, p in zip(g, leaves_of(problem.params), strict=True)]
    assert_close(step.grads, wanted, max(problem.tolerance, 1e-9))
    table = [torch.stack([x.square().sum(1), x @ x.sum(0)], 1) for x in g]
    assert_close(step.spread, table, problem.tolerance)
    whole = torch.cat(g, 1)
    book = gf.factored_grads(problem.model_fn, problem.params, batch)
    size = float(whole.square().sum(1).max())
    for found in (gf.health(step), gf.health(book)):
        assert_close(found.norms, whole.norm(dim=1), problem.tolerance)
        want = defined(whole)
        assert abs(found.noise - want["noise"]) <= 10 * problem.tolerance * size
        assert abs(found.signal - want["signal"]) <= 10 * problem.tolerance * size
        assert found.conflicting == want["conflicting"]
        assert sum(x.noise for x in found.layers.values()) == pytest.approx(found.noise)


def test_layers_ids_and_the_largest() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    model_fn, params = gf.from_module(net, lambda m, x: m(x).square().mean(1))
    x = torch.randn(6, 4, dtype=torch.float64)
    found = gf.health(gf.ghost_health(model_fn, params, x), ids=list("abcdef"))
    norms = gf.ghost_norm(model_fn, params, x)
    assert found.largest(2)[0] == ("abcdef"[int(norms.argmax())], pytest.approx(float(norms.max())))
    assert list(found.layers) == ["0", "2"]
    own = torch.stack(
        [gf.ghost_norm(model_fn, params, x, per_param=True)[k] for k in ("0.weight", "0.bias")]
    )
    assert_close(found.layers["0"].norms, own.norm(dim=0), 1e-12)
    assert "\n" not in repr(found)
    assert "samples=6" in repr(found)
    logged = found.as_dict(layers=True)
    assert all(isinstance(value, float) for value in logged.values())
    assert logged["health/noise_scale"] == found.noise / found.signal
    assert logged["health/0/conflicting"] == found.layers["0"].conflicting
    assert "health/0/noise" not in found.as_dict()


def test_the_noise_scale_of_gaussian_gradients() -> None:
    """Gradients `mu + noise`: estimates of many small batches meet the truth, which one of the
    naive ones, `||G||^2`, would miss by `tr(Sigma) / n`."""
    torch.manual_seed(0)
    mu, sigma = torch.full((20,), 0.1, dtype=torch.float64), 0.5
    params = {"w": torch.zeros(20, dtype=torch.float64)}
    noise, signal = [], []
    for _ in range(400):
        x = mu + sigma * torch.randn(4, 20, dtype=torch.float64)
        found = gf.health(gf.ghost_health(lambda p, x: x @ p["w"], params, x))
        noise.append(found.noise)
        signal.append(found.signal)
    assert sum(noise) / 400 == pytest.approx(20 * sigma**2, rel=0.05)
    assert sum(signal) / 400 == pytest.approx(float(mu @ mu), abs=0.06)


@pytest.mark.parametrize("n", [3, 20])  # by a Gram matrix of a block, and by its rows
@pytest.mark.parametrize(
    "kind", ["rows", "looked up too", "dense too", "tokens", "apart", "by part"]
)
def test_every_way_gives_the_same(kind: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    p, d, t = 30, 12, 9
    monkeypatch.setattr(cost, "SPREAD_ELEMENTS", 7 * n * d)
    monkeypatch.setattr(cost, "SPREAD_ROWS", 1)
    monkeypatch.setattr("ghostfunc._factors.pairs.LARGE", 1 if n == 20 else 1 << 18)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    bundle: list[Factor] = [Outer(draw(n, t, p), draw(n, t, d))]
    if kind in ("looked up too", "by part"):
        bundle.append(OneHot(torch.randint(p, (n, t)), draw(n, t, d), p))
    if kind == "dense too":
        bundle.append(Dense(draw(n, p, d)))
    way = kind if kind in ("tokens", "apart") else "rows"
    ways = {"by part": lambda k: "apart" if k == 1 else "rows"}.get(kind, lambda _: way)
    monkeypatch.setattr(cost, "spread_ways", lambda parts, *_: [ways(k) for k, _ in parts])
    g = sum(gf.materialize(f) for f in bundle).flatten(1)
    in_parts = [[take(f, s) for f in bundle] for s in (slice(1), slice(1, n))]
    for table, total in (spread(bundle), spread_of_parts(in_parts)):
        assert_close(table, torch.stack([g.square().sum(1), g @ g.sum(0)], 1), 1e-12)
        assert_close(total.flatten(), g.sum(0), 1e-12)


def test_single_precision_keeps_its_digits() -> None:
    torch.manual_seed(0)
    f = Outer(torch.randn(4, 256, 300), torch.randn(4, 256, 384))
    assert cost.spread_ways([(4, cost.Positions(256, 0, 0))], 300, 384) == ["rows"]
    exact = spread([Outer(f.left.double(), f.right.double())])
    found = spread([f])
    assert_close(found.table.double(), exact.table, 3e-6)
    assert_close(found.total.double(), exact.total, 3e-6)


def test_the_products_are_those_of_a_plain_step() -> None:
    """At T=256, 6 x 384: what reads blocks in cache is counted as the products it is made of."""
    pytest.importorskip("transformers")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        flops, shapes = __import__("flops"), __import__("shapes")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("flops", "shapes"):
            sys.modules.pop(name, None)
    shape = shapes.Shape(1, 384, 500, 256, 4, 1)
    module, ids = shapes.gpt2(shape), shape.ids()[:4]
    model_fn, params = gf.from_module(module, shapes.gpt2_loss)
    gf.ghost_health(model_fn, params, ids)
    with flops.CountFlops() as plain:
        shapes.gpt2_loss(module, ids).mean().backward()
    with flops.CountFlops() as mine:
        gf.ghost_health(model_fn, params, ids)
    assert mine.total <= 1.05 * plain.total


def test_the_sum_is_formed_where_it_stays() -> None:
    """Products go into one block after the other, sums into the gradient itself."""
    n, p, d = 4, 4096, 384  # more than one block
    assert cost.spread_rows(n, p, d) < p
    factor = Outer(torch.randn(n, 64, p), torch.randn(n, 64, d))
    expected = spread([Outer(factor.left.double(), factor.right.double())])
    with Allocations(factor) as made:
        found = spread([factor])
    block = n * cost.spread_rows(n, p, d) * d
    assert made.peak <= 4 * (p * d + block) + 10_000
    assert_close(found.total.double(), expected.total, 3e-6)


def test_beside_other_quantities_and_compiled() -> None:
    problem = CASES["tied_lm"]()
    batch = problem.batch(3)
    u = gf.direction(problem.model_fn, problem.params, batch)
    asked = {"u": gf.Dot(u), "spread": gf.Spread()}
    out = gf.ghost_vjp(problem.model_fn, problem.params, batch, asked, grads=True)
    alone = gf.ghost_health(problem.model_fn, problem.params, batch)
    step = gf.HealthStep(out.losses, out.grads, out.values["spread"])
    assert gf.health(step).as_dict() == pytest.approx(gf.health(alone).as_dict())
    assert_close(out.grads, {k: 3 * x for k, x in alone.grads.items()}, 1e-12)
    compiled = torch.compile(
        lambda p, x: gf.ghost_health(problem.model_fn, p, x), fullgraph=True, backend="aot_eager"
    )(problem.params, batch)
    assert_close(compiled.spread, alone.spread, 1e-10)
    assert_close(compiled.grads, alone.grads, 1e-10)


def test_what_is_refused() -> None:
    params, x = {"w": torch.ones(3)}, torch.randn(4, 3)

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return x @ p["w"]

    with pytest.raises(gf.BatchError, match="takes two at least"):
        gf.health(gf.ghost_health(model_fn, params, x[:1]))
    with pytest.raises(gf.OptionError, match="ghost_health"):
        gf.health(gf.ghost_vjp(model_fn, params, x, gf.SqNorm()))
    with pytest.raises(gf.OptionError, match=r"expected \[4, 2\]"):
        gf.health(gf.HealthStep(torch.zeros(4), params, {"w": torch.zeros(4)}))
    for ids in ([1, 2], "abcd", b"abcd", [[1]] * 4, [0.5] * 4, torch.ones(4, 1), 4, [None] * 4):
        with pytest.raises(gf.OptionError, match="ids must be 4 whole numbers or names"):
            gf.health(gf.ghost_health(model_fn, params, x), ids=ids)  # type: ignore[arg-type]
    step = gf.ghost_health(model_fn, params, x)
    with pytest.raises(gf.OptionError, match=r"HealthStep\.grads are of 2 parameters"):
        gf.health(step._replace(grads=params | {"v": torch.ones(3)}))
    large = x * torch.tensor([1, 1e30, 1, 1])[:, None]
    with pytest.raises(gf.NonFiniteLossError, match=r"samples \[1\] \(1 in all\)"):
        gf.health(gf.ghost_health(model_fn, params, large))
    with pytest.raises(gf.OptionError, match="pairs the samples"):
        gf.ghost_vjp(model_fn, params, x, gf.Spread(), chunk_size=2)


@pytest.mark.parametrize("kept", [False, True])
def test_squares_that_underflow_are_no_zeros(kept: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(5, 4)

    def health(size: float, of_first: float = 1.0, zero: bool = False) -> gf.Health:
        def loss(m: nn.Module, x: Tensor) -> Tensor:
            h = m[0](x)
            h = h * of_first + (h * (1 - of_first)).detach()
            return (m[2](m[1](h)) * 1e3).square().mean(1) * 1e-6 * size * (0 if zero else 1)

        model_fn, params = gf.from_module(net, loss)
        ask = gf.factored_grads if kept else gf.ghost_health
        return gf.health(ask(model_fn, params, x))

    ones = health(1.0)
    for size in (1e-16, 1e-22, 1e-30):
        with pytest.raises(gf.NonFiniteLossError, match="underflow in float32"):
            health(size)
    small = health(1e-6)
    assert_close(small.norms * 1e6, ones.norms, 1e-5)
    assert small.noise_scale == pytest.approx(ones.noise_scale, rel=1e-4)
    assert not health(1.0, zero=True).norms.any()  # nothing is lost of zeros
    layers = health(1.0, of_first=1e-25).layers
    assert math.isnan(layers["0"].noise_scale)
    assert math.isnan(layers["0"].conflicting)
    assert layers["2"].noise_scale == pytest.approx(ones.layers["2"].noise_scale)


def test_gradients_that_agree_by_nothing_have_an_infinite_scale() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    params = {"w": torch.zeros(2)}
    found = gf.health(gf.ghost_health(lambda p, x: x @ p["w"], params, x))
    assert math.isinf(found.noise_scale)
    assert found.conflicting == 1.0


def test_what_a_health_cannot_be_asked() -> None:
    params = {"w": torch.ones(3)}
    step = gf.ghost_health(lambda p, x: (x @ p["w"]).square(), params, torch.eye(3))
    health = gf.health(step)
    for wrong in (2, -0.1, "a", float("nan")):
        with pytest.raises(gf.OptionError, match="q="):
            health.quantile(wrong)
    with pytest.raises(gf.OptionError, match="k=-1"):
        health.largest(-1)
