"""`gf.remat` changes no number, and keeps less."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, gram, random_direction, sample_grads
from problems import Problem, next_token, tokens
from torch import Tensor, nn

import ghostfunc as gf
from benchmarks.live_bytes import LiveBytes

VOCABULARY = 11


class Block(nn.Module):
    def __init__(self, d: int, p: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.drop = nn.Dropout(p)
        self.runs = 0

    def forward(self, x: Tensor, scale: Tensor, *, shift: Tensor) -> dict[str, Tensor]:
        self.runs += 1
        y = self.drop(torch.tanh(self.up(self.norm(x)))) * scale + shift
        return {"x": x + self.down(y), "positions": torch.arange(x.shape[1])}


class Model(nn.Module):
    """Layers of several kinds: modules, functions that close over modules and over activations,
    a weight tied inside and outside, a tensor derived outside, and regions within regions."""

    def __init__(self, wrap: Callable[[Any], Any], d: int = 6, p: float = 0.0) -> None:
        super().__init__()
        self.wrap = wrap
        self.embed = nn.Embedding(VOCABULARY, d)
        self.blocks = nn.ModuleList(Block(d, p) for _ in range(3))
        self.mix = nn.Linear(d, d)
        self.scale = nn.Parameter(torch.ones(4 * d))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        shift = x.mean(-1, keepdim=True)
        twice = self.mix.weight * 2
        for block in self.blocks[:2]:
            x = self.wrap(block)(x, self.scale, shift=shift)["x"]

        def both(x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.wrap(self.blocks[2])(x, self.scale, shift=shift)["x"]
            y = self.wrap(lambda z: F.linear(z, twice, self.mix.bias))(x)
            return self.mix(x) + self.embed(ids), y + shift

        x, y = self.wrap(both)(x)
        x.add_(y)  # outputs may be written to
        return self.wrap(lambda x: x @ self.embed.weight.t())(x)


def problem(wrap: Callable[[Any], Any], p: float = 0.0) -> Problem:
    torch.manual_seed(0)
    module = Model(wrap, p=p).double()
    with torch.no_grad():
        for x in module.parameters():
            x.normal_(std=0.5)
    return Problem(
        *gf.from_module(module, lambda m, ids: next_token(m(ids), ids)), tokens(VOCABULARY)
    )


CALLS: dict[str, Callable[..., Any]] = {
    **{
        f"{mode}-{reduction}": partial(
            gf.ghost_dot_prod, mode=mode, reduction=reduction, per_param=True
        )
        for mode in ("ghost", "jvp", "materialized")
        for reduction in ("mean", "none")
    },
    "loop": partial(gf.ghost_dot_prod, mode="materialized", vectorize=False),
    "step": lambda *args: gf.ghost_value_and_grad(*args, per_param=True),
    "step-jvp": partial(gf.ghost_value_and_grad, mode="jvp"),
    "norm": lambda f, p, train, val: gf.ghost_norm(f, p, train, per_param=True),
    "cosine": gf.ghost_cosine,
    "gram": partial(gf.ghost_gram, per_param=True),
    "gram-within": lambda f, p, train, val: gf.ghost_gram(f, p, train),
    "clipped": lambda f, p, train, val: gf.ghost_clipped_grad(f, p, train, max_norm=0.5),
    "direction": lambda f, p, train, val: gf.direction(f, p, val),
    "grads": lambda f, p, train, val: gf.per_sample_grads(f, p, train, mode="ghost"),
    "project": lambda f, p, train, val: gf.ghost_project(
        f, p, train, gf.kronecker_projection(p, rank_total=4, rank_min=2, kind="gaussian", seed=0)
    ),
    "gradient": lambda f, p, train, val: torch.func.grad(lambda p: f(p, train).sum())(p),
    "second derivative": lambda f, p, train, val: torch.func.grad(
        lambda p: gf.ghost_dot_prod(f, p, train, val).square().sum()
    )(p),
    "many directions": lambda f, p, train, val: torch.vmap(
        lambda u: gf.ghost_dot_prod(f, p, train, direction=u)
    )({k: torch.stack([x, x + 1]) for k, x in p.items()}),
}


@pytest.mark.parametrize("call", CALLS)
def test_no_number_changes(call: str) -> None:
    plain, again = problem(lambda fn: fn), problem(gf.remat)
    train, val = plain.batch(5, 5), plain.batch(3, 6, seed=1)
    got, want = (CALLS[call](x.model_fn, x.params, train, val) for x in (again, plain))
    assert_close(got, want, 1e-12)


def test_against_the_definition() -> None:
    again = problem(gf.remat)
    train, val = again.batch(5, 5), again.batch(3, 6, seed=1)
    want = gram(sample_grads(again, train), sample_grads(again, val))
    got = gf.ghost_dot_prod(
        again.model_fn, again.params, train, val, reduction="none", per_param=True
    )
    assert_close(got, want, 1e-10)


def test_every_problem_as_one_region(problem: Problem) -> None:
    def model_fn(p: Any, batch: Any) -> Tensor:
        return gf.remat(problem.model_fn)(p, batch)

    train, u = problem.batch(3), random_direction(problem.params)
    got, want = (
        gf.ghost_value_and_grad(f, problem.params, train, direction=u, per_param=True)
        for f in (model_fn, problem.model_fn)
    )
    assert_close(got, want, problem.tolerance)
    grads = torch.func.grad(lambda p: model_fn(p, train).mean())(problem.params)
    assert_close(grads, want.grads, problem.tolerance)


def test_higher_derivatives_and_other_orders_of_transforms() -> None:
    w, x = torch.randn(3).double(), torch.randn(3).double()

    def f(wrap: Callable[[Any], Any], w: Tensor) -> Tensor:
        inner = lambda y: wrap(lambda z: torch.sin(z) * w[1])(y * w) + y**3  # noqa: E731
        return wrap(inner)(x * w).square().sum()

    def all_of(f: Callable[[Tensor], Tensor]) -> list[Tensor]:
        func = torch.func
        square = lambda w: func.grad(f)(w).square().sum()  # noqa: E731
        scaled = lambda w: torch.vmap(lambda s: f(w * s))(x).sum()  # noqa: E731
        return [
            func.hessian(f)(w),
            func.jacrev(func.jacrev(f))(w),
            func.grad(lambda w: func.grad(square)(w).sum())(w),
            torch.vmap(func.grad(f))(torch.stack([w, x])),
            func.grad(scaled)(w),
        ]

    assert_close(all_of(partial(f, gf.remat)), all_of(partial(f, lambda fn: fn)), 1e-12)


def test_regions_run_again_once() -> None:
    again = problem(gf.remat)
    block = again.model_fn.module.blocks[0]
    train, u = again.batch(4), random_direction(again.params)
    gf.ghost_dot_prod(again.model_fn, again.params, train, direction=u)
    block.runs = 0
    gf.ghost_dot_prod(again.model_fn, again.params, train, direction=u)
    assert block.runs == 2
    torch.func.grad(lambda p: again.model_fn(p, train).sum())(again.params)
    assert block.runs == 4


def test_dropout_draws_the_same_again() -> None:
    def scores(wrap: Callable[[Any], Any], call: Callable[..., Any]) -> Any:
        made = problem(wrap, p=0.5)
        train, val = made.batch(4), made.batch(2, seed=1)
        call(made.model_fn, made.params, train, val)  # traced from here on
        torch.manual_seed(3)
        return call(made.model_fn, made.params, train, val)

    for mode in ("ghost", "materialized"):
        call = partial(gf.ghost_dot_prod, mode=mode, randomness="different")
        assert_close(scores(gf.remat, call), scores(lambda fn: fn, call), 1e-12)
    call = lambda f, p, train, val: torch.func.grad(lambda p: f(p, train).sum())(p)  # noqa: E731
    assert_close(scores(gf.remat, call), scores(lambda fn: fn, call), 1e-12)


def test_autocast_is_as_it_was() -> None:
    scores = []
    for wrap in (gf.remat, lambda fn: fn):
        made = problem(wrap)
        params = {k: x.float() for k, x in made.params.items()}

        def model_fn(p: Any, ids: Tensor, f: Any = made.model_fn) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return f(p, ids).float()

        ids = made.batch(4)
        grads = torch.func.grad(lambda p, f=model_fn, x=ids: f(p, x).sum())(params)
        scores.append((gf.ghost_dot_prod(model_fn, params, ids, direction=params), grads))
    assert_close(*scores, 1e-6)


def test_ordinary_training() -> None:
    grads = []
    for wrap in (gf.remat, lambda fn: fn):
        made = problem(wrap)
        module, ids = made.model_fn.module, made.batch(4)
        next_token(module(ids), ids).sum().backward()
        grads.append([x.grad for x in module.parameters()])
    assert_close(*grads, 1e-12)


def test_other_parameters_than_the_module_s_own() -> None:
    """A module is lent its parameters again, by whichever transform or none."""
    plain, again = problem(lambda fn: fn), problem(gf.remat)
    train = plain.batch(4)
    other = {k: (x + 0.1).requires_grad_() for k, x in plain.params.items()}
    results = []
    for made in (plain, again):
        losses = made.model_fn(other, train)
        own = dict(made.model_fn.module.named_parameters())
        results.append(torch.autograd.grad(losses.sum(), list(other.values())))
        assert dict(made.model_fn.module.named_parameters()) == own
    assert_close(*results, 1e-12)


def test_tensors_of_parameters_alone_come_out() -> None:
    def model_fn(p: dict[str, Tensor], x: Tensor, wrap: Callable[[Any], Any]) -> Tensor:
        def both(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            twice = p["w"] * 2
            return F.linear(x, twice).tanh(), twice, p["v"]

        y, twice, v = wrap(both)(x)
        return F.linear(y, twice * v).square().sum(1)

    p = {"w": torch.randn(4, 4).double(), "v": torch.randn(4).double()}
    x = torch.randn(4, 4).double()
    for call in (gf.ghost_value_and_grad, gf.ghost_gram):
        got, want = (
            call(partial(model_fn, wrap=wrap), p, x, x + 1) for wrap in (gf.remat, lambda fn: fn)
        )
        assert_close(got, want, 1e-12)


# --- memory -----------------------------------------------------------------------------------


def deep(wrap: Callable[[Any], Any]) -> Problem:
    torch.manual_seed(0)
    net = nn.ModuleList(
        nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
        for _ in range(8)
    ).double()

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        for layer in net:
            x = x + wrap(layer)(x)
        return x.square().mean((1, 2))

    return Problem(
        *gf.from_module(net, loss), lambda n, t, g: torch.randn(n, t, 8, generator=g).double()
    )


MEASURED: dict[str, Callable[..., Any]] = {
    "scores": lambda f, p, x: gf.ghost_dot_prod(f, p, x, direction=p),
    "step": lambda f, p, x: gf.ghost_value_and_grad(f, p, x, direction=p),
    "norm": lambda f, p, x: gf.ghost_norm(f, p, x),
    "direction": lambda f, p, x: gf.direction(f, p, x),
    "functional gradient": lambda f, p, x: torch.func.grad(lambda p: f(p, x).mean())(p),
}


@pytest.mark.parametrize("call", MEASURED)
def test_less_is_kept(call: str) -> None:
    peaks = []
    for wrap in (gf.remat, lambda fn: fn):
        made = deep(wrap)
        x = made.batch(16, 32)
        MEASURED[call](made.model_fn, made.params, x)
        with LiveBytes() as memory:
            MEASURED[call](made.model_fn, made.params, x)
        peaks.append(memory.peak)
    assert peaks[0] < 0.4 * peaks[1]


# --- what is refused --------------------------------------------------------------------------


class Double(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor) -> Tensor:
        return 2 * w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Tensor:
        return 2 * b


def test_a_tensor_in_hiding_is_refused() -> None:
    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = F.linear(x, p["w"])
        return gf.remat(lambda x: x * Double.apply(h))(x).square().sum(1)

    def explicit(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return gf.remat(lambda x, h: x * Double.apply(h))(x, F.linear(x, p["w"])).square().sum(1)

    p, x = {"w": torch.randn(4, 4).double()}, torch.randn(3, 4).double()
    with pytest.raises(gf.UntrackedUseError, match="make that tensor an argument"):
        gf.ghost_dot_prod(model_fn, p, x, direction=p)
    want = gf.ghost_dot_prod(model_fn, p, x, direction=p, mode="materialized")  # which sees it
    assert_close(gf.ghost_dot_prod(explicit, p, x, direction=p), want, 1e-12)


def test_writes_to_what_is_not_its_own_are_refused() -> None:
    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return gf.remat(lambda h: h.add_(1))(F.linear(x, p["w"])).square().sum(1)

    p, x = {"w": torch.randn(4, 4).double()}, torch.randn(3, 4).double()
    with pytest.raises(gf.InPlaceError, match=r"gf\.remat: .* shape \(3, 4\)"):
        gf.ghost_dot_prod(model_fn, p, x, direction=p)
    with pytest.raises(gf.InPlaceError, match=r"gf\.remat"):
        torch.func.grad(lambda p: model_fn(p, x).sum())(p)


class Holder:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


def test_a_module_out_of_sight() -> None:
    """Pulled back while the module has lent parameters it is right; refused where it has not."""
    layer = nn.Linear(4, 4)
    holder = Holder(layer)
    x = torch.randn(3, 4)

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        return gf.remat(lambda x: holder.layer(x))(x).square().sum(1)

    model_fn, params = gf.from_module(layer, loss)
    layer(x).square().sum(1).mean().backward()
    plain = {name: p.grad for name, p in layer.named_parameters()}
    assert_close(gf.direction(model_fn, params, x), plain, 1e-6)
    with pytest.raises(gf.TransformError, match="out of sight"):
        gf.ghost_dot_prod(model_fn, params, x, direction=params)
