"""By vmap where it runs, by the loop where it does not: the same gradients, and the report says
which it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ghostfunc as gf

P = {"w": torch.randn(4, 3, dtype=torch.float64)}
X = torch.randn(5, 4, dtype=torch.float64)


def plain(p: Any, x: Tensor) -> Tensor:
    return (x @ p["w"]).sin().sum(1)


def reading(p: Any, x: Tensor) -> Tensor:
    return plain(p, x) if bool(x.isfinite().all()) else plain(p, 0 * x)


def listing(p: Any, x: Tensor) -> Tensor:
    return plain(p, x) * len(x[0].tolist())


def through_numpy(p: Any, x: Tensor) -> Tensor:
    return plain(p, x) * float(x.numpy().shape[1])


def in_place(p: Any, x: Tensor) -> Tensor:
    out = torch.zeros(len(x), dtype=x.dtype)
    out += plain(p, x)
    return out


FOR_THE_LOOP = [reading, listing, through_numpy, in_place]

WAYS = {
    "per_sample_grads": lambda f, **o: gf.per_sample_grads(f, P, X, **o)["w"],
    "dot_prod": lambda f, **o: gf.ghost_dot_prod(f, P, X, X[:2], mode="materialized", **o),
    "norm": lambda f, **o: gf.ghost_norm(f, P, X, mode="materialized", **o),
    "gram": lambda f, **o: gf.ghost_gram(f, P, X, mode="materialized", **o),
    "clipped": lambda f, **o: gf.ghost_clipped_grad(
        f, P, X, max_norm=1.0, mode="materialized", **o
    ).grads["w"],
    "project": lambda f, **o: gf.ghost_project(
        f,
        P,
        X,
        gf.kronecker_projection(P, rank_total=4, rank_min=2, kind="gaussian", seed=0),
        mode="materialized",
        **o,
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model_fn", FOR_THE_LOOP)
def test_the_loop_is_taken_where_vmap_cannot_run_the_model(model_fn: Any, way: str) -> None:
    with pytest.raises(RuntimeError):
        WAYS[way](model_fn, vectorize=True)
    taken = WAYS[way](model_fn)
    assert torch.equal(taken, WAYS[way](model_fn, vectorize=False))
    torch.testing.assert_close(taken, WAYS[way](model_fn), rtol=0, atol=0)


def test_vmap_is_taken_where_it_runs() -> None:
    calls = []

    def counted(p: Any, x: Tensor) -> Tensor:
        calls.append(len(x))
        return plain(p, x)

    gf.per_sample_grads(counted, P, X)
    calls.clear()
    gf.per_sample_grads(counted, P, X)
    # One call for all samples, each of which is a batch of one in it; then the batch as it is,
    # whose losses have to be the same.
    assert calls == [1, len(X)]


def test_vmap_is_tried_once() -> None:
    calls = []

    def counted(p: Any, x: Tensor) -> Tensor:
        calls.append(len(x))
        return reading(p, x)

    gf.per_sample_grads(counted, P, X)
    calls.clear()
    gf.per_sample_grads(counted, P, X)
    assert calls == [*[1] * len(X), len(X)]


@pytest.mark.parametrize("model_fn", [plain, *FOR_THE_LOOP])
def test_the_report_says_which(model_fn: Any) -> None:
    report = gf.verify(model_fn, P, X, X[:2], check=True)
    assert report.vectorized is (model_fn is plain)
    expected = "vmap" if report.vectorized else "a loop over samples"
    assert str(report).splitlines()[-1] == f"materialized by {expected}"
    told = gf.verify(model_fn, P, X, X[:2], vectorize=False)
    assert str(told).splitlines()[-1] == "materialized by a loop over samples"


def test_errors_of_the_model_are_its_own() -> None:
    def broken(p: Any, x: Tensor) -> Tensor:
        return (x @ p["w"].mT).sum(1)

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        gf.per_sample_grads(broken, P, X)


def test_random_numbers_do_not_lead_to_the_loop() -> None:
    def noisy(p: Any, x: Tensor) -> Tensor:
        return plain(p, F.dropout(x, 0.5))

    with pytest.raises(gf.RandomnessError):
        gf.per_sample_grads(noisy, P, X)
