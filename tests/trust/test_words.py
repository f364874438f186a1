"""Every public call ends in a number or in an error of ghostfunc's own, with a way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from every_quantity import GHOST, OTHER_MODES, TRANSFORMS, Case, assert_right, judge
from problems import energy, features, sequences, weights
from torch import Generator, Tensor, nn

import ghostfunc as gf

Model = Callable[[Any, Tensor], Tensor]


def case_of(model: Any, params: Any, d: int = 4, t: int = 3) -> Case:
    draw = sequences(d) if t else features(d)
    batches = (draw(n, t, Generator().manual_seed(n)) for n in (3, 2))
    return Case(model, params, *batches)


# --- parameters without elements ----------------------------------------------------------------


def test_parameters_without_elements() -> None:
    def model(p: Any, x: Tensor) -> Tensor:
        return energy(torch.cat([x @ p["w"], x @ p["none"]], -1)) + p["empty"].sum()

    assert_right(case_of(model, weights(w=(4, 6), none=(4, 0), empty=(0,))), GHOST)


def test_products_over_no_features() -> None:
    def model(p: Any, x: Tensor) -> Tensor:
        return energy(x @ p["w"] + x[..., :0] @ p["none"])

    assert_right(case_of(model, weights(w=(4, 6), none=(0, 6))), GHOST)


def test_a_table_of_no_columns() -> None:
    def model(p: Any, x: Tensor) -> Tensor:
        extra = F.embedding((x[..., 0] > 0).long(), p["e"])
        return energy(torch.cat([x @ p["w"], extra], -1))

    assert_right(case_of(model, weights(w=(4, 6), e=(2, 0))), GHOST)


# --- derived tensors that lose their gradient ---------------------------------------------------


def detached_in_place(p: Any, x: Tensor) -> Tensor:
    scale = p["w"].norm() * 1.0
    scale.detach_()
    return energy(x @ p["w"] / scale)


def without_a_gradient(p: Any, x: Tensor) -> Tensor:
    order = p["w"].sum(0).argsort()
    return energy(x @ p["w"][:, order])


def through_rounding(p: Any, x: Tensor) -> Tensor:
    """Straight-through estimation: rounding has a derivative of zero."""
    w = 3 * p["w"]
    return energy(x @ (w + (w.round() - w).detach()) + x @ w.sign())


def by_nextafter(p: Any, x: Tensor) -> Tensor:
    """Torch has no derivative of it."""
    with torch.no_grad():
        step = torch.nextafter(p["w"], torch.ones_like(p["w"]))
    return energy(x @ (p["w"] + step))


def by_heaviside(p: Any, x: Tensor) -> Tensor:
    gate = torch.heaviside(p["w"].detach() * 1.0, torch.zeros((), dtype=x.dtype))
    return energy(x @ (p["w"] * gate))


def by_floor_division(p: Any, x: Tensor) -> Tensor:
    return energy(x @ (p["w"] - torch.floor_divide(p["w"].detach(), 0.1)))


def compared(p: Any, x: Tensor) -> Tensor:
    return energy(x @ (p["w"] * (p["w"] > p["w"].median())))


@pytest.mark.parametrize(
    "model",
    [
        detached_in_place,
        without_a_gradient,
        through_rounding,
        by_nextafter,
        by_heaviside,
        by_floor_division,
        compared,
    ],
    ids=lambda f: f.__name__,
)
def test_of_derived_tensors(model: Model) -> None:
    assert_right(case_of(model, weights(w=(4, 6))), GHOST)


# --- other modes and transforms -----------------------------------------------------------------


def gru() -> nn.Module:
    return nn.GRU(4, 3, batch_first=True)


def lstm() -> nn.Module:
    return nn.LSTM(4, 3, batch_first=True)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()


def attention() -> nn.Module:
    return nn.MultiheadAttention(4, 2, batch_first=True).eval()


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 2, 1))


def forward(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.Sequential):
        x = x.flatten(1)[:, None, :1]  # T = 1
    out = module(x, x, x) if isinstance(module, nn.MultiheadAttention) else module(x)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize(
    "make", [gru, lstm, encoder, attention, convolution], ids=lambda f: f.__name__
)
def test_modules_in_all_modes(make: Callable[[], nn.Module]) -> None:
    """What vmap or forward mode cannot run is refused by name, with a way out."""
    torch.manual_seed(0)
    module = make().double()
    model_fn, params = gf.from_module(module, lambda m, x: energy(forward(m, x)))
    case = case_of(model_fn, params)
    assert_right(case, ["dots", "norms", "dots_in_a_loop", "sample_grads_in_a_loop"])
    for name in OTHER_MODES:
        verdict = judge(case, name)
        assert verdict.status in ("right", "refused"), str(verdict)
        if verdict.status == "refused":
            assert "vectorize=False" in verdict.said or "forward-mode" in verdict.said, verdict


def by_numpy(p: Any, x: Tensor) -> Tensor:
    order = np.asarray(x.detach()[..., 0]).argsort()
    return energy(torch.tanh(x @ p["w"])) * float(order.size > 0)


def weights_by_numpy(p: Any, x: Tensor) -> Tensor:
    return energy(torch.tanh(x @ p["w"])) * float(np.asarray(p["w"].detach()).size)


def sparse_weight(p: Any, x: Tensor) -> Tensor:
    at = torch.tensor([[0, 1, 2, 3], [5, 1, 1, 0]])
    w = torch.sparse_coo_tensor(at, p["w"][:, 0], (4, 6), check_invariants=True).to_dense()
    return energy(x @ w)


UNVECTORIZED: list[Callable[[Model, Any, Tensor], Any]] = [
    lambda f, p, x: gf.per_sample_grads(f, p, x, vectorize=True),
    lambda f, p, x: gf.ghost_norm(f, p, x, mode="materialized", vectorize=True),
    lambda f, p, x: gf.verify(f, p, x, x, vectorize=True),
    lambda f, p, x: gf.ghost_dot_prod(f, p, x, x, mode="jvp"),
    lambda f, p, x: gf.ghost_dot_prod(f, p, x, x, mode="jvp", reduction="none"),
]


@pytest.mark.parametrize(
    "model", [by_numpy, weights_by_numpy, sparse_weight], ids=lambda f: f.__name__
)
def test_what_looks_at_memory_is_refused_by_name(model: Model) -> None:
    case = case_of(model, weights(w=(4, 6)))
    for ask in UNVECTORIZED:
        with pytest.raises(gf.TransformError, match="vectorize=False"):
            ask(case.model_fn, case.params, case.train)
    assert_right(case, ["dots", "norms", "dots_in_a_loop", "sample_grads_in_a_loop"])


def test_numpy_under_the_callers_own_transforms() -> None:
    case = case_of(by_numpy, weights(w=(4, 6)))
    verdict = judge(case, "vmap_over_directions")
    assert verdict.status in ("right", "refused"), str(verdict)


def test_kernels_that_vmap_cannot_run_are_refused_by_name() -> None:
    def model(p: Any, x: Tensor) -> Tensor:
        return torch.tanh(F.conv1d(x.mT.contiguous(), p["w"])).square().flatten(1).sum(1)

    params = {"w": torch.randn(1, 2, 1, dtype=torch.float64)}
    x = torch.randn(1, 3, 2, dtype=torch.float64)
    want = gf.per_sample_grads(model, params, x, vectorize=False)["w"]
    torch.testing.assert_close(gf.per_sample_grads(model, params, x)["w"], want)
    verdict = judge(Case(model, params, x, x), "sample_grads_by_vmap")  # as the kernel has it
    assert verdict.status in ("right", "refused"), str(verdict)
    assert verdict.status == "right" or "vectorize=False" in verdict.said, str(verdict)


def sorting(p: Any, x: Tensor) -> Tensor:
    return energy(torch.tanh(x @ p["w"]).sort(-1)[0])


def sorting_samples(p: Any, x: Tensor) -> Tensor:
    order = x[:, 0, 0].argsort()
    y = torch.tanh(x @ p["w"])[order]
    return energy(y[order.argsort()])


def with_a_class_token(p: Any, x: Tensor) -> Tensor:
    x = torch.cat([p["cls"].expand(len(x), 1, -1), x], 1)
    return energy(x @ p["w"])


def written_into(p: Any, x: Tensor) -> Tensor:
    y = torch.cat([x[:, :1], x], 1)
    y[:, 0] = p["cls"]
    return energy(y @ p["w"])


@pytest.mark.parametrize(
    "model",
    [sorting, sorting_samples, with_a_class_token, written_into],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_inside_transforms(model: Model, name: str) -> None:
    case = case_of(model, weights(w=(4, 6), cls=(4,)))
    verdict = judge(case, name)
    assert verdict.status in ("right", "refused"), str(verdict)


# --- guards -------------------------------------------------------------------------------------


class Square(torch.autograd.Function):
    """A use that no torch function shows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * b

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * tangent


