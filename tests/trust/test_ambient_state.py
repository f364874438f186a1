"""What a call relies on, it relies on in the state that it is called in.

A trace is made, and proved, in one call; the next call may come under another default, another
mode, another transform, or of a function that closes over other values. Every public call is made
in every state by a function that was never called, by one that was called plainly before, and
plainly after a call in that state. All of them have the numbers of the definition, or the same
error of ours.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

import ghostfunc as gf
from tests.every_quantity import loop

FLOAT = torch.float64
_made = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_made, dtype=FLOAT)


W = {"w": draw(5, 5), "v": draw(5)}
TRAIN, VAL, PERM = {"x": draw(4, 5)}, {"x": draw(2, 5)}, torch.tensor([1, 0, 3, 2, 5, 4])
EYE, MIXED = torch.eye(6, dtype=FLOAT), draw(6, 6)


def flat(tree: Any) -> Tensor:
    """Rows of all leaves, `[n, size]`."""
    return torch.cat([x.reshape(len(x), -1) for x in optree.tree_leaves(tree)], dim=1)


def vector(tree: Any) -> Tensor:
    return torch.cat([x.reshape(-1) for x in optree.tree_leaves(tree)])


def projection(params: Any) -> gf.Projection:
    return gf.kronecker_projection(params, rank_total=6, rank_min=2, kind="rademacher", seed=0)


def along(f: Any, p: Any, b: Any, u: Any, **options: Any) -> Tensor:
    return gf.ghost_dot_prod(f, p, b, direction=u, **options)


def clipped(g: Tensor) -> Tensor:
    return (g * (0.5 / g.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)


def _step(f: Any, p: Any, b: Any, v: Any) -> Tensor:
    step = gf.ghost_value_and_grad(f, p, b, v)
    return torch.cat([vector(step.grads), step.dot_prods])


class Call(NamedTuple):
    """A public call, and its definition by gradients of train and validation samples."""

    ask: Callable[[Any, Any, Any, Any], Tensor]
    want: Callable[[Tensor, Tensor], Tensor]


CALLS = {
    "norms": Call(lambda f, p, b, v: gf.ghost_norm(f, p, b), lambda g, v: g.norm(dim=1)),
    "norms in chunks": Call(
        lambda f, p, b, v: gf.ghost_norm(f, p, b, chunk_size=3), lambda g, v: g.norm(dim=1)
    ),
    "norms materialized": Call(
        lambda f, p, b, v: gf.ghost_norm(f, p, b, mode="materialized"), lambda g, v: g.norm(dim=1)
    ),
    "kept norms": Call(
        lambda f, p, b, v: gf.factored_grads(f, p, b).norms(), lambda g, v: g.norm(dim=1)
    ),
    "gram": Call(lambda f, p, b, v: gf.ghost_gram(f, p, b), lambda g, v: g @ g.T),
    "scores": Call(gf.ghost_dot_prod, lambda g, v: g @ v.mean(0)),
    "pairs": Call(
        lambda f, p, b, v: gf.ghost_dot_prod(f, p, b, v, reduction="none"), lambda g, v: g @ v.T
    ),
    "scores by jvp": Call(
        lambda f, p, b, v: gf.ghost_dot_prod(f, p, b, v, mode="jvp"), lambda g, v: g @ v.mean(0)
    ),
    "scores in a loop": Call(
        lambda f, p, b, v: gf.ghost_dot_prod(f, p, b, v, mode="materialized", vectorize=False),
        lambda g, v: g @ v.mean(0),
    ),
    "step": Call(_step, lambda g, v: torch.cat([g.mean(0), g @ v.mean(0)])),
    "clipped": Call(
        lambda f, p, b, v: vector(gf.ghost_clipped_grad(f, p, b, max_norm=0.5)[0]),
        lambda g, v: clipped(g),
    ),
    "sample gradients": Call(
        lambda f, p, b, v: flat(gf.per_sample_grads(f, p, b, mode="ghost")), lambda g, v: g
    ),
    "by vmap": Call(lambda f, p, b, v: flat(gf.per_sample_grads(f, p, b)), lambda g, v: g),
    "direction": Call(lambda f, p, b, v: vector(gf.direction(f, p, v)), lambda g, v: v.mean(0)),
    "over directions": Call(
        lambda f, p, b, v: torch.vmap(lambda c: along(f, p, b, scaled(p, c)))(
            torch.tensor([1.0, 2.0], dtype=FLOAT, device="cpu")
        ),
        lambda g, v: torch.stack([g.sum(1), 2 * g.sum(1)]),
    ),
    "moved direction": Call(
        lambda f, p, b, v: torch.func.jvp(
            lambda c: along(f, p, b, scaled(p, c)),
            (torch.ones((), dtype=FLOAT, device="cpu"),),
            (torch.ones((), dtype=FLOAT, device="cpu"),),
        )[1],
        lambda g, v: g.sum(1),
    ),
}


def scaled(p: Any, c: Tensor) -> Any:
    """A direction of equal entries."""
    return optree.tree_map(lambda x: c.to(x.dtype) * torch.ones_like(x), p)


class Told(NamedTuple):
    """What became of a call: its numbers, or the error that it raised."""

    value: Tensor | None
    error: type[gf.GhostError] | None = None
    start: str = ""

    def same(self, other: Told) -> bool:
        if self.value is None or other.value is None:
            return (self.error, self.start) == (other.error, other.start)
        return close(self.value, other.value)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-10 * b.abs().max())


def told(call: Call, *given: Any) -> Told:
    """Errors that are not of ours fail the test."""
    try:
        return Told(call.ask(*given).detach())
    except gf.GhostError as error:
        return Told(None, type(error), str(error)[:30])


def definition(call: Call, f: Any, p: Any, b: Any, v: Any) -> Tensor:
    with torch.enable_grad():
        return call.want(flat(loop(f, p, b)), flat(loop(f, p, v)))


def mlp(p: Any, b: Any) -> Tensor:
    return torch.tanh(torch.tanh(b["x"] @ p["w"]) @ p["w"].t() * 0.5) @ p["v"]


# --- states of torch ----------------------------------------------------------------------------


class Listens(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class ListensToOps(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Doubles(TorchFunctionMode):
    """Changes what matrix products return: those of the model, and those of ghost mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2 if "mm" in func.__name__ or "matmul" in func.__name__ else out


