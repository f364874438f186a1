"""Cotangents whose second moment is the Hessian of a loss by its outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ghostfunc as gf
from ghostfunc.curvature import Likelihood

N, T, V = 2, 3, 4


def outputs(params: Any, batch: Any) -> Tensor:
    z: Tensor = batch["z"] * params["w"]
    return z


def labels(batch: Any) -> Tensor:
    y: Tensor = batch["y"]
    return y


def draw() -> dict[str, Tensor]:
    y = torch.randint(V, (N, T))
    y[0, 1] = -100
    return {"z": torch.randn(N, T, V, dtype=torch.float64), "y": y}


LIKELIHOODS: dict[str, Likelihood] = {
    "softmax mean": gf.curvature.softmax(outputs, labels),
    "softmax sum": gf.curvature.softmax(outputs, labels, reduction="sum"),
    "gaussian sum": gf.curvature.gaussian(outputs, lambda b: b["z"].sin()),
    "gaussian mean": gf.curvature.gaussian(outputs, lambda b: b["z"].sin(), reduction="mean"),
}


@pytest.fixture(params=LIKELIHOODS)
def likelihood(request: pytest.FixtureRequest) -> Likelihood:
    return LIKELIHOODS[request.param]


def hessians(likelihood: Likelihood, batch: dict[str, Tensor]) -> Tensor:
    """`[n, T V, T V]` by torch."""
    out = []
    for i in range(N):
        one = {k: x[i : i + 1] for k, x in batch.items()}
        h = torch.func.hessian(lambda z, one=one: likelihood.losses(z, one)[0])(one["z"])
        out.append(h.reshape(T * V, T * V))
    return torch.stack(out)


def test_columns_make_the_hessian(likelihood: Likelihood) -> None:
    batch = draw()
    columns = torch.stack(list(likelihood.columns(batch["z"], batch)))  # [columns, n, T, V]
    c = columns.flatten(2)
    torch.testing.assert_close(torch.einsum("kni,knj->nij", c, c), hessians(likelihood, batch))


def test_products_with_the_hessian(likelihood: Likelihood) -> None:
    batch = draw()
    v = torch.randn(N, T, V, dtype=torch.float64)
    expected = torch.einsum("nij,nj->ni", hessians(likelihood, batch), v.flatten(1))
    found = likelihood.hessian_product(batch["z"], batch, v)
    torch.testing.assert_close(found.flatten(1), expected)


def test_draws_make_the_hessian_in_expectation(likelihood: Likelihood) -> None:
    batch, count = draw(), 40_000
    many = {k: x.repeat_interleave(count, 0) for k, x in batch.items()}
    c = likelihood.draw(many["z"], many, torch.Generator().manual_seed(0)).view(N, count, -1)
    found = torch.einsum("nki,nkj->nij", c, c) / count
    expected = hessians(likelihood, batch)
    assert float((found - expected).abs().max()) < 0.03 * float(expected.abs().max())


def test_a_sampled_fisher_is_the_exact_one_in_expectation() -> None:
    def logits(p: Any, b: Any) -> Tensor:
        return F.linear(torch.tanh(F.linear(b["x"], p["w"])), p["v"])

    def model(p: Any, b: Any) -> Tensor:
        return F.cross_entropy(logits(p, b), b["y"], reduction="none")

    params = {"w": torch.randn(3, 2).double(), "v": torch.randn(4, 3).double()}
    batch = {"x": torch.randn(5, 2).double(), "y": torch.randint(4, (5,))}
    softmax = gf.curvature.softmax(logits, labels)
    u = {k: torch.randn_like(x) for k, x in params.items()}
    exact = gf.curvature.ekfac(model, params, [batch], fisher="exact", likelihood=softmax)
    many = {k: x.repeat(600, *[1] * (x.ndim - 1)) for k, x in batch.items()}
    drawn = gf.curvature.ekfac(model, params, [many], likelihood=softmax, seed=1)
    for row, other in zip(exact.report().rows, drawn.report().rows, strict=True):
        assert other.trace == pytest.approx(row.trace, rel=0.05)
    # Bases are estimates as well: the whole operator agrees to a few percent.
    for name, x in exact.matvec(u).items():
        found = drawn.matvec(u)[name]
        assert float((found - x).norm()) < 0.15 * float(x.norm())


def test_draws_average_out() -> None:
    params = {"w": torch.randn(V, dtype=torch.float64)}
    batch = draw()
    gaussian = LIKELIHOODS["gaussian sum"]

    def model(p: Any, b: Any) -> Tensor:
        return gaussian.losses(outputs(p, b), b)

    exact = gf.curvature.ekfac(model, params, [batch], fisher="exact", likelihood=gaussian)
    few, many = (
        gf.curvature.ekfac(model, params, [batch], likelihood=gaussian, draws=draws)
        for draws in (1, 400)
    )
    want = exact.report().rows[0].trace
    assert many.report().rows[0].trace == pytest.approx(want, rel=0.1)
    assert few.report().rows[0].trace != many.report().rows[0].trace
