"""float32 keeps its digits in inner products of gradients of millions of elements."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ghostfunc as gf
from ghostfunc.curvature import ekfac
from ghostfunc.projection import full_projection
from ghostfunc.store import Store, project_dataset

Tensors = dict[str, Tensor]
ERROR = 2e-6
"""Of a few roundings. Terms that are added up one after the other leave 1e-4 and more."""


def model_fn(params: Tensors, x: Tensor) -> Tensor:
    return (x @ params["weight"].mT).tanh().square().mean((1, 2))


def problem(dtype: torch.dtype, samples: int = 3, positions: int = 16) -> tuple[Tensors, Tensor]:
    """A weight of 2.4 million elements, and samples whose gradients are alike."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(3072, 768, generator=generator) / 768
    x = torch.rand(samples, positions, 768, generator=generator)
    return {"weight": weight.to(dtype)}, x.to(dtype)


def _kept(params: Tensors, x: Tensor) -> gf.FactoredGrads:
    return gf.factored_grads(model_fn, params, x)


def _direction(params: Tensors, x: Tensor) -> Any:
    return gf.direction(model_fn, params, x[:1])


ASKED: dict[str, Callable[[Tensors, Tensor, Any], Tensor]] = {
    "scores": lambda p, x, mode: gf.ghost_dot_prod(model_fn, p, x, x[:1], mode=mode),
    "matrix": lambda p, x, mode: gf.ghost_dot_prod(
        model_fn, p, x, x[:2], mode=mode, reduction="none"
    ),
    "direction": lambda p, x, mode: gf.ghost_dot_prod(
        model_fn, p, x, direction=_direction(p, x), mode=mode
    ),
    "step": lambda p, x, mode: gf.ghost_value_and_grad(model_fn, p, x, x[:1], mode=mode).dot_prods,
    "cosine": lambda p, x, mode: gf.ghost_cosine(model_fn, p, x, x[:1], mode=mode),
    "norm": lambda p, x, mode: gf.ghost_norm(model_fn, p, x, mode=mode),
    "clipped": lambda p, x, mode: (
        gf.ghost_clipped_grad(model_fn, p, x, max_norm=1e-3, mode=mode).norms
    ),
    "gram": lambda p, x, mode: gf.ghost_gram(model_fn, p, x, mode=mode),
    "gram beside others": lambda p, x, mode: gf.ghost_gram(model_fn, p, x, x[:2], mode=mode),
    "health": lambda p, x, mode: gf.ghost_health(model_fn, p, x).spread["weight"],
    "kept": lambda p, x, mode: gf.ghost_dot_prod(model_fn, p, x, direction=_kept(p, x[:1])),
    "kept gram": lambda p, x, mode: _kept(p, x).gram(),
}


ONE_MODE = {"health", "kept", "kept gram"}


@pytest.mark.parametrize(
    ("asked", "mode"),
    [(x, mode) for x in ASKED for mode in ("ghost", *["materialized"] * (x not in ONE_MODE))],
)
def test_sums_over_a_gradient_keep_their_digits(asked: str, mode: str) -> None:
    found, right = (ASKED[asked](*problem(x), mode) for x in (torch.float32, torch.float64))
    assert (found.double() - right).abs().max() <= ERROR * right.abs().max()


@pytest.mark.parametrize(("samples", "positions"), [(12, 16), (4, 300), (4, 1)])
@pytest.mark.parametrize("asked", ["step", "gram", "health"])
def test_they_do_so_in_every_way(asked: str, samples: int, positions: int) -> None:
    """Formed, by positions, many at one time."""
    sizes = samples, positions
    found, right = (
        ASKED[asked](*problem(x, *sizes), "ghost") for x in (torch.float32, torch.float64)
    )
    assert (found.double() - right).abs().max() <= ERROR * right.abs().max()


# --- other shapes -------------------------------------------------------------------------------

Losses = Callable[[Tensors, Tensor], Tensor]


def _uniform(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)))


def scaled(params: Tensors, x: Tensor) -> Tensor:
    """Losses of a vector that scales a number."""
    return (x[..., None] * params["weight"]).square().mean((1, 2))


def linear(params: Tensors, x: Tensor) -> Tensor:
    """Losses whose gradients are products of the inputs and equal numbers."""
    return F.linear(x, params["weight"]).mean((1, 2))


SHAPES: dict[str, tuple[Losses, tuple[int, ...], tuple[int, ...]]] = {
    "a vector": (scaled, (500_001,), (3, 2)),
    "one row": (linear, (1, 500_001), (3, 1, 500_001)),
    "few rows": (linear, (3, 500_001), (3, 2, 500_001)),
    "one column": (linear, (500_001, 1), (3, 2, 1)),
}


