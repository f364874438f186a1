"""Models whose samples do depend on each other, though the first batch does not show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_quantity import Case, assert_refused
from problems import energy, weights
from torch import Generator, Tensor, nn

import ghostfunc as gf

Model = Callable[[Any, Tensor], Tensor]

ASKED = ("dots", "norms", "gram", "sample_grads", "dots_materialized", "dots_in_a_loop")


def draw(n: int, seed: int = 0) -> Tensor:
    generator = Generator().manual_seed(seed)
    return torch.randn(n, 3, 4, generator=generator, dtype=torch.float64)


def alike(n: int) -> Tensor:
    """n copies of one sample."""
    return draw(1).expand(n, -1, -1).clone()


def refused(model: Model, first: Tensor | None, train: Tensor, **shapes: tuple[int, ...]) -> None:
    """The model is refused on the train batch, whatever was said of the first one."""
    params = weights(**{"w": (4, 6), **shapes})
    if first is not None:
        try:
            gf.ghost_dot_prod(model, params, first, first)
        except gf.CoupledSamplesError:
            return
    with torch.no_grad():
        losses = model(params, train)
        alone = torch.cat([model(params, x[None]) for x in train])
        assert not torch.allclose(losses, alone, rtol=1e-9), "the samples are independent here"
    val = draw(2, 7)
    assert_refused(Case(model, params, train, val), gf.CoupledSamplesError, ASKED)


# --- the first batch is of copies of one sample -------------------------------------------------


def rolled(p: Any, x: Tensor) -> Tensor:
    return energy(torch.tanh(x @ p["w"]) + torch.tanh(x @ p["w"]).roll(1, 0))


def flipped(p: Any, x: Tensor) -> Tensor:
    return energy(torch.tanh((x + x.flip(0)) @ p["w"]))


def attending_over_the_batch(p: Any, x: Tensor) -> Tensor:
    y = (x @ p["w"]).transpose(0, 1)  # [T, n, p]
    return energy(F.scaled_dot_product_attention(y, y, y).transpose(0, 1))


def centred(p: Any, x: Tensor) -> Tensor:
    y = x @ p["w"]
    return energy(y + 0.5 * y.mean(0))


def compared_to_the_first(p: Any, x: Tensor) -> Tensor:
    y = torch.tanh(x @ p["w"])
    return energy(y - 0.5 * y[:1])


def beside_the_largest(p: Any, x: Tensor) -> Tensor:
    y = x @ p["w"]
    return energy(y / y.abs().amax(0))


@pytest.mark.parametrize(
    "model",
    [
        rolled,
        flipped,
        attending_over_the_batch,
        centred,
        compared_to_the_first,
        beside_the_largest,
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("n", [2, 4])
def test_after_copies_of_one_sample(model: Model, n: int) -> None:
    refused(model, alike(n), draw(n, 5))


# --- harmless until values grow -----------------------------------------------------------------


def normalised_with_a_large_floor(p: Any, x: Tensor) -> Tensor:
    return energy(F.normalize(x, dim=0, eps=10.0) @ p["w"])


def renormalised(p: Any, x: Tensor) -> Tensor:
    return energy(x.permute(1, 0, 2).renorm(2, 0, 10.0).permute(1, 0, 2) @ p["w"])


def clipped_together(p: Any, x: Tensor) -> Tensor:
    return energy((x * (10 / x.norm().clamp_min(10.0))) @ p["w"])


def relu_of_the_mean(p: Any, x: Tensor) -> Tensor:
    return energy(x @ p["w"] + (x.mean() - 2).relu())


def quantised_together(p: Any, x: Tensor) -> Tensor:
    step = (x.abs().amax() / 8).ceil()  # one for small values
    return energy((x / step).round() @ p["w"] * step)


@pytest.mark.parametrize(
    "model",
    [
        normalised_with_a_large_floor,
        renormalised,
        clipped_together,
        relu_of_the_mean,
        quantised_together,
    ],
    ids=lambda f: f.__name__,
)
def test_when_values_grow(model: Model) -> None:
    refused(model, 0.3 * draw(4), 8 + 20 * draw(4, 5).abs())


def test_a_branch_on_all_samples() -> None:
    """`if x.max() > 3` is a number made of several samples, that enters by value."""

    def model(p: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x @ p["w"])
        return energy(y / y.norm() if x.max() > 3 else y)

    refused(model, 0.3 * draw(4), 8 + draw(4, 5))


def test_a_constant_by_value() -> None:
    """Samples are scaled by a Python number read from all of them."""

    def model(p: Any, x: Tensor) -> Tensor:
        return energy((x * max(1.0, float(x.abs().max()) / 10)) @ p["w"])

    refused(model, 0.3 * draw(4), 8 + 20 * draw(4, 5).abs())


# --- hidden by scale ----------------------------------------------------------------------------


def lightly_coupled(p: Any, x: Tensor) -> Tensor:
    y = torch.tanh(x @ p["w"])
    return energy(y + 1e-3 * y.roll(1, 0)) * (1 + 1e9 * (x[:, 0, 0] > 5))


@pytest.mark.parametrize("n", [3, 5])
def test_beside_huge_losses(n: int) -> None:
    """Two samples with huge losses, themselves coupled to none, do not hide the rest."""

    def model(p: Any, x: Tensor) -> Tensor:
        huge = (x[:, 0, 0] > 50).double()
        y = torch.tanh(x @ p["w"])
        mixed = y + 0.1 * (y.roll(1, 0) * (1 - huge)[:, None, None])
        return energy(torch.where(huge[:, None, None] > 0, y, mixed)) * (1 + 1e9 * huge)

    x = draw(n, 5)
    x[:2, 0, 0] = 100.0
    refused(model, None, x)


def test_beside_huge_losses_at_the_first_sample_alone() -> None:
    x = draw(4, 5)
    x[0, 0, 0] = 100.0

    def model(p: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x @ p["w"])
        return energy(y - 0.1 * y.mean(0)) * (1 + 1e12 * (x[:, 0, 0] > 50))

    refused(model, None, x)


# --- other sizes, ways and modes ----------------------------------------------------------------


def test_only_in_large_batches() -> None:
    def model(p: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x @ p["w"])
        return energy(y - y.mean(0) if len(x) > 4 else y)

    refused(model, draw(3), draw(6, 5))


def test_only_in_batches_of_two() -> None:
    """A last chunk of two, say."""

    def model(p: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x @ p["w"])
        return energy(y - y.mean(0) if len(x) == 2 else y)

    refused(model, draw(4), draw(2, 5))


def test_only_where_samples_are_long() -> None:
    def model(p: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x @ p["w"])
        return energy(y - 0.5 * y.mean(0) if x.shape[1] > 3 else y)

    generator = Generator().manual_seed(5)
    refused(model, draw(4), torch.randn(4, 5, 4, generator=generator, dtype=torch.float64))


def test_batch_norm_in_a_closure() -> None:
    """A module that a plain function closes over is put into training mode."""
    norm = nn.BatchNorm1d(6).double().eval()

    def model(p: Any, x: Tensor) -> Tensor:
        return energy(norm(x[:, 0] @ p["w"]))

    params = weights(w=(4, 6))
    gf.ghost_dot_prod(model, params, draw(4), draw(2))
    norm.train()
    case = Case(model, params, draw(4, 5), draw(3, 7), oracle_fn=lambda p, x: energy(x @ p["w"]))
    assert_refused(case, gf.CoupledSamplesError, ASKED)


def test_dropout_in_a_closure() -> None:
    dropout = nn.Dropout(0.5).eval()

    def model(p: Any, x: Tensor) -> Tensor:
        return energy(dropout(x[:, 0] @ p["w"]))

    params = weights(w=(4, 6))
    gf.ghost_dot_prod(model, params, draw(4), draw(2))
    dropout.train()
    case = Case(model, params, draw(4, 5), draw(3, 7), oracle_fn=lambda p, x: energy(x @ p["w"]))
    assert_refused(case, gf.RandomnessError, ASKED)


def test_state_between_calls() -> None:
    """A running mean that begins to count after some calls."""
    calls: list[int] = []
    seen = torch.zeros(4, dtype=torch.float64)

    def model(p: Any, x: Tensor) -> Tensor:
        nonlocal seen
        calls.append(len(x))
        out = energy((x - seen) @ p["w"])
        if len(calls) > 12:
            seen = x.detach().mean((0, 1))
        return out

    params = weights(w=(4, 6))
    for k in range(3):
        gf.ghost_dot_prod(model, params, draw(4, k), draw(2, k))
    with pytest.raises(gf.GhostError):
        for k in range(30):
            gf.ghost_dot_prod(model, params, draw(4, k), draw(2, k), check="always")
