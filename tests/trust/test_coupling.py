"""Models whose samples do depend on each other, though the first batch does not show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_quantity import Case, assert_refused, judge
from problems import energy, weights
from torch import Generator, Tensor, nn

import ghostfunc as gf

Model = Callable[[Any, Tensor], Tensor]

ASKED = ("dots", "norms", "gram", "sample_grads", "dots_by_jvp")
"""What runs the batch as a whole. (`vmap(grad)` and the loop run samples alone.)"""


def draw(n: int, seed: int = 0) -> Tensor:
    generator = Generator().manual_seed(seed)
    return torch.randn(n, 3, 4, generator=generator, dtype=torch.float64)


def alike(n: int) -> Tensor:
    """n copies of one sample."""
    return draw(1).expand(n, -1, -1).clone()


def refused(model: Model, first: Tensor | None, train: Tensor, **shapes: tuple[int, ...]) -> None:
    """The model is refused on the train batch, whatever was said of the first one."""
    params = weights(**{"w": (4, 6), **shapes})
    with torch.no_grad():
        losses = model(params, train)
        alone = torch.cat([model(params, x[None]) for x in train])  # batches of one are alone
        assert not torch.allclose(losses, alone, rtol=1e-9), "the samples are independent here"
    val = draw(2, 7)
    asked_first = [] if first is None else [first]
    case = Case(model, params, train, val, first=asked_first)
    assert_refused(case, gf.CoupledSamplesError, ASKED)


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


def _with_the_previous(y: Tensor) -> Tensor:
    return y - 0.5 * y.roll(1, 0)


def _with_the_last(y: Tensor) -> Tensor:
    return y - 0.5 * y[-1:]


def _with_the_opposite(y: Tensor) -> Tensor:
    return y - 0.5 * y.flip(0)


def _with_the_neighbour(y: Tensor) -> Tensor:
    """Rows 2k and 2k + 1 are two views of one thing."""
    k = len(y) // 2 * 2
    pairs = y[:k].unflatten(0, (-1, 2))
    return torch.cat([y[:k] - 0.5 * pairs.flip(1).flatten(0, 1), y[k:]])


def _with_the_other_half(y: Tensor) -> Tensor:
    """So are rows k and k + n / 2."""
    k = len(y) // 2
    return torch.cat([y[:k] - 0.5 * y[k : 2 * k], y[k : 2 * k] - 0.5 * y[:k], y[2 * k :]])


def _in_gradients(y: Tensor) -> Tensor:
    mean = y.mean(0)
    return y - mean + mean.detach()


def _by_place(y: Tensor) -> Tensor:
    return y * torch.arange(1.0, len(y) + 1).to(y)[:, None, None]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize(
    "couple",
    [
        lambda y: y - 0.5 * y.mean(0),
        _with_the_previous,
        _with_the_last,
        _with_the_opposite,
        _with_the_neighbour,
        _with_the_other_half,
        _in_gradients,
        _by_place,
    ],
)
def test_every_kind_of_coupling_at_a_new_shape(couple: Callable[[Tensor], Tensor], n: int) -> None:
    """The function was known and harmless: only the proof of the new shape sees it."""

    def model(p: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x @ p["w"])
        return energy(couple(y) if x.shape[1] > 3 else y)

    params, generator = weights(w=(4, 6)), Generator().manual_seed(5)
    gf.ghost_norm(model, params, draw(n))
    long = torch.randn(n, 5, 4, generator=generator, dtype=torch.float64)
    with pytest.raises((gf.CoupledSamplesError, gf.SampleAxisError)):
        gf.ghost_norm(model, params, long)


def test_two_coupled_samples_of_many_are_parted_at_some_shape() -> None:
    """Parts are drawn anew in every proof: what one of them misses, the next ones do not."""

    def model(p: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x @ p["w"])
        this, other = (x[:, 0, k] == 7 for k in range(2))
        seen = y[other].sum(0) if x.shape[1] > 3 else 0
        return energy(y + 0.5 * this[:, None, None] * seen)

    params, refusals = weights(w=(4, 6)), 0
    gf.ghost_norm(model, params, draw(9))
    for t in range(4, 10):
        x = torch.randn(9, t, 4, generator=Generator().manual_seed(t), dtype=torch.float64)
        x[2, 0, 0] = x[5, 0, 1] = 7
        try:
            gf.ghost_norm(model, params, x)
        except gf.CoupledSamplesError:
            refusals += 1
    assert refusals >= 4


def test_batch_norm_in_a_closure() -> None:
    """A module that a plain function closes over is put into training mode."""
    norm = nn.BatchNorm1d(6).double().eval()

    def model(p: Any, x: Tensor) -> Tensor:
        return energy(norm(x[:, 0] @ p["w"]))

    params = weights(w=(4, 6))
    gf.ghost_dot_prod(model, params, draw(4), draw(2))
    norm.train()
    case = Case(model, params, draw(4, 5), draw(3, 7), oracle_fn=lambda p, x: energy(x @ p["w"]))
    assert_refused(case, gf.CoupledSamplesError, ASKED[:-1])
    verdict = judge(case, "dots_by_jvp")  # forward mode cannot write to buffers
    assert verdict.status == "refused", str(verdict)


def test_dropout_in_a_closure() -> None:
    dropout = nn.Dropout(0.5).eval()

    def model(p: Any, x: Tensor) -> Tensor:
        return energy(dropout(x[:, 0] @ p["w"]))

    params = weights(w=(4, 6))
    gf.ghost_dot_prod(model, params, draw(4), draw(2))
    dropout.train()
    case = Case(model, params, draw(4, 5), draw(3, 7), oracle_fn=lambda p, x: energy(x @ p["w"]))
    for name in ASKED:
        verdict = judge(case, name)
        assert verdict.status == "refused", str(verdict)


def test_samples_that_do_not_show_in_their_losses_prove_nothing() -> None:
    """The first two are cut off, so that their company shows with others alone."""

    def model_fn(p: Any, x: Tensor) -> Tensor:
        h = torch.relu(x @ p["w"] + 0.1 * x.roll(1, 0) @ p["w"])
        return (h * p["v"] - p["v"]).square().sum(1)

    params = {"w": torch.eye(4).double(), "v": torch.rand(4).double()}
    cut_off = -torch.rand(2, 4).double() - 1
    gf.ghost_dot_prod(model_fn, params, cut_off, direction=params)
    with pytest.raises(gf.CoupledSamplesError):
        gf.ghost_dot_prod(model_fn, params, torch.rand(2, 4).double(), direction=params)