def _project(losses: Losses, params: Tensors, x: Tensor) -> Tensor:
    made = gf.kronecker_projection(params, rank_total=4, rank_min=1, kind="rademacher", seed=0)
    return gf.ghost_project(losses, params, x, made)


def _dense(losses: Losses, params: Tensors, x: Tensor) -> Tensor:
    made = gf.kronecker_projection(params, rank_total=4, rank_min=1, kind="dense", seed=0)
    return gf.ghost_project(losses, params, x, made)


OF_ALL: dict[str, Callable[[Losses, Tensors, Tensor], Tensor]] = {
    "scores": lambda f, p, x: gf.ghost_dot_prod(f, p, x, x[:1]),
    "norm": lambda f, p, x: gf.ghost_norm(f, p, x),
    "gram": lambda f, p, x: gf.ghost_gram(f, p, x),
    "projection": _project,
    "dense projection": _dense,
}


def error_of(
    asked: Callable[[Tensors, Tensor], Tensor], params: Tensors, x: Tensor
) -> tuple[float, float]:
    """How far float32 is off, and the largest number."""
    right = asked(optree.tree_map(Tensor.double, params), x.double())
    return float((asked(params, x).double() - right).abs().max()), float(right.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("asked", OF_ALL)
def test_parameters_of_other_shapes(asked: str, shape: str) -> None:
    losses, size, batch = SHAPES[shape]
    params, x = {"weight": _uniform(*size)}, _uniform(*batch) + 0.5
    error, largest = error_of(lambda p, x: OF_ALL[asked](losses, p, x), params, x)
    assert error <= 2 * ERROR * largest


def test_dense_projections_of_matrices() -> None:
    params, x = problem(torch.float32)
    error, largest = error_of(lambda p, x: _dense(model_fn, p, x), params, x)
    assert error <= ERROR * largest


@pytest.mark.parametrize("way", ["rows", "directions"])
def test_influence_of_a_long_vector(way: Any) -> None:
    def influence(params: Tensors, x: Tensor) -> Tensor:
        options: dict[str, Any] = {"fisher": "empirical", "diagonal": ["*"], "max_dense": 4}
        made = ekfac(scaled, params, [x], **options)
        options = {"curvature": made, "damping": 0.1, "relative": True, "way": way}
        scores: Tensor = gf.influence(scaled, params, x, x[:2], **options)
        return scores

    error, largest = error_of(influence, {"weight": _uniform(500_001)}, _uniform(3, 2) + 0.5)
    assert error <= ERROR * largest


def test_curvature_of_many_positions() -> None:
    """Bases are those of sums over all positions; so are gradients, which autograd rounds."""

    def losses(params: Tensors, x: Tensor) -> Tensor:
        return F.linear(x, params["weight"]).tanh().square().mean((1, 2))

    def influence(params: Tensors, x: Tensor) -> Tensor:
        made = ekfac(losses, params, [x], fisher="empirical")
        options: dict[str, Any] = {"curvature": made, "damping": 0.1, "relative": True}
        scores: Tensor = gf.influence(losses, params, x[:1], x, **options)
        return scores

    error, largest = error_of(influence, {"weight": _uniform(4, 3)}, _uniform(2, 150_000, 3))
    assert error <= 3e-5 * largest


@pytest.mark.parametrize("normalize", ["none", "cosine", "relative"])
def test_scores_of_long_rows_of_a_store(normalize: Any, tmp_path: Path) -> None:
    params, x = {"weight": _uniform(500_001)}, _uniform(4, 2) + 0.5
    projection = full_projection(params)
    settings: dict[str, Any] = {"n_samples": 4, "dtype": "float32", "chunk_rows": 4}
    store = Store.create(tmp_path / "store", projection=projection, **settings)
    store.add_checkpoint("final", params, lr=1.0)
    options: dict[str, Any] = {"checkpoint": "final", "collate": torch.stack, "progress": False}
    project_dataset(scaled, params, list(x), projection, store, batch_size=2, **options)
    rows = gf.ghost_project(scaled, params, x, projection)
    found, wide = store.scores(rows[:2], normalize=normalize), rows.double()
    right = wide[:2] @ wide.mT
    if normalize != "none":
        right = right / wide.norm(dim=1)
    if normalize == "cosine":
        right = right / wide[:2].norm(dim=1, keepdim=True)
    assert (found - right).abs().max() <= ERROR * right.abs().max()