def seen_in_short_samples(p: Any, x: Tensor) -> Tensor:
    if x.shape[1] <= 2:
        return energy(x @ p["w"])
    return energy(x @ p["w"] + Square.apply(p["w"]).sum())


@pytest.mark.parametrize("name", ["dots_along_a_direction", "norms", "one_pass", *TRANSFORMS])
def test_unseen_uses_raise_everywhere(name: str) -> None:
    """A trace of short samples shows no such use; the guards of every run do, or a new trace
    comes to the right number."""
    case = case_of(seen_in_short_samples, weights(w=(4, 6)))
    case.first = [case.train[:, :2]]
    verdict = judge(case, name)
    refused = verdict.status == "refused" and "UntrackedUseError" in verdict.said
    assert verdict.status == "right" or refused, str(verdict)


# --- a batch that the model takes as a whole only -----------------------------------------------

Batch = dict[str, Tensor]


def squares(p: Batch, b: Batch) -> Tensor:
    return (b["x"] @ p["w"]).square()


def of_four(p: Batch, b: Batch) -> Tensor:
    assert len(b["x"]) == 4
    return squares(p, b).sum(1)


WHOLE_ONLY: dict[str, Callable[[Batch, Batch], Tensor]] = {
    "index of rows": lambda p, b: squares(p, b)[b["i"]].sum(1),
    "index of losses": lambda p, b: squares(p, b).sum(1)[b["i"]],
    "index_select": lambda p, b: squares(p, b).sum(1).index_select(0, b["i"]),
    "written size": lambda p, b: squares(p, b).view(4, 2).sum(1),
    "constant of a size": lambda p, b: squares(p, b).sum(1) + torch.ones(4),
    "assertion": of_four,
    "pairs": lambda p, b: squares(p, b).view(-1, 2, 2).sum(2).flatten(),
}


