"""Attempts to be told a wrong number: each is refused by name, or answered exactly.

`test_errors.py` has the errors of options, shapes, losses and ops; this file has what a model, a
tensor or a later batch may do behind ghostfunc's back.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, gram, leaves_of, random_direction, sample_grads
from problems import Problem, energy, features, weights
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

import ghostfunc as gf

ModelFn = Callable[[Any, Any], Tensor]
Model = tuple[ModelFn, Any]


def params(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return weights(**(shapes or {"w": (4, 3)}))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def linear(p: Any, x: Tensor) -> Tensor:
    return energy(x @ p["w"])


def ghost(f: ModelFn, p: Any, x: Any) -> Any:
    return gf.ghost_dot_prod(f, p, x, x)


def check_exact(f: ModelFn, p: Any, x: Any) -> None:
    """Every quantity that ghost mode has two ways to."""
    u = random_direction(p)
    grads = sample_grads(Problem(f, p, features(4)), x)
    dots = [sum_of(g, v) for g, v in zip(grads, leaves_of(u), strict=True)]
    norms = [sum_of(g, g) for g in grads]
    asked = {"dot": gf.Dot(u), "norm": gf.SqNorm(), "g": gf.SampleGrad()}
    got = gf.ghost_vjp(f, p, x, asked, grads=True)
    assert_close(got.values["dot"], dots, 1e-10)
    assert_close(got.values["norm"], norms, 1e-10)
    assert_close(got.values["g"], grads, 1e-10)
    assert_close(got.grads, [g.sum(0) for g in grads], 1e-10)
    assert_close(gf.ghost_gram(f, p, x), sum(gram(grads, grads)), 1e-10)


def sum_of(g: Tensor, v: Tensor) -> Tensor:
    return (g * v).reshape(len(g), -1).sum(1)


# --- tensors that gradients refuse ------------------------------------------------------------

everywhere = pytest.mark.parametrize(
    "options",
    [{}, {"mode": "jvp"}, {"mode": "materialized"}, {"mode": "materialized", "vectorize": False}],
    ids=["ghost", "jvp", "vmap", "loop"],
)


def made_in_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.ones(4, 3, dtype=torch.float64)


KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: torch.eye(4, 3).to_sparse(), r"sparse \(torch.sparse_coo\): .*to_dense"),
    "csr": (lambda: torch.eye(4, 3).to_sparse_csr(), r"sparse \(torch.sparse_csr\): .*to_dense"),
    "meta": (lambda: torch.ones(4, 3, device="meta"), 'device "meta".*no values'),
    "inference": (made_in_inference_mode, r"an inference tensor.*clone\(\)"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested.*pad"),
}


@everywhere
@pytest.mark.filterwarnings("ignore:.*(Sparse|nested tensor).*:UserWarning")
@pytest.mark.parametrize(("make", "message"), KINDS.values(), ids=KINDS)
def test_kinds_of_tensors(make: Callable[[], Any], message: str, options: Any) -> None:
    x = draw(3, 4)
    with pytest.raises(gf.ParamsError, match=f"'w' is .*{message}"):
        gf.ghost_dot_prod(linear, {"w": make()}, x, x, **options)
    with pytest.raises(gf.BatchError, match=rf"train\['x'\] is .*{message}"):
        gf.ghost_dot_prod(lambda p, b: linear(p, b["x"]), params(), {"x": make()}, x, **options)


@everywhere
@pytest.mark.filterwarnings("ignore:.*quantized:UserWarning")
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_quantized_samples(options: Any) -> None:
    x = torch._empty_affine_quantized([3, 4], scale=1.0, zero_point=0, dtype=torch.qint8)
    with pytest.raises(gf.BatchError, match=r"quantized: pass x.dequantize\(\)"):
        gf.ghost_dot_prod(linear, params(), x, x, **options)


@everywhere
def test_a_batch_of_numbers(options: Any) -> None:
    with pytest.raises(gf.BatchError, match=r"train\[0\] is a int"):
        gf.ghost_dot_prod(linear, params(), [1, 2, 3], [1, 2, 3], **options)


@everywhere
def test_weights_that_are_not_finite(options: Any) -> None:
    with pytest.raises(gf.NonFiniteLossError, match="losses are not finite"):
        gf.ghost_dot_prod(
            linear, {"w": torch.full((4, 3), torch.nan)}, *[torch.ones(3, 4)] * 2, **options
        )


@everywhere
@pytest.mark.parametrize("look_up", [lambda w, ids: F.embedding(ids, w), lambda w, ids: w[ids]])
def test_ids_out_of_range(look_up: Callable[..., Tensor], options: Any) -> None:
    ids = torch.tensor([[0, 1], [2, 3], [4, 0]])  # not in the samples that are traced
    with pytest.raises(IndexError, match=r"out of (range|bounds)"):
        gf.ghost_dot_prod(lambda p, x: energy(look_up(p["w"], x)), params(), ids, ids, **options)


@everywhere
@pytest.mark.parametrize("dtype", [torch.bool, torch.complex128])
def test_dtype_of_the_losses(dtype: torch.dtype, options: Any) -> None:
    with pytest.raises(gf.LossShapeError, match=f"{dtype}.*floating-point loss"):
        gf.ghost_dot_prod(
            lambda p, x: linear(p, x).to(dtype), params(), *[draw(3, 4)] * 2, **options
        )


@everywhere
def test_losses_without_parameters(options: Any) -> None:
    x = draw(3, 4)
    with pytest.raises(gf.UntrackedUseError, match="No parameter reaches the losses"):
        gf.ghost_dot_prod(lambda p, x: energy(x), params(), x, x, **options)


# --- parameters that come by another way ------------------------------------------------------


class Aliased(nn.Module):
    """A view of the weight, made once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        self.rows = self.layer.weight[:2]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(x), x @ self.rows.mT], 1)


