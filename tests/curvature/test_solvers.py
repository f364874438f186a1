"""Products with Hessians and GGNs, and solutions by them, against dense linear algebra."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ghostfunc as gf
from ghostfunc.curvature import ConvergenceError

Params = dict[str, Tensor]


def logits(p: Params, b: Any) -> Tensor:
    return F.linear(torch.tanh(F.linear(b["x"], p["w"], p["b"])), p["v"])


def labels(b: Any) -> Tensor:
    y: Tensor = b["y"]
    return y


def model(p: Params, b: Any) -> Tensor:
    return F.cross_entropy(logits(p, b), b["y"], reduction="none")


SOFTMAX = gf.curvature.softmax(logits, labels)


@pytest.fixture
def params() -> Params:
    shapes = {"b": (3,), "v": (4, 3), "w": (3, 2)}
    return {k: torch.randn(s, dtype=torch.float64) for k, s in shapes.items()}


@pytest.fixture
def batches() -> list[dict[str, Tensor]]:
    sizes = (5, 3, 6)
    return [{"x": torch.randn(n, 2).double(), "y": torch.randint(4, (n,))} for n in sizes]


def flat(tree: Params) -> Tensor:
    return torch.cat([tree[k].flatten() for k in sorted(tree)])


def joined(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {k: torch.cat([b[k] for b in batches]) for k in batches[0]}


def unflatten(x: Tensor, like: Params) -> Params:
    parts = x.split([like[k].numel() for k in sorted(like)])
    return {k: part.view(like[k].shape) for k, part in zip(sorted(like), parts, strict=True)}


def dense(kind: str, params: Params, batches: list[dict[str, Tensor]]) -> Tensor:
    """The matrix by its definition, with torch.func."""
    batch, x = joined(batches), flat(params)
    if kind == "hessian":
        h: Tensor = torch.func.hessian(lambda p: model(unflatten(p, params), batch).mean())(x)
        return h
    jacobian = torch.func.jacrev(lambda p: logits(unflatten(p, params), batch))(x)
    p = logits(params, batch).softmax(-1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.einsum("nkp,nkl,nlq->pq", jacobian, h, jacobian) / len(p)


def operator(kind: str, params: Params, batches: Any, **options: Any) -> gf.curvature.DataOperator:
    if kind == "hessian":
        return gf.curvature.hessian(model, params, batches, **options)
    return gf.curvature.ggn(model, params, batches, likelihood=SOFTMAX, **options)


def random_direction(params: Params, seed: int = 5) -> Params:
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(x.shape, generator=g, dtype=torch.float64) for k, x in params.items()}


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("options", [{}, {"hvp": "reverse"}, {"chunk_size": 2}], ids=str)
def test_products_are_those_of_the_matrix(
    kind: str, options: Any, params: Params, batches: Any
) -> None:
    c, u = dense(kind, params, batches), random_direction(params)
    found = operator(kind, params, batches, **options).matvec(u)
    torch.testing.assert_close(flat(found), c @ flat(u), rtol=1e-9, atol=1e-12)
    one = operator(kind, params, batches, **options).matvec_of(batches[1], u)
    want = dense(kind, params, batches[1:2]) @ flat(u)
    torch.testing.assert_close(flat(one), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-8])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_cg_solves_to_the_tolerance(
    tolerance: float, preconditioned: bool, params: Params, batches: Any
) -> None:
    made = gf.curvature.ekfac(model, params, batches, fisher="exact", likelihood=SOFTMAX)
    solver = gf.curvature.cg(
        operator("ggn", params, batches),
        preconditioner=made if preconditioned else None,
        tolerance=tolerance,
    )
    u, c = random_direction(params), dense("ggn", params, batches)
    solution = solver.solution(u, 0.01)
    rest = flat(u) - c @ flat(solution.direction) - 0.01 * flat(solution.direction)
    residual = float(rest.norm() / flat(u).norm())
    assert residual <= tolerance
    assert solution.residuals[-1] == pytest.approx(residual, rel=1e-3)
    assert solution.residuals[0] == 1.0
    torch.testing.assert_close(flat(solver.solve(u, 0.01)), flat(solution.direction))


def test_the_preconditioner_saves_iterations() -> None:
    # A linear-Gaussian model: EK-FAC is the GGN itself, and one iteration is enough.
    params = {"w": torch.randn(3, 6, dtype=torch.float64)}
    x = torch.randn(40, 6).double() * torch.logspace(0, 2, 6)

    def outputs(p: Params, b: Any) -> Tensor:
        return F.linear(b, p["w"])

    def squares(p: Params, b: Any) -> Tensor:
        return outputs(p, b).square().sum(1)

    gaussian = gf.curvature.gaussian(outputs, lambda b: torch.zeros(len(b), 3).to(b))
    exact = gf.curvature.ekfac(squares, params, [x], fisher="exact", likelihood=gaussian)
    ggn = gf.curvature.ggn(squares, params, [x], likelihood=gaussian)
    u = random_direction(params)
    counts = [
        len(gf.curvature.cg(ggn, preconditioner=by, tolerance=1e-8).solution(u, 1e-3).residuals)
        for by in (exact, None)
    ]
    assert counts[0] == 2
    assert counts[1] > 5


def test_not_to_converge_is_an_error(params: Params, batches: Any) -> None:
    solver = gf.curvature.cg(operator("ggn", params, batches), tolerance=1e-12, max_iterations=3)
    with pytest.raises(ConvergenceError, match="did not reach tolerance=1e-12 in 3 iter") as error:
        solver.solve(random_direction(params), 1e-6)
    assert len(error.value.residuals) == 4


def test_a_hessian_that_is_not_positive_is_an_error(params: Params, batches: Any) -> None:
    eigenvalues = torch.linalg.eigvalsh(dense("hessian", params, batches))
    assert eigenvalues[0] < -0.01
    solver = gf.curvature.cg(operator("hessian", params, batches), tolerance=1e-8)
    with pytest.raises(ConvergenceError, match="is not positive: along a direction p"):
        solver.solve(random_direction(params), 1e-3)
    damping = 0.1 - float(eigenvalues[0])
    x = flat(solver.solve(random_direction(params), damping))
    c = dense("hessian", params, batches) + damping * torch.eye(len(x))
    torch.testing.assert_close(c @ x, flat(random_direction(params)), rtol=1e-6, atol=1e-6)


def test_a_zero_direction_has_a_zero_solution(params: Params, batches: Any) -> None:
    zero = {k: torch.zeros_like(x) for k, x in params.items()}
    ggn = operator("ggn", params, batches)
    assert not flat(gf.curvature.cg(ggn).solve(zero, 0.1)).any()
    assert not flat(gf.curvature.neumann(ggn, scale=1.0).solve(zero, 0.1)).any()


def test_a_neumann_series_converges_or_says_so(params: Params, batches: Any) -> None:
    c, u = dense("ggn", params, batches), random_direction(params)
    c = c + 0.5 * torch.eye(len(c), dtype=torch.float64)
    largest = float(torch.linalg.eigvalsh(c)[-1])
    ggn = operator("ggn", params, batches)
    solution = gf.curvature.neumann(ggn, scale=1 / largest, tolerance=1e-3).solution(u, 0.5)
    rest = (flat(u) - c @ flat(solution.direction)).norm() / flat(u).norm()
    assert float(rest) <= 1e-3
    assert solution.residuals[-1] == pytest.approx(float(rest), rel=1e-3)
    with pytest.raises(ConvergenceError, match="below 2 / scale"):
        gf.curvature.neumann(ggn, scale=3 / largest, iterations=50).solve(u, 0.5)


def test_lissa_draws_batches(params: Params, batches: Any) -> None:
    u = random_direction(params)
    ggn = operator("ggn", params, batches)
    exact = flat(gf.curvature.cg(ggn, tolerance=1e-8).solve(u, 0.5))
    options: Any = {"scale": 0.1, "iterations": 60, "repeats": 3, "tolerance": 0.5}
    found = [flat(gf.curvature.lissa(ggn, seed=s, **options).solve(u, 0.5)) for s in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert float((found[0] - exact).norm()) < 0.3 * float(exact.norm())
    # With one batch there is nothing to draw: it is the Neumann series.
    whole = operator("ggn", params, [joined(batches)])
    options |= {"repeats": 1, "tolerance": 0.01, "iterations": 120}
    torch.testing.assert_close(
        flat(gf.curvature.lissa(whole, **options).solve(u, 0.5)), exact, rtol=0.02, atol=0.02
    )


def test_ggn_of_a_module_with_attention() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double()
    outputs, _ = gf.from_module(layer, lambda m, b: m(b["x"]))
    model_fn, params = gf.from_module(
        layer, lambda m, b: (m(b["x"]) - b["y"]).square().flatten(1).sum(1)
    )
    batch = {k: torch.randn(3, 5, 4, dtype=torch.float64) for k in "xy"}
    gaussian = gf.curvature.gaussian(outputs, lambda b: b["y"])
    u = random_direction(params)
    forward, reverse = (
        gf.curvature.ggn(model_fn, params, [batch], likelihood=gaussian, hvp=hvp).matvec(u)
        for hvp in ("forward", "reverse")
    )
    torch.testing.assert_close(forward, reverse, rtol=1e-8, atol=1e-10)
    with sdpa_kernel(SDPBackend.MATH):
        slope = torch.func.jvp(lambda p: outputs(p, batch), (params,), (u,))[1]
    (expected,) = torch.func.vjp(lambda p: outputs(p, batch), params)[1](2 * slope / 3)
    torch.testing.assert_close(forward, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda c: gf.curvature.cg(lambda u: u), "cg takes an operator"),
        (lambda c: gf.curvature.cg(c, preconditioner=c), "preconditioner must be"),
        (lambda c: gf.curvature.cg(c, tolerance=0), "tolerance=0 must lie between"),
        (lambda c: gf.curvature.cg(c, tolerance="small"), "tolerance must be a number"),
        (lambda c: gf.curvature.cg(c, max_iterations=0), "max_iterations=0 must be"),
        (lambda c: gf.curvature.neumann(c, scale=0), "scale=0 must be a positive"),
        (lambda c: gf.curvature.neumann(c, scale=1.0, iterations=0), "iterations=0 must be"),
        (lambda c: gf.curvature.neumann(3, scale=1.0), "operator must be"),
        (lambda c: gf.curvature.lissa(c, scale=1.0, iterations=2, seed="a"), "seed='a' must"),
        (lambda c: gf.curvature.lissa(c, scale=1.0, iterations=2, repeats=0), "repeats=0"),
        (lambda c: gf.curvature.lissa(3, scale=1.0, iterations=2), "lissa draws batches"),
        (lambda c: gf.curvature.cg(c).solve({}, -1.0), "damping=-1.0 must be positive"),
        (lambda c: gf.curvature.neumann(c, scale=1.0).solve({}, 0), "damping=0 must be"),
    ],
)
def test_options(make: Any, said: str, params: Params, batches: Any) -> None:
    with pytest.raises(gf.OptionError, match=said):
        make(operator("ggn", params, batches))


def test_bad_data(params: Params, batches: Any) -> None:
    with pytest.raises(gf.OptionError, match="batches is empty"):
        operator("ggn", params, [])
    with pytest.raises(gf.OptionError, match="gone through once"):
        operator("hessian", params, iter(batches))
    with pytest.raises(gf.OptionError, match="hvp='both'"):
        operator("hessian", params, batches, hvp="both")
    doubled = gf.curvature.softmax(lambda p, b: 2 * logits(p, b), labels)
    with pytest.raises(gf.OptionError, match="likelihood is not that of model_fn"):
        gf.curvature.ggn(model, params, batches, likelihood=doubled)
    with pytest.raises(gf.ParamsError, match="direction must be a pytree like params"):
        operator("ggn", params, batches).matvec({"w": params["w"]})
