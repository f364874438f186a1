"""Samples folded between two other axes: `[a, n, b, d] -> [a*n*b, d]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_quantity import Case, assert_right
from problems import energy, weights
from torch import Generator, Tensor

import ghostfunc as gf

SHAPES = {
    "w": (4, 5), "b": (5,), "scale": (5,), "shift": (5,), "gain": (4,), "v": (4, 5)
}  # fmt: skip

Mix = Callable[[Any, Tensor], Tensor]


def linear(p: Any, x: Tensor) -> Tensor:
    return torch.tanh(torch.addmm(p["b"], x, p["w"]))


def normalised(p: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x @ p["w"], (5,), p["scale"], p["shift"])


def scaled(p: Any, x: Tensor) -> Tensor:
    return torch.tanh(x * p["gain"])


def added_in_place(p: Any, x: Tensor) -> Tensor:
    y = x @ p["w"]
    y += p["b"]
    return torch.tanh(y)


def derived(p: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ (p["w"] * p["v"].cos()))


MIXES: list[Mix] = [linear, normalised, scaled, added_in_place, derived]


def video(n: int, a: int, b: int) -> Tensor:
    generator = Generator().manual_seed(100 * n + 10 * a + b)
    return torch.randn(n, a, b, 4, generator=generator, dtype=torch.float64)


def whole(y: Tensor) -> Tensor:
    return energy(y)


def first_row(y: Tensor) -> Tensor:
    """A loss of the first inner row alone."""
    return energy(y[:, :, 0])


def last_row(y: Tensor) -> Tensor:
    return energy(y[:, :, -1])


@pytest.mark.parametrize("mix", MIXES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("loss", [whole, first_row, last_row], ids=lambda f: f.__name__)
def test_samples_in_the_middle(mix: Mix, loss: Callable[[Tensor], Tensor]) -> None:
    def model(p: Any, x: Tensor) -> Tensor:
        n, a, b = x.shape[:3]
        rows = mix(p, x.permute(1, 0, 2, 3).reshape(a * n * b, 4))
        return loss(rows.unflatten(0, (a, n, b)).permute(1, 0, 2, 3))

    params = weights(**SHAPES)
    assert_right(Case(model, params, video(3, 2, 3), video(2, 3, 2)))
    assert_right(Case(model, params, video(2, 2, 2), video(2, 4, 2)))


@pytest.mark.parametrize("mix", MIXES, ids=lambda f: f.__name__)
def test_in_the_middle_on_another_axis(mix: Mix) -> None:
    """`[d, a*n*b]`: channels first."""

    def model(p: Any, x: Tensor) -> Tensor:
        n, a, b = x.shape[:3]
        columns = x.permute(3, 1, 0, 2).reshape(4, a * n * b)
        rows = mix(p, columns.t())
        return energy(rows.unflatten(0, (a, n, b)).permute(1, 0, 2, 3))

    assert_right(Case(model, weights(**SHAPES), video(3, 2, 3), video(2, 3, 2)))


def test_look_up() -> None:
    def model(p: Any, ids: Tensor) -> Tensor:
        n, a, b = ids.shape
        rows = F.embedding(ids.permute(1, 0, 2).flatten(), p["e"]) @ p["w"]
        return energy(rows.unflatten(0, (a, n, b)).permute(1, 0, 2, 3)[:, :, 0])

    def draw(n: int, a: int, b: int) -> Tensor:
        return torch.randint(7, (n, a, b), generator=Generator().manual_seed(n))

    assert_right(Case(model, weights(e=(7, 4), w=(4, 5)), draw(3, 2, 3), draw(2, 2, 4)))


def test_convolution_of_frames() -> None:
    """Video `[n, t, c, s]`, windows of frames as rows: `[t, n, windows] -> [t*n*windows]`."""

    def model(p: Any, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        frames = x.transpose(0, 1)[..., None].unflatten(2, (2, 2))  # [t, n, 2, 2, s, 1]
        windows = frames.reshape(t * n * 2, 2, -1)
        y = F.conv1d(windows, p["k"], padding=1)
        return energy(y.unflatten(0, (t, n, 2)).transpose(0, 1))

    assert_right(Case(model, weights(k=(3, 2, 3)), video(3, 2, 4), video(2, 3, 4)))


def test_two_folds_in_turn() -> None:
    """Frames of all samples, then windows of all frames."""

    def model(p: Any, x: Tensor) -> Tensor:
        n, a, b = x.shape[:3]
        y = torch.tanh(x.transpose(0, 1).flatten(0, 1) @ p["w"])  # [a*n, b, 5]
        y = torch.tanh(y.flatten(0, 1) @ p["u"])  # [a*n*b, 5]
        return energy(y.unflatten(0, (a, n, b)).transpose(0, 1))

    params = weights(w=(4, 5), u=(5, 4))
    assert_right(Case(model, params, video(3, 2, 3), video(2, 3, 2)))


def test_four_levels() -> None:
    """`[a, n, b, c] -> [a*n*b*c]`: two axes behind the samples are as one."""

    def model(p: Any, x: Tensor) -> Tensor:
        n, a, b = x.shape[:3]
        rows = torch.tanh(x.permute(1, 0, 2, 3).reshape(-1, 1) @ p["one"])
        return energy(rows.unflatten(0, (a, n, b, 4)).transpose(0, 1))

    assert_right(Case(model, weights(one=(1, 3)), video(3, 2, 3), video(2, 3, 2)))


# --- batches that do not tell ---------------------------------------------------------------------


def time_first(p: Any, batch: dict[str, Tensor]) -> Tensor:
    x = batch["x"]
    n, t = x.shape[:2]
    y = (x.transpose(0, 1).reshape(t * n, -1) @ p["w"]).unflatten(0, (t, n)).transpose(0, 1)
    return energy(y) + batch["c"]


def sample_first(p: Any, batch: dict[str, Tensor]) -> Tensor:
    x = batch["x"]
    return energy((x.flatten(0, 1) @ p["w"]).unflatten(0, x.shape[:2])) + batch["c"]


@pytest.mark.parametrize("model", [time_first, sample_first])
@pytest.mark.parametrize(("n", "t"), [(3, 4), (3, 3), (2, 5)])
def test_where_values_and_gradients_tell_nothing(model: Any, n: int, t: int) -> None:
    """All rows are zero, and so are all gradients: a folding is guessed, and nothing is remembered
    of it. A batch that tells is traced anew, and proved once."""
    runs: list[int] = []

    def model_fn(p: Any, batch: dict[str, Tensor]) -> Tensor:
        runs.append(len(batch["x"]))
        return model(p, batch)

    params, generator = weights(w=(4, 6)), Generator().manual_seed(n)
    silent = {
        "x": torch.zeros(n, t, 4, dtype=torch.float64),
        "c": torch.arange(n, dtype=torch.float64),
    }
    for _ in range(2):
        assert gf.ghost_norm(model_fn, params, silent).tolist() == [0.0] * n
    ordinary = {**silent, "x": torch.randn(n, t, 4, generator=generator, dtype=torch.float64)}
    want = gf.ghost_norm(model_fn, params, ordinary, mode="materialized")
    torch.testing.assert_close(gf.ghost_norm(model_fn, params, ordinary), want, rtol=1e-9, atol=0)
    runs.clear()
    torch.testing.assert_close(gf.ghost_norm(model_fn, params, ordinary), want, rtol=1e-9, atol=0)
    assert runs == [n]