@contextlib.contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def both(*states: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for state in states:
            stack.enter_context(state)
        yield


OF_TRANSFORMS = ("over directions", "moved direction")
STATES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "no_grad": (torch.no_grad, ()),
    "enable_grad in no_grad": (lambda: both(torch.no_grad(), torch.enable_grad()), ()),
    "inference_mode": (torch.inference_mode, tuple(x for x in CALLS if x != "moved direction")),
    "autocast": (lambda: torch.autocast("cpu", dtype=torch.bfloat16), ()),
    "default dtype": (lambda: default(torch.bfloat16), ()),
    "default device": (lambda: torch.device("meta"), ()),
    "deterministic": (deterministic, ()),
    "saved-tensor hooks": (save_on_cpu, OF_TRANSFORMS),
    "function mode": (Listens, ()),
    "dispatch mode": (ListensToOps, ()),
}
"""States, and the calls that they refuse."""


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("state", STATES)
def test_states_of_torch(state: str, name: str) -> None:
    call, (enter, refused) = CALLS[name], STATES[state]
    want = definition(call, mlp, W, TRAIN, VAL)
    new, known = (lambda p, b: mlp(p, b)), (lambda p, b: mlp(p, b))
    with enter():
        cold = told(call, new, W, TRAIN, VAL)
    assert told(call, known, W, TRAIN, VAL).same(Told(want))
    with enter():
        warm = told(call, known, W, TRAIN, VAL)
    assert warm.same(cold), (cold, warm)
    assert cold.error is gf.TransformError if name in refused else cold.same(Told(want)), cold
    assert told(call, new, W, TRAIN, VAL).same(Told(want))