class Cached(nn.Module):
    """A merged weight, made in the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        self.merged: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is None:
            self.merged = 2 * self.layer.weight
        return F.linear(x, self.merged, self.layer.bias)


def captured() -> Model:
    layer = nn.Linear(4, 3).double()
    return lambda p, x: energy(F.linear(x, layer.weight, p["bias"])), dict(layer.named_parameters())


def wrapped() -> Model:
    return lambda p, x: energy(x @ nn.Parameter(p["w"])), params()


def of_module(module: nn.Module) -> Model:
    return gf.from_module(module, lambda m, x: energy(m(x)))


KEPT: dict[str, Callable[[], Model]] = {
    "alias": lambda: of_module(Aliased()),
    "cache": lambda: of_module(Cached()),
    "closure": captured,
    "new_parameter": wrapped,
}


@everywhere
@pytest.mark.parametrize("make", KEPT.values(), ids=KEPT)
def test_parameters_by_another_way(make: Callable[[], Model], options: Any) -> None:
    f, p = make()
    with pytest.raises(gf.UntrackedUseError, match=r"by another way.*closure.*Use the argument"):
        gf.ghost_dot_prod(f, p, draw(3, 4), draw(2, 4), **options)


@everywhere
def test_a_cache_around_the_call(options: Any) -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3).double())
    f, p = of_module(layer)
    with nn.utils.parametrize.cached(), pytest.raises(gf.UntrackedUseError, match="parametrize"):
        gf.ghost_dot_prod(f, p, draw(3, 4), draw(2, 4), **options)


@everywhere
def test_a_parameter_as_an_array(options: Any) -> None:
    def f(p: Any, x: Tensor) -> Tensor:
        return energy(x @ torch.from_numpy(p["w"].numpy()))

    with pytest.raises(RuntimeError, match=r"Can't call numpy\(\) on Tensor that requires grad"):
        gf.ghost_dot_prod(f, params(), draw(3, 4), draw(2, 4), **options)


def test_a_kept_constant_is_a_constant() -> None:
    layer = nn.Linear(4, 3).double()
    p = dict(layer.named_parameters())
    held = layer.weight.detach()
    check_exact(lambda p, x: energy(F.linear(x, held * p["weight"], p["bias"])), p, draw(3, 4))


# --- gradients inside the model ---------------------------------------------------------------


def penalty(p: Any, x: Tensor) -> Tensor:
    return energy(torch.func.grad(lambda x: F.linear(x, p["w"].mT).tanh().square().sum())(x))


def forward_penalty(p: Any, x: Tensor) -> Tensor:
    along = torch.func.jvp(lambda x: (x @ p["w"]).tanh(), (x,), (torch.ones_like(x),))[1]
    return energy(along)


def adapted(p: Any, x: Tensor) -> Tensor:
    support = torch.ones(2, 4, dtype=x.dtype)
    step = torch.func.grad(lambda w: (support @ w).tanh().square().sum())(p["w"])
    return energy(x @ (p["w"] - 0.1 * step))


def penalty_by_autograd(p: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad((x @ p["w"]).tanh().square().sum(), x, create_graph=True)
    return energy(g)


def adapted_by_autograd(p: Any, x: Tensor) -> Tensor:
    inner = (torch.ones(2, 4, dtype=x.dtype) @ p["w"]).tanh().square().sum()
    (step,) = torch.autograd.grad(inner, p["w"], create_graph=True)
    return energy(x @ (p["w"] - 0.1 * step))


def backward(p: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (x @ p["w"]).sum().backward(inputs=[x])
    return linear(p, x)


NESTED: dict[str, tuple[ModelFn, type[gf.GhostError], str]] = {
    "func.grad": (penalty, gf.UntrackedUseError, "'w' inside a transform of its own.*Ways out"),
    "func.jvp": (forward_penalty, gf.UntrackedUseError, "'w' inside a transform of its own"),
    "adapted": (adapted, gf.GhostError, "mode="),
    "autograd.grad": (penalty_by_autograd, gf.TransformError, "takes gradients itself.*vectorize"),
    "adapted_autograd": (adapted_by_autograd, gf.TransformError, "takes gradients itself"),
    "backward": (backward, gf.TransformError, "takes gradients itself"),
}


@pytest.mark.parametrize(("f", "error", "message"), NESTED.values(), ids=NESTED)
def test_gradients_inside_the_model(f: ModelFn, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        ghost(f, params(), draw(3, 4))


@pytest.mark.parametrize(
    ("f", "options"),
    [
        (penalty, {"mode": "jvp"}),
        (penalty, {"mode": "materialized"}),
        (forward_penalty, {"mode": "materialized"}),
        (adapted, {"mode": "jvp"}),
        (penalty_by_autograd, {"mode": "materialized", "vectorize": False}),
        (adapted_by_autograd, {"mode": "materialized", "vectorize": False}),
    ],
)
def test_ways_out_of_gradients_inside_the_model(f: ModelFn, options: Any) -> None:
    p, x, u = params(), draw(3, 4), random_direction(params())
    (grads,) = sample_grads(Problem(f, p, features(4)), x)
    dots = gf.ghost_dot_prod(f, p, x, direction=u, **options)
    assert_close(dots, sum_of(grads, u["w"]), 1e-10)


def test_gradients_that_are_constants() -> None:
    """An adversarial sample: its gradient's sign is no function of the parameters."""

    def f(p: Any, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad((x @ p["w"]).square().sum(), x)
        return linear(p, x + 0.1 * g.sign())

    check_exact(f, params(), draw(3, 4))


@everywhere
@pytest.mark.parametrize("of", [lambda p, h: h, lambda p, h: p["w"], lambda p, h: 2 * p["w"]])
def test_hooks(of: Callable[..., Tensor], options: Any) -> None:
    def f(p: Any, x: Tensor) -> Tensor:
        h = x @ p["w"]
        if of(p, h).requires_grad:
            of(p, h).register_hook(lambda g: -g)
        return energy(h)

    with pytest.raises(gf.TransformError, match=r"registers a hook.*\.detach\(\)"):
        gf.ghost_dot_prod(f, params(), draw(3, 4), draw(2, 4), **options)


# --- writes through views ---------------------------------------------------------------------


def write_to_a_view(p: Any, x: Tensor) -> Tensor:
    w = p["w"].clone()
    w[0].mul_(3)
    return energy(x @ w)


def read_a_view_of_what_is_written(p: Any, x: Tensor) -> Tensor:
    w = p["w"].clone()
    row = w[0]
    w.mul_(3)
    return energy(x @ w) + energy(x[:, :3] * row)


def write_to_another_row(p: Any, x: Tensor) -> Tensor:
    w = p["w"].clone()
    row = w[0]
    row.mul_(3)
    w[1] = row
    return energy(x @ w)


def write_to_a_view_of_a_buffer(p: Any, x: Tensor) -> Tensor:
    w = torch.zeros_like(p["w"])
    w[0].copy_(p["w"][0])
    return energy(x @ (w + 2 * p["w"]))


VIEWS = [
    write_to_a_view,
    read_a_view_of_what_is_written,
    write_to_another_row,
    write_to_a_view_of_a_buffer,
]


@pytest.mark.parametrize("f", VIEWS)
def test_writes_through_views(f: ModelFn) -> None:
    with pytest.raises((gf.InPlaceError, gf.UntrackedUseError), match=r"writes? "):
        ghost(f, params(), draw(3, 4))


def test_writes_to_rows() -> None:
    def f(p: Any, x: Tensor) -> Tensor:
        w = torch.zeros(4, 3, dtype=x.dtype)
        w[:2] = p["w"][:2]
        w[2:] = 2 * p["w"][2:]
        w[1] += p["w"][0]
        w[:, 1] *= 3
        return energy(x @ w)

    check_exact(f, params(), draw(3, 4))


def test_out_arguments() -> None:
    def f(p: Any, x: Tensor) -> Tensor:
        w = p["w"] if float(x[0, 0]) < 0 else p["w"].detach()
        out = torch.empty(len(x), 3, dtype=x.dtype)
        torch.matmul(x, w, out=out)
        return energy(out)

    with pytest.raises(RuntimeError, match=r"out=... arguments don't support automatic diff"):
        ghost(f, params(), -draw(3, 4).abs())


# --- another way through the program, later ---------------------------------------------------


class HandWritten(torch.autograd.Function):
    """`x @ w` where nobody sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return b @ w.mT, x.mT @ b


def positive(x: Tensor) -> bool:
    return bool(x[0, 0] > 0)


def gradient_switched_by_values(p: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(positive(x)):
        h = x @ p["v"]
    return energy(h + x @ p["w"])


def derived_gradient_switched_by_values(p: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(positive(x)):
        v = 2 * p["v"]
    return energy(x @ v + x @ p["w"])


def parameter_chosen_by_values(p: Any, x: Tensor) -> Tensor:
    """Read from two uses of `v`, a norm is not the sum of two norms."""
    return energy((x @ p["v"]).tanh() @ (p["v"] if positive(x) else p["w"]).mT)


def write_chosen_by_values(p: Any, x: Tensor) -> Tensor:
    h = torch.zeros_like(x)
    if positive(x):
        h[:, 0] = p["v"][0, 0]
    return energy((h + x) @ p["w"])


LATER_EXACT = [
    gradient_switched_by_values,
    derived_gradient_switched_by_values,
    parameter_chosen_by_values,
    write_chosen_by_values,
]


@pytest.mark.parametrize("first", [1, -1])
@pytest.mark.parametrize("f", LATER_EXACT)
def test_branches_that_are_followed(f: ModelFn, first: int) -> None:
    def once(p: Any, x: Tensor) -> Tensor:
        return f(p, x)

    x = draw(3, 4).abs() * first
    for batch in (x, -x, x):
        check_exact(once, params(v=(4, 3), w=(4, 3)), batch)


def unseen_use_chosen_by_values(p: Any, x: Tensor) -> Tensor:
    h = x @ p["w"]
    return energy(h + HandWritten.apply(x, p["v"]) if positive(x) else h)


def coupled_where_large(p: Any, x: Tensor) -> Tensor:
    h = x @ p["w"]
    return energy(h - h.mean(0) if positive(x) else h)


def coupled_beyond_a_threshold(p: Any, x: Tensor) -> Tensor:
    """The same ops on all batches: only a number made of all samples gives it away."""
    return energy((x / x.max().clamp(min=1)) @ p["w"])


def crowded(p: Any, x: Tensor) -> Tensor:
    """As routing does to experts that are full: what comes last is dropped."""
    return linear(p, x) * ((x[:, 0] > 0).cumsum(0) < 2)


def negatives_beyond_a_margin(p: Any, x: Tensor) -> Tensor:
    h = (x @ p["w"]).tanh()
    return linear(p, x) + F.relu(x[:, :1] * x[:, 0] - 1).mul(h @ h.mT).tril(-1).sum(1)


def scaled_if_any_is_large(p: Any, x: Tensor) -> Tensor:
    return linear(p, x) * torch.where((x > 1).any(), 0.5, 1.0)


def scaled_by_a_count(p: Any, x: Tensor) -> Tensor:
    return linear(p, x) / (1 + (x > 1).sum())


LATER_REFUSED: dict[ModelFn, type[gf.GhostError]] = {
    unseen_use_chosen_by_values: gf.UntrackedUseError,
    coupled_where_large: gf.CoupledSamplesError,
    coupled_beyond_a_threshold: gf.CoupledSamplesError,
    crowded: gf.CoupledSamplesError,
    negatives_beyond_a_margin: gf.CoupledSamplesError,
    scaled_if_any_is_large: gf.CoupledSamplesError,
    scaled_by_a_count: gf.CoupledSamplesError,
}


@pytest.mark.parametrize(("f", "error"), LATER_REFUSED.items())
def test_branches_that_are_refused(f: ModelFn, error: Any) -> None:
    p, x = params(v=(4, 3), w=(4, 3)), draw(5, 4).abs().clamp(0.1, 0.9)
    ghost(f, p, -0.1 * x)
    x[-1] += 2  # one sample in company that is none of the first
    with pytest.raises(error):
        ghost(f, p, x)


def test_a_setting_that_changes() -> None:
    setting = {"centred": False}

    def f(p: Any, x: Tensor) -> Tensor:
        h = x @ p["w"]
        return energy(h - h.mean(0) if setting["centred"] else h)

    ghost(f, params(), draw(3, 4))
    setting["centred"] = True
    with pytest.raises(gf.CoupledSamplesError):
        ghost(f, params(), draw(3, 4))


def blocks_by_column(p: Any, x: Tensor) -> Tensor:
    """Rows folded as [h, n, w]: with h = 1 they look as if samples came first."""
    n, h, w, d = x.shape
    out = x.transpose(0, 1).reshape(-1, d) @ p["w"]
    return energy(out.view(h, n, w, -1).transpose(0, 1))


def windows(p: Any, x: Tensor) -> Tensor:
    n, t, d = x.shape
    out = x.view(n, t // 2, 2, d).transpose(0, 1).flatten(0, 2) @ p["w"]
    return energy(out.view(t // 2, n, 2, -1).transpose(0, 1))


def tiled(p: Any, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    out = x.flatten(0, 1).repeat(t // 2, 1) @ p["w"]
    return energy(out.view(t // 2, n, t, -1).transpose(0, 1))


@pytest.mark.parametrize(
    ("f", "short", "long"),
    [
        (blocks_by_column, (3, 1, 2, 4), (3, 3, 2, 4)),
        (windows, (3, 2, 4), (3, 4, 4)),
        (tiled, (3, 2, 4), (3, 4, 4)),
    ],
)
def test_folds_that_show_in_longer_batches(f: ModelFn, short: Any, long: Any) -> None:
    """Samples between two other axes: with one row before them they look sample-major."""
    check_exact(f, params(), draw(*short))
    check_exact(f, params(), draw(*long))


def test_an_order_of_ones_own() -> None:
    def all_but_the_last_reversed(p: Any, x: Tensor) -> Tensor:
        order = torch.cat([torch.arange(len(x) - 1).flip(0), torch.tensor([len(x) - 1])])
        return energy((x[order] @ p["w"])[order])

    with pytest.raises(gf.CoupledSamplesError, match="in an order that model_fn makes"):
        ghost(all_but_the_last_reversed, params(), draw(5, 4))


@pytest.mark.parametrize("seed", range(6))
def test_an_order_drawn_at_random(seed: int) -> None:
    def shuffled(p: Any, x: Tensor) -> Tensor:
        order = torch.randperm(len(x))
        return energy((x[order] @ p["w"])[order.argsort()])

    torch.manual_seed(seed)
    with pytest.raises(gf.GhostError, match="rows"):
        gf.ghost_dot_prod(shuffled, params(), *[draw(5, 4)] * 2, randomness="different")


# --- functions that are not pure, or couple samples in secret ---------------------------------


@everywhere
def test_state_kept_between_calls(options: Any) -> None:
    calls: list[None] = []

    def f(p: Any, x: Tensor) -> Tensor:
        calls.append(None)
        return linear(p, x) * len(calls)

    with pytest.raises(gf.CoupledSamplesError, match="state kept between calls"):
        gf.ghost_dot_prod(f, params(), draw(3, 4), draw(2, 4), **options)


@pytest.mark.parametrize("mode", ["ghost", "jvp"])
def test_gradients_that_couple_samples_where_losses_do_not(mode: str) -> None:
    def f(p: Any, x: Tensor) -> Tensor:
        h = x @ p["w"]
        return energy(h + h.mean(0) - h.mean(0).detach())

    with pytest.raises(gf.CoupledSamplesError, match="depends on the others"):
        gf.ghost_dot_prod(f, params(), draw(3, 4), draw(2, 4), mode=mode)


def test_power_iterations_of_spectral_norm() -> None:
    f, p = of_module(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3).double()))
    with pytest.raises(gf.InPlaceError, match="writes to buffer"):
        ghost(f, p, draw(3, 4))


def not_overridable(x: Tensor, w: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return x @ w


@pytest.mark.parametrize(
    "product", [not_overridable, lambda x, w: x @ w.as_subclass(Tensor), torch.ops.aten.mm]
)
def test_products_behind_the_scenes(product: Callable[..., Tensor]) -> None:
    with pytest.raises((gf.UntrackedUseError, gf.UnsupportedOpError), match=r"'w'.*Ways out"):
        ghost(lambda p, x: energy(product(x, p["w"])), params(), draw(3, 4))


def branch(p: Any, x: Tensor) -> Tensor:
    return energy(torch.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: 2 * x @ p["w"], (x,)))


@everywhere
def test_operators_that_take_functions(options: Any) -> None:
    with pytest.raises(gf.UnsupportedOpError, match=r"torch.cond.*torch.where"):
        gf.ghost_dot_prod(branch, params(), draw(3, 4), draw(2, 4), **options)


# --- gradients that are not finite ------------------------------------------------------------


def root(p: Any, x: Tensor) -> Tensor:
    """The derivative of a square root at zero is infinite, and zero times that is NaN."""
    return (x @ p["w"]).square().sum(-1).sqrt() + linear(p, x)


def root_of_folded(p: Any, x: Tensor) -> Tensor:
    h = (x.flatten(0, 1) @ p["w"]).view(*x.shape[:2], -1)
    return h.square().sum(-1).sqrt().sum(1)


@everywhere
@pytest.mark.parametrize("bad", [0, 1, 3])
@pytest.mark.parametrize(("f", "shape"), [(root, (4, 4)), (root_of_folded, (4, 3, 4))])
def test_a_gradient_that_is_not_a_number(f: ModelFn, shape: Any, bad: int, options: Any) -> None:
    """It is NaN, as autograd has it: that sample's alone, in every mode."""
    x = draw(*shape)
    x[bad] = 0
    others = [i for i in range(4) if i != bad]
    p, u = params(), random_direction(params())
    scores = gf.ghost_dot_prod(f, p, x, direction=u, **options)
    assert scores[bad].isnan()
    (grads,) = sample_grads(Problem(f, p, features(4)), x)
    assert_close(scores[others], sum_of(grads, u["w"])[others], 1e-10)


def test_verify_compares_what_is_no_number() -> None:
    x = draw(4, 4)
    x[2] = 0
    report = gf.verify(root, params(), x, draw(2, 4))
    assert report.ok
    assert "nan" in str(report)


# --- degenerate sizes and dtypes --------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 1, 2])
@pytest.mark.parametrize("n", [1, 3])
def test_short_sequences(n: int, t: int) -> None:
    def f(p: Any, x: Tensor) -> Tensor:
        start = p["b"].expand(len(x), 1, 3)
        return energy(torch.cat([start, x @ p["w"]], 1))

    check_exact(f, params(w=(4, 3), b=(3,)), draw(n, t, 4))


def test_a_scalar_parameter_does_not_promote() -> None:
    """A float64 scalar times float32 samples is float32, and so are its copies."""

    def f(p: Any, x: Tensor) -> Tensor:
        return energy(F.linear(x * p["scale"], p["w"]))

    p = {"scale": torch.tensor(0.5, dtype=torch.float64), "w": torch.randn(3, 4)}
    assert gf.verify(f, p, torch.randn(3, 4), torch.randn(2, 4), tolerance=1e-4).ok


# --- functions of all kinds -------------------------------------------------------------------


class Scaled:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def loss(self, p: Any, x: Tensor) -> Tensor:
        return energy(self.scale * x @ p["w"])


def scaled(scale: float, p: Any, x: Tensor) -> Tensor:
    return energy(scale * x @ p["w"])


@pytest.mark.parametrize("f", [Scaled(2.0).loss, functools.partial(scaled, 2.0)])
def test_methods_and_partial_functions(f: ModelFn) -> None:
    for n in (3, 4):
        check_exact(f, params(), draw(n, 4))


# --- one module in several threads ------------------------------------------------------------


@contextmanager
def short_turns() -> Iterator[None]:
    """Threads take turns after every few instructions."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_threads_that_share_a_module() -> None:
    net = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(12)]).double()
    whole, part = of_module(net), of_module(net[3])
    before = [id(p) for p in net.parameters()]

    def score(model: Model, seed: int) -> Tensor:
        return gf.ghost_dot_prod(*model, draw(3, 4, seed=seed), draw(2, 4))

    jobs = [(whole, 0), (part, 1), (whole, 2), (part, 3)]
    expected = [score(*job) for job in jobs]
    start = threading.Barrier(len(jobs))

    def many(job: Any) -> Sequence[Tensor]:
        start.wait()
        return [score(*job) for _ in range(8)]

    with short_turns(), ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(many, jobs))
    for scores, wanted in zip(found, expected, strict=True):
        assert_close(list(scores), [wanted] * 8, 1e-12)
    assert [id(p) for p in net.parameters()] == before, "the module has lost its parameters"


def test_a_module_that_calls_itself() -> None:
    """A thread may come back to a module that it has lent parameters."""
    net = nn.Linear(4, 3).double()
    inner, _ = gf.from_module(net, lambda m, x: energy(m(x)))

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        own = dict(module.named_parameters())
        return energy(module(x)) + inner({k: 2 * p for k, p in own.items()}, x)

    f, p = gf.from_module(net, loss)
    check_exact(f, p, draw(3, 4))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def test_a_checkpoint_with_other_parameters() -> None:
    """What is computed again in the backward pass uses the parameters that were given."""
    x, net = draw(3, 4), Checkpointed()
    f, p = of_module(net)
    p = {k: 2 * v + 0.1 for k, v in p.items()}
    got = gf.ghost_dot_prod(f, p, x, x, mode="materialized", vectorize=False)
    plain, _ = gf.from_module(net, lambda m, x: energy(m.inner(x)))
    assert_close(got, gf.ghost_dot_prod(plain, p, x, x), 1e-10)
