"""`ghost_project` is `projection.apply` of the per-sample gradients, and that is what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import optree
import pytest
import torch
from compare import assert_close, leaves_of, sample_grads
from problems import CASES, Problem

import ghostfunc as gf

KINDS = ["gaussian", "rademacher", "orthonormal", "sparse", "dense"]


def small(params: Any, kind: str, seed: int = 3) -> gf.Projection:
    return gf.kronecker_projection(params, rank_total=9, rank_min=2, kind=kind, seed=seed)


def grads_of(problem: Problem, batch: Any) -> Any:
    treedef = optree.tree_structure(problem.params)
    return optree.tree_unflatten(treedef, sample_grads(problem, batch))


def test_every_kind_of_every_problem(problem: Problem) -> None:
    batch = problem.batch(3)
    grads = grads_of(problem, batch)
    for kind in KINDS:
        projection = small(problem.params, kind)
        got = gf.ghost_project(problem.model_fn, problem.params, batch, projection)
        assert_close(got, projection.apply(grads), problem.tolerance)


def test_compressed() -> None:
    problem = CASES["tied_lm"]()
    batch = problem.batch(3)
    projection = gf.kronecker_projection(
        problem.params, rank_total=30, rank_min=2, kind="gaussian", seed=0, compress=11
    )
    got = gf.ghost_project(problem.model_fn, problem.params, batch, projection)
    assert got.shape == (3, 11)
    assert_close(got, projection.apply(grads_of(problem, batch)), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition(kind: str) -> None:
    params = {
        "linear": torch.zeros(7, 12),
        "conv": torch.zeros(5, 3, 2, 2),
        "bias": torch.zeros(11),
        "scale": torch.zeros(()),
    }
    grads = {name: torch.randn(4, *x.shape).double() for name, x in params.items()}
    projection = small(params, kind)
    got = projection.apply(grads)
    assert got.shape == (4, projection.k)
    total = np.zeros(got.shape)
    for block in projection.blocks:
        g = grads[block.path].reshape(4, -1).numpy()
        matrix = dense_matrix(projection, block)
        assert matrix.shape == (block.k, g.shape[1])
        total[:, block.columns] += g @ matrix.T
    np.testing.assert_allclose(got.numpy(), total, rtol=1e-12, atol=1e-12)


def dense_matrix(projection: gf.Projection, block: gf.projection.Block) -> np.ndarray:
    if projection.kind == "dense":
        identity = torch.eye(block.n_o * block.n_i, dtype=torch.float64)
        grads = {
            b.path: (
                identity.reshape(-1, *b.shape)
                if b is block
                else torch.zeros(len(identity), *b.shape, dtype=torch.float64)
            )
            for b in projection.blocks
        }
        return projection.apply(grads).T.numpy()
    return np.kron(
        projection.matrix(block.path, "o").double(), projection.matrix(block.path, "i").double()
    )


def test_one_pass_reads_projections_dot_products_and_norms() -> None:
    problem = CASES["tied_lm"]()
    batch = problem.batch(3)
    projection = small(problem.params, "rademacher")
    quantities = {"p": gf.Project(projection), "u": gf.Dot(problem.params), "n": gf.SqNorm()}
    out = gf.ghost_vjp(problem.model_fn, problem.params, batch, quantities, grads=True)
    alone = gf.ghost_project(problem.model_fn, problem.params, batch, projection)
    assert_close(projection.join(out.values["p"]), alone, 1e-12)
    grads = sample_grads(problem, batch)
    dots = [
        g.flatten(1) @ u.flatten() if g.ndim > 1 else g * u
        for g, u in zip(grads, leaves_of(problem.params), strict=True)
    ]
    assert_close(leaves_of(out.values["u"]), dots, 1e-10)
    squares = [g.reshape(3, -1).square().sum(1) for g in grads]
    assert_close(leaves_of(out.values["n"]), squares, 1e-10)
    assert_close(leaves_of(out.grads), [g.sum(0) for g in grads], 1e-10)


def test_full_is_the_gradient_itself() -> None:
    problem = next(iter(CASES.values()))()
    batch = problem.batch(3)
    projection = gf.projection.full_projection(problem.params)
    got = gf.ghost_project(problem.model_fn, problem.params, batch, projection)
    assert_close(got, torch.cat([g.reshape(3, -1) for g in sample_grads(problem, batch)], 1), 1e-10)


def test_the_scale_is_that_of_the_samples_own_loss() -> None:
    problem = next(iter(CASES.values()))()
    projection = small(problem.params, "gaussian")
    batch = problem.batch(4)
    alone = optree.tree_map(lambda x: x[2:3], batch)
    together = gf.ghost_project(problem.model_fn, problem.params, batch, projection)
    single = gf.ghost_project(problem.model_fn, problem.params, alone, projection)
    assert_close(together[2:3], single, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_materialized_mode_agrees(kind: str) -> None:
    problem = next(iter(CASES.values()))()
    batch = problem.batch(3)
    projection = small(problem.params, kind)
    ghost, exact = (
        gf.ghost_project(problem.model_fn, problem.params, batch, projection, mode=mode)
        for mode in ("ghost", "materialized")
    )
    assert_close(ghost, exact, 1e-10)


def test_dense_projection_in_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix does not depend on the pieces it is made in."""
    problem = CASES["tied_lm"]()
    batch = problem.batch(3)
    projection = small(problem.params, "dense")
    whole = gf.ghost_project(problem.model_fn, problem.params, batch, projection)
    monkeypatch.setattr("ghostfunc.projection._readers.CHUNK", 45)
    cut = gf.ghost_project(problem.model_fn, problem.params, batch, projection)
    assert_close(cut, whole, 1e-12)