@pytest.mark.parametrize("name", ["norms", "gram", "scores", "step", "clipped", "kept norms"])
def test_modes_that_change_values(name: str) -> None:
    """They are proved anew: the products of ghost mode are changed, and those of autograd not."""
    new, known = (lambda p, b: mlp(p, b)), (lambda p, b: mlp(p, b))
    assert told(CALLS[name], known, W, TRAIN, VAL).error is None
    with Doubles():
        cold = told(CALLS[name], new, W, TRAIN, VAL)
        warm = told(CALLS[name], known, W, TRAIN, VAL)
    assert cold.error is gf.SampleAxisError
    assert warm.same(cold)


def test_rounding_of_autocast_is_no_coupling() -> None:
    """A trace of plain calls knows nothing of bfloat16: what rounding is differs under autocast."""
    net = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1))
    model_fn, params = gf.from_module(net, lambda m, x: 100 * m(x)[:, 0])
    x = draw(12, 5).float()
    gf.ghost_norm(model_fn, params, x[:4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gf.ghost_norm(model_fn, params, x)
        want = flat(loop(model_fn, params, x)).norm(dim=1)
    torch.testing.assert_close(got, want, rtol=0.05, atol=0)


# --- what a function closes over ----------------------------------------------------------------


class Change(NamedTuple):
    """A function of a box, and what is in the box at first and later."""

    losses: Callable[[Any, Any, Any], Tensor]
    first: Any
    later: Any
    error: type[gf.GhostError] | None = None


def _head(h: Tensor, p: Any) -> Tensor:
    return torch.tanh(h) @ p["v"]


def _hidden(f: Callable[[Tensor, Any], Tensor]) -> Callable[[Any, Any, Any], Tensor]:
    return lambda c, p, b: _head(f(b["x"] @ p["w"], c.now), p)


def _switched(c: Any, p: Any, b: Any) -> Tensor:
    with torch.set_grad_enabled(c.now):
        return _head(b["x"] @ p["w"], p)


RANDOM, COUPLED = gf.RandomnessError, gf.CoupledSamplesError
CHANGES = {
    "float": Change(_hidden(lambda h, c: h * c), 1.0, 2.0),
    "float from zero": Change(_hidden(lambda h, c: h + c * h.sin()), 0.0, 0.5),
    "tensor": Change(_hidden(lambda h, c: h * c), EYE[0, :5], MIXED[0, :5]),
    "derived": Change(lambda c, p, b: _head(b["x"] @ (p["w"] * c.now), p), 1.0, 0.5),
    "columns": Change(
        lambda c, p, b: _head(b["x"] @ p["w"][:, c.now], p), [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]
    ),
    "detach": Change(_hidden(lambda h, c: h.detach() if c else h), False, True),
    "dropout's rate": Change(_hidden(lambda h, c: F.dropout(h, c, True)), 0.0, 0.5, RANDOM),
    "rate from one": Change(_hidden(lambda h, c: h + F.dropout(h, c, True)), 1.0, 0.5, RANDOM),
    "dropout's mode": Change(_hidden(lambda h, c: F.dropout(h, 0.5, c)), False, True, RANDOM),
    "alpha dropout": Change(_hidden(lambda h, c: F.alpha_dropout(h, c, True)), 0.0, 0.5, RANDOM),
    "attention's dropout": Change(
        _hidden(
            lambda h, c: F.scaled_dot_product_attention(*[h[:, None, :, None]] * 3, dropout_p=c)[
                :, 0, :, 0
            ]
        ),
        0.0,
        0.5,
        RANDOM,
    ),
    "mean": Change(_hidden(lambda h, c: h - c * h.mean(0)), 0.0, 1.0, COUPLED),
    "mean by a flag": Change(_hidden(lambda h, c: h - h.mean(0) if c else h), False, True, COUPLED),
    "mixing": Change(_hidden(lambda h, c: c[: len(h), : len(h)] @ h), EYE, MIXED, COUPLED),
    "index": Change(_hidden(lambda h, c: h[c[: len(h)] % len(h)]), PERM.sort()[0], PERM, COUPLED),
    "mask": Change(
        _hidden(lambda h, c: torch.where(c[: len(h), None], h, h.flip(0))),
        PERM >= 0,
        PERM < 0,
        COUPLED,
    ),
    "roll": Change(_hidden(lambda h, c: h.roll(c, 0)), 0, 1, COUPLED),
    "no gradient": Change(_switched, True, False, gf.UntrackedUseError),
    "write": Change(
        lambda c, p, b: _head((b["x"].mul_(1.5) if c.now else b["x"] * 1.5) @ p["w"], p),
        False,
        True,
        gf.InPlaceError,
    ),
}
WATCHED = ("norms", "kept norms", "step", "scores by jvp", "by vmap", "direction")
"""One call of every kind."""


_FOLLOWED = [
    (change, name)
    for change in CHANGES
    for name in (*WATCHED, *(OF_TRANSFORMS if "attention" not in change else ()))
]
"""Attention has no second derivative that transforms could take."""


@pytest.mark.parametrize(("change", "name"), _FOLLOWED)
def test_what_functions_close_over(change: str, name: str) -> None:
    call, (losses, first, later, error) = CALLS[name], CHANGES[change]
    if name == "direction" and error is COUPLED:
        return  # one pass of plain autograd, in which no way is known: the gradient of these losses

    def fresh(now: Any) -> tuple[SimpleNamespace, Any, Any]:
        box = SimpleNamespace(now=now)
        return box, (lambda p, b: losses(box, p, b)), ({"x": TRAIN["x"].clone()}, VAL)

    _, new, batches = fresh(later)
    cold = told(call, new, W, *batches)
    box, known, batches = fresh(first)
    assert told(call, known, W, *batches).same(Told(definition(call, known, W, *batches)))
    box.now = later
    warm = told(call, known, W, *batches)
    assert cold.error is error
    assert warm.error is error, warm
    if error is None:
        assert warm.same(Told(definition(call, known, W, *batches)))
    box.now = first
    _, _, batches = fresh(first)
    assert told(call, known, W, *batches).same(Told(definition(call, known, W, *batches)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.drop, self.b = nn.Linear(5, 4), nn.Dropout(0.0), nn.Linear(4, 1)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.tanh(self.a(x))) * self.scale)[:, 0]


def _patch(net: Net) -> None:
    net.a.forward = lambda x: F.linear(x, net.a.weight) * 3  # type: ignore[method-assign]


MODULES: dict[str, tuple[Callable[[Net], object], type[gf.GhostError] | None]] = {
    "attribute": (lambda net: setattr(net, "scale", 2.0), None),
    "hook": (lambda net: net.a.register_forward_hook(lambda m, i, o: o * 2), None),
    "pre-hook": (lambda net: net.b.register_forward_pre_hook(lambda m, i: (i[0].sin(),)), None),
    "backward hook": (
        lambda net: net.b.register_full_backward_hook(lambda m, i, o: (i[0] * 2,)),
        None,
    ),
    "submodule": (lambda net: setattr(net, "drop", nn.Tanh()), None),
    "method": (_patch, None),
    "rate": (lambda net: setattr(net.drop, "p", 0.5), RANDOM),
    "frozen": (lambda net: net.a.weight.requires_grad_(False), None),
}


@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.parametrize("change", MODULES)
def test_what_becomes_of_modules(change: str, name: str) -> None:
    def fresh() -> tuple[Net, Any, Any]:
        net = Net().double()
        return net, *gf.from_module(net, lambda m, b: m(b["x"]))

    (act, error), call = MODULES[change], CALLS[name]
    net, new, params = fresh()
    act(net)
    cold = told(call, new, params, TRAIN, VAL)
    if change == "backward hook" and name == "scores by jvp":
        return  # forward mode runs no backward pass, nor its hooks
    net, known, params = fresh()
    told(call, known, params, TRAIN, VAL)
    act(net)
    warm = told(call, known, params, TRAIN, VAL)
    assert warm.same(cold), (cold, warm)
    assert cold.error in (error, None, gf.ControlFlowError)
    if cold.value is not None:
        assert cold.same(Told(definition(call, known, params, TRAIN, VAL)))


# --- transforms outside -------------------------------------------------------------------------

_DIFFERENTIABLE = [x for x in CALLS if x not in OF_TRANSFORMS]


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", _DIFFERENTIABLE)
def test_derivatives_by_what_is_closed_over(name: str, warm: bool) -> None:
    """In reverse mode, they were zeros."""
    box = SimpleNamespace(now=torch.ones((), dtype=FLOAT))

    def model_fn(p: Any, b: Any) -> Tensor:
        return _head(b["x"] @ p["w"] * box.now, p)

    def of(s: Tensor) -> Tensor:
        box.now = s
        return CALLS[name].ask(model_fn, W, TRAIN, VAL).sin().sum()

    one, h = torch.ones((), dtype=FLOAT), 1e-5
    if warm:
        of(one)
    found = torch.func.grad(of)(one), torch.func.jvp(of, (one,), (one,))[1]
    want = (of(one + h) - of(one - h)) / (2 * h)
    torch.testing.assert_close(torch.stack(found), want.expand(2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", _DIFFERENTIABLE)
def test_what_cannot_be_followed(name: str, warm: bool) -> None:
    """torch.vmap over parameters, batches and what is closed over; tensors with tangents."""
    box = SimpleNamespace(now=torch.ones((), dtype=FLOAT))
    ask = CALLS[name].ask

    def model_fn(p: Any, b: Any) -> Tensor:
        return _head(b["x"] @ p["w"] * box.now, p)

    def closed_over(s: Tensor) -> Tensor:
        box.now = s
        return ask(model_fn, W, TRAIN, VAL)

    two = torch.stack([torch.ones((), dtype=FLOAT)] * 2)
    if warm:
        ask(model_fn, W, TRAIN, VAL)
    over: list[Callable[[Tensor], Tensor]] = [
        lambda s: ask(model_fn, optree.tree_map(lambda x: x * s, W), TRAIN, VAL),
        lambda s: ask(model_fn, W, {"x": TRAIN["x"] * s}, {"x": VAL["x"] * s}),
        closed_over,
    ]
    for f in over:
        with pytest.raises(gf.TransformError, match=r"torch\.vmap"):
            torch.vmap(f)(two)
        box.now = torch.ones((), dtype=FLOAT)
    with forward_ad.dual_level():
        dual = {k: forward_ad.make_dual(x, x) for k, x in W.items()}
        with pytest.raises(gf.TransformError, match="forward_ad"):
            ask(model_fn, dual, TRAIN, VAL)


def test_no_tensor_is_made_on_the_callers_device() -> None:
    """The package names the device of every tensor that it makes: that of a parameter, or the CPU.
    Under `torch.set_default_device` its own would be elsewhere."""
    makers = {f.__name__ for f in _device_constructors()}
    for path in sorted(Path(gf.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            made = ast.unparse(node.func).removeprefix("torch.")
            if made in makers and ast.unparse(node.func) != made:
                named = any(k.arg == "device" for k in node.keywords)
                assert named or "counted" in ast.unparse(node), f"{path}:{node.lineno}"


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("mode", ["ghost", "materialized", "jvp"])
@pytest.mark.parametrize("randomness", ["error", "different"])
def test_draws_inside_a_vmap_that_allows_none(randomness: str, mode: str, known: bool) -> None:
    drop = nn.Dropout(0.5)

    def model(p: Any, b: Any) -> Tensor:
        return drop(b["x"] @ p["w"]).square().sum(1)

    options: dict[str, Any] = {"randomness": randomness, "mode": mode}

    def scores(u: Any) -> Tensor:
        return gf.ghost_dot_prod(model, {"w": W["w"]}, TRAIN, direction=u, **options)

    along = {"w": torch.stack([W["w"], -W["w"]])}
    if known:
        drop.eval()
        torch.vmap(scores)(along)
        drop.train()
    with pytest.raises(gf.RandomnessError, match="draws random numbers"):
        torch.vmap(scores)(along)


@pytest.mark.parametrize("mode", ["ghost", "materialized", "jvp"])
def test_directions_of_a_vmap_that_allows_no_draws(mode: str) -> None:
    """What a call draws itself is nobody's randomness."""
    along = {k: torch.stack([x, -2 * x]) for k, x in W.items()}

    def scores(u: Any) -> Tensor:
        return gf.ghost_dot_prod(lambda p, b: mlp(p, b), W, TRAIN, direction=u, mode=mode)

    want = gf.ghost_dot_prod(mlp, W, TRAIN, direction=W, mode="materialized")
    torch.testing.assert_close(torch.vmap(scores)(along), torch.stack([want, -2 * want]))