@pytest.mark.parametrize("ask", [gf.ghost_norm, gf.per_sample_grads, gf.ghost_gram])
@pytest.mark.parametrize("model", WHOLE_ONLY)
def test_batches_that_are_taken_as_a_whole_only(model: str, ask: Callable[..., Any]) -> None:
    batch = {"x": torch.randn(4, 3).double(), "i": torch.arange(4).flip(0)}
    with pytest.raises(gf.CoupledSamplesError, match=r"takes this batch of 4 samples, but not"):
        ask(WHOLE_ONLY[model], {"w": torch.randn(3, 2).double()}, batch)


def test_an_index_that_points_at_other_samples_later() -> None:
    def model(p: Batch, b: Batch) -> Tensor:
        own = squares(p, b).sum(1)
        return own + b["f"] * own[b["i"]]

    x, f = torch.randn(4, 3).double(), torch.zeros(4).double()
    params = {"w": torch.randn(3, 2).double()}
    first = {"x": x, "i": torch.tensor([0, 1, 0, 1]), "f": f}
    exact = gf.ghost_norm(lambda p, b: squares(p, b).sum(1), params, first)
    torch.testing.assert_close(gf.ghost_norm(model, params, first), exact)
    with pytest.raises(gf.CoupledSamplesError, match="takes this batch of 4 samples"):
        gf.ghost_norm(model, params, first | {"i": torch.arange(4).flip(0)})


def test_what_a_model_raises_of_every_batch_is_its_own() -> None:
    batch = {"x": torch.randn(4, 3).double()}
    with pytest.raises(KeyError, match="wrong"):
        gf.ghost_norm(
            lambda p, b: squares(p, {"x": b["wrong"]}).sum(1), {"w": torch.rand(3, 2)}, batch
        )
    with pytest.raises(RuntimeError, match="invalid for input of size 6"):
        gf.ghost_norm(lambda p, b: b["x"] @ p["w"].view(7), {"w": torch.rand(3, 2)}, batch)
