"""Broadcasting, repeating, writing in place, and making tensors of parameters alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import Tensor, nn

import ghostfunc as gf
from ghostfunc.testing import Case, check_rule

sizes = st.integers(1, 3)


@given(st.lists(sizes, max_size=3), st.data())
def test_broadcasting(sample: list[int], data: Any) -> None:
    """A parameter with fewer axes, or axes of size 1, or axes that the samples have of size 1."""
    shape = tuple(1 if data.draw(st.booleans()) else s for s in sample)
    sample_shape = tuple(1 if data.draw(st.booleans()) else s for s in sample)
    shape = shape[data.draw(st.integers(0, len(shape))) :]
    leading = (1,) if data.draw(st.booleans()) and len(shape) == len(sample) else ()
    check_rule(
        Tensor.mul,
        [Case(lambda p, x: x["x"] * p["w"], {"w": leading + shape}, {"x": sample_shape})],
    )


BROADCASTING: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "add with alpha": (torch.add, lambda w, x: torch.add(x, w, alpha=2)),
    "sub": (Tensor.sub, lambda w, x: w - x),
    "number minus": (torch.rsub, lambda w, x: torch.rsub(w, x)),
    "div": (Tensor.div, lambda w, x: x / w),
    "reciprocal": (Tensor.__rtruediv__, lambda w, x: 1 / w + w.__rtruediv__(x)),
    "pow": (Tensor.__pow__, lambda w, x: x.abs() ** w),
    "rpow": (Tensor.__rpow__, lambda w, x: w.__rpow__(x.abs())),
    "maximum": (torch.maximum, lambda w, x: torch.maximum(x, w)),
    "clamp": (torch.clamp, lambda w, x: torch.clamp(x, min=w - 1, max=w + 0.1)),
    "clamp_min": (Tensor.clamp_min, lambda w, x: x.clamp_min(w)),
    "addcmul": (torch.addcmul, lambda w, x: torch.addcmul(x, w, x, value=0.5)),
    "addcdiv": (Tensor.addcdiv, lambda w, x: x.addcdiv(x, 2 + w.square())),
    "lerp": (torch.lerp, lambda w, x: torch.lerp(x, w, w)),
    "where": (torch.where, lambda w, x: torch.where(x > 0, x, w)),
    "where of parameters": (torch.where, lambda w, x: torch.where(x > 0, w, 2 * w)),
    "atan2": (torch.atan2, lambda w, x: torch.atan2(x, w)),
    "hypot": (torch.hypot, lambda w, x: torch.hypot(x, w)),
    "logaddexp": (torch.logaddexp, lambda w, x: torch.logaddexp(x, w)),
    "remainder": (torch.remainder, lambda w, x: torch.remainder(x, w.abs() + 1)),
    "copysign": (torch.copysign, lambda w, x: torch.copysign(w, x)),
    "xlogy": (torch.xlogy, lambda w, x: torch.xlogy(x, w.abs())),
}


@pytest.mark.parametrize("name", BROADCASTING)
def test_broadcasting_ops(name: str) -> None:
    op, function = BROADCASTING[name]
    check_rule(
        op,
        [
            Case(lambda p, x: function(p["w"], x["x"]), {"w": (3,)}, {"x": (2, 3)}, "sequences"),
            Case(
                lambda p, x: function(p["w"], x["x"].transpose(0, 1)).transpose(0, 1),
                {"w": (3,)},
                {"x": (2, 3)},
                "time first",
            ),
            Case(
                lambda p, x: function(p["w"], x["x"].flatten(0, 1)).unflatten(0, x["x"].shape[:2]),
                {"w": (3,)},
                {"x": (2, 3)},
                "folded",
            ),
        ],
    )


REPEATING: dict[str, tuple[Any, Any, Callable[[Tensor, int], Tensor]]] = {
    "expand": (Tensor.expand, (1, 2, 3), lambda w, n: w.expand(n, -1, -1)),
    "expand, new axes": (Tensor.expand, (3,), lambda w, n: w.expand(n, 2, 3)),
    "expand, a size": (Tensor.expand, (3,), lambda w, n: w.expand((n, 3))),
    "expand a scalar": (Tensor.expand, (), lambda w, n: w.expand(n)),
    "expand_as": (Tensor.expand, (3,), lambda w, n: w.expand_as(torch.empty(n, 2, 3))),
    "broadcast_to": (torch.broadcast_to, (3,), lambda w, n: torch.broadcast_to(w, (n, 2, 3))),
    "time first": (Tensor.expand, (2, 1, 3), lambda w, n: w.expand(2, n, 3).movedim(1, 0)),
    "repeat": (Tensor.repeat, (1, 2, 3), lambda w, n: w.repeat(n, 1, 2)),
    "repeat, new axes": (Tensor.repeat, (2, 3), lambda w, n: w.repeat(n, 2, 1, 1)),
    "repeat, folded": (Tensor.repeat, (2, 3), lambda w, n: w.repeat(n, 1).unflatten(0, (n, 2))),
    "repeat, folded and more": (
        Tensor.repeat,
        (2, 3),
        lambda w, n: w.repeat(2 * n, 1).unflatten(0, (n, 4)),
    ),
    "repeat, time first": (Tensor.repeat, (2, 1, 3), lambda w, n: w.repeat(1, n, 1).movedim(1, 0)),
    "tile": (torch.tile, (2, 3), lambda w, n: torch.tile(w, (n, 1, 1))),
    "tile a method": (Tensor.tile, (1, 3), lambda w, n: w.tile(n, 2)),
    "repeat_interleave": (
        torch.repeat_interleave,
        (2, 3),
        lambda w, n: torch.repeat_interleave(w, n, 0).unflatten(0, (2, n)).movedim(1, 0),
    ),
    "repeat_interleave a row": (
        Tensor.repeat_interleave,
        (1, 3),
        lambda w, n: w.repeat_interleave(n, dim=0),
    ),
}


@pytest.mark.parametrize("name", REPEATING)
def test_repeating(name: str) -> None:
    op, shape, function = REPEATING[name]

    def call(p: Any, x: Any) -> Tensor:
        out = function(p["w"], len(x["x"]))
        return out.flatten(1 if out.ndim > 1 else 0).reshape(len(out), -1) * x["x"][:, None]

    check_rule(op, [Case(call, {"w": shape}, {"x": ()})])


@given(st.sampled_from(["class token", "prompt", "both ends"]), st.booleans(), sizes)
def test_tokens_joined_to_sequences(where: str, time_first: bool, t: int) -> None:
    def call(p: Any, x: Any) -> Tensor:
        n, axis = len(x["x"]), 0 if time_first else 1
        token = p["token"][:, None] if time_first else p["token"][None]
        token = token.expand(-1, n, -1) if time_first else token.expand(n, -1, -1)
        body = x["x"].transpose(0, 1) if time_first else x["x"]
        parts = {
            "class token": [token[:1] if time_first else token[:, :1], body],
            "prompt": [token, body],
            "both ends": [token, body, token],
        }[where]
        y = torch.cat(parts, axis) @ p["w"]
        return y.transpose(0, 1) if time_first else y

    check_rule(Tensor.expand, [Case(call, {"token": (2, 4), "w": (4, 3)}, {"x": (t, 4)})])


def test_layer_scale() -> None:
    def call(p: Any, x: Any) -> Tensor:
        return x["x"] + p["gamma"] * F.gelu(F.linear(x["x"], p["w"]))

    check_rule(Tensor.mul, [Case(call, {"gamma": (4,), "w": (4, 4)}, {"x": (3, 4)})])


# --- in place -------------------------------------------------------------------------------------


def of(x: Any) -> Tensor:
    return x["x"] * 1.0


def written(p: Any, x: Any) -> Tensor:
    y = of(x)
    y[:, 0] = p["w"]
    y[..., 1] = p["w"][0]
    return y


def written_where(p: Any, x: Any) -> Tensor:
    y = of(x)
    y[y > 1] = p["w"][0]
    y[x["x"][..., 0] > 0] = p["w"]
    return y


def filled(p: Any, x: Any) -> Tensor:
    y = of(x)
    y.masked_fill_(x["x"] > 1, p["w"][0])
    return y.masked_fill(x["x"] < -1, p["w"].sum())


def copied(p: Any, x: Any) -> Tensor:
    y = of(x)
    y[:, 0].copy_(p["w"])
    return y


def arithmetic(p: Any, x: Any) -> Tensor:
    y = of(x)
    y += p["w"]
    y.mul_(p["w"])
    y.sub_(p["w"]).div_(p["w"].exp())
    y[:, 1:] += p["w"]
    return y.addcmul_(p["w"], p["w"]).clamp_(max=p["w"] + 2)


def buffer(p: Any, x: Any) -> Tensor:
    w = torch.zeros(2, 3, dtype=torch.float64)
    w[0] = p["w"]
    w.add_(p["w"])
    return x["x"] @ w.T


def derived(p: Any, x: Any) -> Tensor:
    w = p["w"] * 1.5
    w[0] = 0
    w.mul_(2).add_(p["w"])
    F.relu(w, inplace=True)
    return x["x"] * w


@pytest.mark.parametrize(
    "call", [written, written_where, filled, copied, arithmetic, buffer, derived]
)
def test_in_place(call: Callable[[Any, Any], Tensor]) -> None:
    ops = {"written": Tensor.expand, "copied": Tensor.copy_, "arithmetic": Tensor.mul_}
    ops |= {"buffer": Tensor.matmul, "derived": Tensor.mul}
    op = ops.get(call.__name__, torch.where)
    check_rule(op, [Case(call, {"w": (3,)}, {"x": (2, 3)})])


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        lambda w: F.relu(w, inplace=True),
        lambda w: w.__setitem__(0, 0.0),
    ],
)
def test_writing_to_a_parameter_is_refused(write: Callable[[Tensor], Any]) -> None:
    def call(p: Any, x: Any) -> Tensor:
        write(p["w"])
        return x["x"] * p["w"]

    with pytest.raises(gf.InPlaceError, match="'w' in place"):
        check_rule(Tensor.mul, [Case(call, {"w": (3,)}, {"x": (3,)})])


# --- activations, similarities, losses ----------------------------------------------------------


@given(sizes, st.lists(sizes, max_size=2).map(tuple), st.booleans())
def test_prelu(channels: int, spatial: Any, single: bool) -> None:
    case = Case(
        lambda p, x: F.prelu(x["x"], p["w"]),
        {"w": (1 if single else channels,)},
        {"x": (channels, *spatial)},
    )
    check_rule(F.prelu, [case])


SIMILARITIES: dict[str, tuple[Any, Any, Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "cosine": (
        F.cosine_similarity,
        (5, 4),
        (4,),
        lambda w, x: F.cosine_similarity(x[:, None], w, -1),
    ),
    "pairwise": (F.pairwise_distance, (4,), (4,), lambda w, x: F.pairwise_distance(x, w)),
    "cdist": (torch.cdist, (5, 4), (2, 4), lambda w, x: torch.cdist(x, w[None])),
    "cdist, rows": (torch.cdist, (5, 4), (4,), lambda w, x: torch.cdist(x, w, p=1.0)),
    "vecdot": (torch.linalg.vecdot, (4,), (2, 4), lambda w, x: torch.linalg.vecdot(x, w)),
    "cross": (torch.linalg.cross, (3,), (2, 3), lambda w, x: torch.linalg.cross(x, w[None, None])),
    "kron": (torch.kron, (2, 2), (3,), lambda w, x: torch.kron(x, w).unflatten(0, (-1, 2))),
    "mse": (Tensor.expand, (4,), (2, 4), lambda w, x: F.mse_loss(x, w, reduction="none")),
    "huber": (Tensor.expand, (4,), (2, 4), lambda w, x: F.huber_loss(x, w, reduction="none")),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", SIMILARITIES)
def test_similarities(name: str) -> None:
    op, w, x, function = SIMILARITIES[name]
    check_rule(op, [Case(lambda p, x: function(p["w"], x["x"]), {"w": w}, {"x": x})])


# --- tensors of parameters alone ----------------------------------------------------------------

DERIVED: dict[str, Callable[[Any], Tensor]] = {
    "masked": lambda p: p["w"] * torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]).double(),
    "merged": lambda p: p["w"] + 0.5 * p["b"] @ p["a"],
    "normalised": lambda p: p["w"] / p["w"].norm(dim=1, keepdim=True),
    "transposed twice": lambda p: p["w"].T.contiguous().mT,
    "cut": lambda p: torch.cat([p["w"][:1] * 2, p["w"].chunk(2)[1]]),
    "stacked": lambda p: torch.stack([p["w"][0], p["w"][1].flip(0)]),
    "softmax": lambda p: p["w"].softmax(0),
    "orthogonal": lambda p: torch.linalg.qr(p["w"] @ p["w"].T)[0] @ p["w"],
    "exponential": lambda p: torch.matrix_exp(0.1 * p["w"] @ p["w"].T) @ p["w"],
    "with constants": lambda p: p["w"] * torch.ones_like(p["w"]) + p["w"].new_zeros(2, 3),
    "split": lambda p: torch.cat([x.tanh() for x in p["w"].split([1, 2], 1)], 1),
    "unbound": lambda p: torch.stack(p["w"].unbind(1), 1),
    "scattered": lambda p: torch.zeros(2, 3).double().index_add(0, torch.tensor([1, 0]), p["w"]),
}


@pytest.mark.parametrize("name", DERIVED)
def test_derived_weights(name: str) -> None:
    params = {"w": (2, 3), "b": (2, 1), "a": (1, 3)}
    check_rule(
        F.linear, [Case(lambda p, x: F.linear(x["x"], DERIVED[name](p)), params, {"x": (4, 3)})]
    )


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        torch.nn.utils.parametrizations.orthogonal,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: nn.Conv1d(4, 4, 2)])
def test_parametrizations(wrap: Any, make: Any) -> None:
    module = wrap(make()).double().eval()
    params = {k: tuple(p.shape) for k, p in module.named_parameters()}

    def call(p: Any, x: Any) -> Tensor:
        return torch.func.functional_call(module, p, (x["x"],))

    op = F.linear if isinstance(module, nn.Linear) else F.conv1d
    check_rule(op, [Case(call, params, {"x": (4, 4)})])


FILTERS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "of a signal": ((5,), torch.fft.rfft),
    "of pairs of numbers": ((3, 2), torch.view_as_complex),
    "polar": ((3,), lambda w: torch.polar(w.exp(), w).conj()),
    "of a real signal": (
        (5,),
        lambda w: torch.fft.rfft(torch.fft.irfft(torch.fft.rfft(w) * 2j, 5)),
    ),
    "of columns, turned": ((5, 2), lambda w: torch.fft.rfft(w, dim=0).T),
    "of columns, adjoint": ((5, 2), lambda w: torch.fft.rfft(w, dim=0).mH),
    "of columns, axes changed": ((5, 2), lambda w: torch.fft.rfft(w, dim=0).transpose(0, 1)),
}


@pytest.mark.parametrize("name", FILTERS)
def test_complex_numbers_made_of_parameters(name: str) -> None:
    shape, make = FILTERS[name]

    def call(p: Any, x: Any) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x["x"]) * make(p["w"]), 5)

    check_rule(Tensor.mul, [Case(call, {"w": shape}, {"x": (2, 5)})])


def test_complex_samples_and_products() -> None:
    def real_scale(p: Any, x: Any) -> Tensor:
        return torch.view_as_real(torch.fft.rfft(x["x"]) * p["w"])

    def filtered(p: Any, x: Any) -> Tensor:
        w = torch.complex(p["w"], p["w"])
        return F.conv1d(torch.fft.rfft(x["x"]), w).real

    check_rule(Tensor.mul, [Case(real_scale, {"w": (3,)}, {"x": (2, 5)})])
    with pytest.raises(gf.UnsupportedOpError, match="complex parameters"):
        check_rule(F.conv1d, [Case(filtered, {"w": (3, 2, 2)}, {"x": (2, 5)})])


def test_asking_a_parameter_for_its_kind() -> None:
    def call(p: Any, x: Any) -> Tensor:
        y = x["x"].float().to(p["w"]).type_as(p["w"]) + x["x"].to(p["w"])
        zeros = p["w"].new_zeros(len(y), 3) + torch.zeros_like(p["w"])
        return y @ p["w"].to(y).diag() + zeros

    check_rule(Tensor.matmul, [Case(call, {"w": (3,)}, {"x": (3,)})])


def test_random_weights_have_no_gradient_of_their_own() -> None:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(p["w"], 0.5)).sum(1)

    w, x = torch.randn(3, 4), torch.randn(2, 4)
    with pytest.raises(gf.RandomnessError):
        gf.per_sample_grads(model_fn, {"w": w}, x, mode="ghost")
    with pytest.raises(gf.RandomnessError, match="one draw for all"):
        gf.per_sample_grads(model_fn, {"w": w}, x, mode="ghost", randomness="different")
