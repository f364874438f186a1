"""EK-FAC against dense linear algebra, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import Params, Record, sample_grads, second_moment, sides, untouched
from torch import Tensor

import ghostfunc as gf

N, DAMPING = 16, 0.05
"""More samples than columns: sums of fewer have no unique eigenvectors."""


@dataclass(frozen=True)
class Case:
    """A model that records its uses.

    Attributes:
        sides: for every matrix, which sides have eigenbases of sums over positions ("left",
            "right"); "gradient" for bases of the gradient itself.
    """

    model: Callable[..., Tensor]
    params: Params
    batch: Any
    sides: dict[str, tuple[str, ...]]


CASES: dict[str, Callable[[], Case]] = {}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    CASES[build.__name__] = build
    return build


def weights(**shapes: tuple[int, ...]) -> Params:
    return {name: 0.6 * torch.randn(s, dtype=torch.float64) for name, s in shapes.items()}


def energy(out: Tensor) -> Tensor:
    return (out.flatten(1) - 1).square().mean(1)


BOTH = ("left", "right")


@case
def linear() -> Case:
    def model(p: Params, x: Tensor, record: Record = untouched) -> Tensor:
        h = torch.tanh(record("w", x, F.linear(x, p["w"])) + p["b"])
        return energy(record("v", h, F.linear(h, p["v"])) * p["scale"])

    params = weights(w=(5, 4), b=(5,), v=(3, 5), scale=())
    x = torch.randn(N, 4, dtype=torch.float64)
    return Case(model, params, x, {"w": BOTH, "v": BOTH})


@case
def linear_on_sequences() -> Case:
    def model(p: Params, x: Tensor, record: Record = untouched) -> Tensor:
        h = torch.tanh(record("w", x, F.linear(x, p["w"], p["b"])))
        return energy(F.layer_norm(h, (5,), p["g"], p["c"]))

    params = weights(w=(5, 4), b=(5,), g=(5,), c=(5,))
    return Case(model, params, torch.randn(N, 6, 4, dtype=torch.float64), {"w": BOTH})


@case
def conv1d_of_gpt2() -> Case:
    def model(p: Params, x: Tensor, record: Record = untouched) -> Tensor:
        y = torch.addmm(p["b"], x.flatten(0, 1), p["w"]).view(*x.shape[:2], -1)
        return energy(torch.tanh(record("w.T", x, y)))

    params = weights(w=(4, 5), b=(5,))
    return Case(model, params, torch.randn(N, 6, 4, dtype=torch.float64), {"w": BOTH})


@case
def convolution() -> Case:
    def model(p: Params, x: Tensor, record: Record = untouched) -> Tensor:
        patches = F.unfold(x, (3, 2), padding=1, stride=2).mT
        y = F.conv2d(x, p["w"], p["b"], stride=2, padding=1)
        return energy(torch.tanh(record("w", patches, y)))

    params = weights(w=(4, 2, 3, 2), b=(4,))
    return Case(model, params, torch.randn(N, 2, 10, 10, dtype=torch.float64), {"w": BOTH})


@case
def embedding() -> Case:
    def model(p: Params, ids: Tensor, record: Record = untouched) -> Tensor:
        x = F.embedding(ids, p["e"])
        x = record("e.T", F.one_hot(ids, 6).double(), x)
        return energy(torch.tanh(x.cumsum(1)))

    ids = torch.randint(6, (N, 5))
    return Case(model, weights(e=(6, 4)), ids, {"e": ("right",)})


@case
def tied_embedding_and_head() -> Case:
    def model(p: Params, ids: Tensor, record: Record = untouched) -> Tensor:
        x = record("e.T", F.one_hot(ids, 6).double(), F.embedding(ids, p["e"]))
        h = torch.tanh(record("w", x, x @ p["w"].t())).cumsum(1)
        logits = record("e", h, F.linear(h, p["e"]))[:, :-1]
        return F.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        ).view(len(ids), -1).mean(1)  # fmt: skip

    ids = torch.randint(6, (N, 5))
    return Case(model, weights(e=(6, 4), w=(4, 4)), ids, {"e": ("right",), "w": BOTH})


@case
def a_layer_called_twice() -> Case:
    def model(p: Params, x: Tensor, record: Record = untouched) -> Tensor:
        for _ in range(2):
            x = torch.tanh(record("w", x, F.linear(x, p["w"])) + p["b"])
        return energy(x)

    params = weights(w=(4, 4), b=(4,))
    return Case(model, params, torch.randn(N, 3, 4, dtype=torch.float64), {"w": BOTH})


@case
def derived_weights() -> Case:
    def model(p: Params, x: Tensor, record: Record = untouched) -> Tensor:
        w = p["v"].tanh() + p["up"] @ p["down"]
        return energy(torch.tanh(x @ w + p["table"][: x.shape[1]]))

    params = weights(v=(4, 5), up=(4, 2), down=(2, 5), table=(8, 5))
    x = torch.randn(N, 6, 4, dtype=torch.float64)
    of_gradient = ("gradient",)
    return Case(model, params, x, dict.fromkeys(params, of_gradient))


def as_matrices(g: Tensor) -> Tensor:
    return g.reshape(len(g), 1, -1) if g.ndim <= 2 else g.reshape(len(g), g.shape[1], -1)


def dense_blocks(case: Case, *, reduce: bool = False) -> dict[str, Tensor]:
    """Every block of the curvature, formed."""
    moments = sides(case.model, case.params, case.batch, reduce=reduce)
    out = {}
    left: Tensor | None
    for name, g in sample_grads(case.model, case.params, case.batch).items():
        g = as_matrices(g)
        if name not in case.sides:
            left, right = None, torch.einsum("npd,npe->de", g, g)
        elif case.sides[name] == ("gradient",):
            left, right = torch.einsum("npd,nqd->pq", g, g), torch.einsum("npd,npe->de", g, g)
        else:
            left, right = moments[name]
            left = left if "left" in case.sides[name] else None
        out[name] = second_moment(g, left, right)
    return out


def direction(params: Params) -> Params:
    g = torch.Generator().manual_seed(3)
    return {k: torch.randn(x.shape, generator=g, dtype=torch.float64) for k, x in params.items()}


@pytest.mark.parametrize("name", CASES)
def test_dense_linear_algebra(name: str) -> None:
    check(CASES[name](), reduce=False)


@pytest.mark.parametrize("name", ["linear_on_sequences", "convolution", "a_layer_called_twice"])
def test_dense_linear_algebra_of_reduced_positions(name: str) -> None:
    check(CASES[name](), reduce=True)


def check(case: Case, *, reduce: bool) -> None:
    blocks = dense_blocks(case, reduce=reduce)
    batches = [case.batch[:3], case.batch[3:]]
    sharing = "reduce" if reduce else "expand"
    made = gf.curvature.ekfac(case.model, case.params, batches, fisher="empirical", sharing=sharing)
    u = direction(case.params)
    applied, solved = made.matvec(u), made.solve(u, DAMPING)
    rooted = made.inverse_sqrt(made.inverse_sqrt(u, DAMPING), DAMPING)
    for name, c in blocks.items():
        flat = u[name].flatten()
        inverse = torch.linalg.inv(c + DAMPING * torch.eye(len(c), dtype=torch.float64))
        assert_equal(applied[name], c @ flat)
        assert_equal(solved[name], inverse @ flat)
        assert_equal(rooted[name], inverse @ flat)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    error = (found.flatten() - expected).abs().max() / expected.abs().max()
    assert error < 1e-8, f"off by {float(error):.1e}"


def test_the_inverse_fisher_of_a_linear_gaussian_model_is_exact() -> None:
    params = weights(w=(3, 4))

    def outputs(p: Params, batch: Any) -> Tensor:
        return F.linear(batch["x"], p["w"])

    def model(p: Params, batch: Any) -> Tensor:
        return (outputs(p, batch) - batch["y"]).square().sum(1)

    batch = {"x": torch.randn(N, 4).double(), "y": torch.randn(N, 3).double()}
    likelihood = gf.curvature.gaussian(outputs, lambda b: b["y"])
    made = gf.curvature.ekfac(model, params, [batch], fisher="exact", likelihood=likelihood)
    fisher = torch.func.hessian(lambda w: model({"w": w}, batch).mean())(params["w"]).view(12, 12)
    u = direction(params)
    inverse = torch.linalg.inv(fisher + DAMPING * torch.eye(12, dtype=torch.float64))
    assert_equal(made.matvec(u)["w"], fisher @ u["w"].flatten())
    assert_equal(made.solve(u, DAMPING)["w"], inverse @ u["w"].flatten())


def test_grouped_products_have_bases_of_their_own() -> None:
    params = weights(w=(4, 2, 3))
    x = torch.randn(N, 4, 12, dtype=torch.float64)

    def model(p: Params, x: Tensor) -> Tensor:
        return energy(torch.tanh(F.conv1d(x, p["w"], groups=2)))

    made = gf.curvature.ekfac(model, params, [x], fisher="empirical")
    (block,) = made.blocks
    assert (block.groups, block.rows, block.columns) == (2, 2, 6)
    patches = x.unfold(2, 3, 1).unflatten(1, (2, 2)).transpose(2, 3)  # [n, group, t, 2, 3]
    patches = patches.flatten(3)
    y = torch.einsum("ngtd,gpd->ngtp", patches, params["w"].view(2, 2, 6)).requires_grad_()
    (b,) = torch.autograd.grad(energy(torch.tanh(y)).sum(), y)
    g = sample_grads(model, params, x)["w"].view(N, 2, 2, 6)
    u = direction(params)["w"].view(2, 12)
    found = made.matvec(direction(params))["w"].view(2, 12)
    for group in range(2):
        left = torch.einsum("ntp,ntq->pq", b[:, group], b[:, group])
        right = torch.einsum("ntd,nte->de", patches[:, group], patches[:, group])
        assert_equal(found[group], second_moment(g[:, group], left, right) @ u[group])


def test_tables_never_have_a_matrix_of_their_rows() -> None:
    made = gf.curvature.ekfac(
        lambda p, ids: energy(F.embedding(ids, p["e"])),
        weights(e=(3000, 2)),
        [torch.randint(3000, (N, 4))],
        fisher="empirical",
        max_side=8,
    )
    (block,) = made.blocks
    assert (block.left, block.right) == (False, True)
    assert made.report().rows[0].sides == "3000* x 2"


def test_large_sides_keep_their_axes_when_asked_by_name() -> None:
    case = CASES["linear"]()
    made = gf.curvature.ekfac(
        case.model,
        case.params,
        [case.batch],
        fisher="empirical",
        max_side=4,
        max_dense=4,
        diagonal=["w", "v"],
    )
    g = sample_grads(case.model, case.params, case.batch)
    moments = sides(case.model, case.params, case.batch)
    u = direction(case.params)
    expected = second_moment(g["w"], None, moments["w"][1]) @ u["w"].flatten()
    assert_equal(made.matvec(u)["w"], expected)
    assert_equal(
        made.matvec(u)["v"], second_moment(g["v"], moments["v"][0], None) @ u["v"].flatten()
    )
    assert_equal(made.matvec(u)["b"], g["b"].square().mean(0) * u["b"])


def test_parameters_are_left_at_the_identity_by_name() -> None:
    case = CASES["linear"]()
    made = gf.curvature.ekfac(
        case.model, case.params, [case.batch], fisher="empirical", identity=["v"]
    )
    u = direction(case.params)
    assert_equal(made.matvec(u)["v"], u["v"].flatten())
    assert_equal(made.solve(u, 1.0)["v"], u["v"].flatten() / 2)


def test_unused_parameters_have_no_curvature() -> None:
    params = weights(w=(3, 4), idle=(2, 2))
    made = gf.curvature.ekfac(
        lambda p, x: energy(x @ p["w"].t()),
        params,
        [torch.randn(N, 4).double()],
        fisher="empirical",
    )
    assert not made.matvec(direction(params))["idle"].any()
    assert [r.kind for r in made.report().rows] == ["unused", "matrix"]


def test_parameters_that_only_later_batches_use_have_a_curvature() -> None:
    """Samples have gradients of `v` from their fifth position on."""

    def model(p: Params, x: Tensor) -> Tensor:
        out = F.linear(x, p["w"])
        return energy(torch.tanh(out + F.linear(x, p["v"], p["b"]) if x.shape[1] > 4 else out))

    params = weights(w=(3, 4), v=(3, 4), b=(3,))
    batches = [torch.randn(N, t, 4, dtype=torch.float64) for t in (3, 6)]
    made = gf.curvature.ekfac(model, params, batches, fisher="empirical")
    grads = [sample_grads(model, params, x) for x in batches]
    squares = {k: torch.cat([g[k] for g in grads]).flatten(1).square().sum(1) for k in params}
    for row in made.report().rows:
        assert row.kind != "unused"
        torch.testing.assert_close(row.trace, float(squares[row.path].mean()))


def test_the_damping_is_relative_to_each_parameters_mean_eigenvalue() -> None:
    case = CASES["linear"]()
    made = gf.curvature.ekfac(case.model, case.params, [case.batch], fisher="empirical")
    mean = {r.path: r.mean for r in made.report().rows}
    u = direction(case.params)
    relative = made.solve(u, 0.1, relative=True)
    for name in case.params:
        absolute = made.solve(u, 0.1 * mean[name])[name]
        torch.testing.assert_close(relative[name], absolute)


def test_chunks_change_nothing() -> None:
    case = CASES["a_layer_called_twice"]()
    u = direction(case.params)
    whole, parts = (
        gf.curvature.ekfac(
            case.model, case.params, [case.batch], fisher="empirical", chunk_size=size
        ).solve(u, DAMPING)
        for size in (None, 5)
    )
    for name in u:
        assert_equal(parts[name], whole[name].flatten())


def test_the_report_is_a_table() -> None:
    case = CASES["linear"]()
    report = gf.curvature.ekfac(case.model, case.params, [case.batch], fisher="empirical").report()
    g = sample_grads(case.model, case.params, case.batch)
    for row in report.rows:
        assert row.trace == pytest.approx(float(g[row.path].reshape(N, -1).square().sum(1).mean()))
        assert 1 <= row.half <= row.trace / row.mean
    lines = str(report).splitlines()
    assert lines[0] == f"EK-FAC of {N} samples, empirical Fisher"
    assert [line.split()[0] for line in lines[4:]] == ["b", "scale", "v", "w"]


def test_parameters_without_elements_have_no_curvature() -> None:
    """One that the losses use, one that they do not, one that a look-up uses, and one left out."""
    empty = {"used": (0, 3), "unused": (2, 0), "table": (4, 0), "bias": (0,), "out": (3, 0)}
    params = {"w": torch.arange(6.0).view(2, 3).double() / 6}
    params |= {name: torch.empty(shape).double() for name, shape in empty.items()}

    def model(p: dict[str, Tensor], b: Any) -> Tensor:
        used = p["used"].sum() + p["bias"].sum() + F.embedding(b["i"], p["table"]).sum(1)
        return F.linear(b["x"], p["w"]).sin().sum(1) + used + (b["x"] @ p["out"]).sum(1)

    g = torch.Generator().manual_seed(0)
    batch = {"x": torch.randn(5, 3, generator=g).double(), "i": torch.arange(5) % 4}
    choices: list[dict[str, Any]] = [{}, {"identity": ["out"]}, {"sharing": "reduce"}]
    for options in choices:
        made = gf.curvature.ekfac(model, params, [batch], fisher="empirical", **options)
        rows = {row.path: row for row in made.report().rows}
        assert all(rows[name].largest == rows[name].trace == 0 for name in empty)
        alone = gf.curvature.ekfac(
            lambda p, b: F.linear(b["x"], p["w"]).sin().sum(1),
            {"w": params["w"]},
            [batch],
            fisher="empirical",
        )
        for relative in (False, True):
            got = made.solve(params, 0.1, relative=relative)
            want = alone.solve({"w": params["w"]}, 0.1, relative=relative)
            assert {k: tuple(x.shape) for k, x in got.items() if k != "w"} == empty
            torch.testing.assert_close(got["w"], want["w"], rtol=1e-12, atol=1e-12)
        for way in ("rows", "directions"):
            torch.testing.assert_close(
                gf.influence(model, params, batch, batch, curvature=made, damping=0.1, way=way),
                gf.influence(
                    lambda p, b: F.linear(b["x"], p["w"]).sin().sum(1),
                    {"w": params["w"]},
                    batch,
                    batch,
                    curvature=alone,
                    damping=0.1,
                ),
            )
        operator = gf.curvature.hessian(model, params, [batch])
        solver = gf.curvature.cg(operator, preconditioner=made)
        assert solver.solve(params, 3.0)["w"].isfinite().all()
