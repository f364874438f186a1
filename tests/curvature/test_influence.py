"""Influence functions against dense linear algebra and against models trained without a sample."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense import sample_grads
from torch import Tensor

import ghostfunc as gf
from ghostfunc.curvature import CurvatureError

Params = dict[str, Tensor]
Batch = dict[str, Tensor]
DAMPING = 0.1


def logits(p: Params, b: Any) -> Tensor:
    return F.linear(torch.tanh(F.linear(b["x"], p["w"], p["b"])), p["v"])


def model(p: Params, b: Any) -> Tensor:
    return F.cross_entropy(logits(p, b), b["y"], reduction="none")


SOFTMAX = gf.curvature.softmax(logits, lambda b: b["y"])


def draw(n: int) -> Batch:
    return {"x": torch.randn(n, 2, dtype=torch.float64), "y": torch.randint(4, (n,))}


@pytest.fixture
def params() -> Params:
    shapes = {"b": (3,), "v": (4, 3), "w": (3, 2)}
    return {k: torch.randn(s, dtype=torch.float64) for k, s in shapes.items()}


def rows(params: Params, batch: Batch) -> Tensor:
    g = sample_grads(model, params, batch)
    return torch.cat([g[k].flatten(1) for k in sorted(g)], 1)


def dense_inverse(params: Params, train: Batch) -> Tensor:
    """Of GGN + damping."""
    sizes = [params[k].numel() for k in sorted(params)]

    def of_flat(x: Tensor) -> Tensor:
        parts = zip(sorted(params), x.split(sizes), strict=True)
        return logits({k: part.view(params[k].shape) for k, part in parts}, train)

    flat = torch.cat([params[k].flatten() for k in sorted(params)])
    j = torch.func.jacrev(of_flat)(flat)
    p = logits(params, train).softmax(-1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    c = torch.einsum("nkp,nkl,nlq->pq", j, h, j) / len(p)
    return torch.linalg.inv(c + DAMPING * torch.eye(len(c), dtype=torch.float64))


class Loader:
    def __init__(self, batch: Batch, size: int) -> None:
        self.batch, self.size = batch, size

    def __iter__(self) -> Iterator[Batch]:
        parts = zip(*(x.split(self.size) for x in self.batch.values()), strict=True)
        return (dict(zip(self.batch, part, strict=True)) for part in parts)


@pytest.mark.parametrize(("n", "m"), [(9, 3), (3, 8)])
@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 2}, {"directions_at_once": 1}, {"loaders": True}], ids=str
)
def test_scores_by_cg_are_those_of_the_dense_inverse(
    n: int, m: int, options: dict[str, Any], params: Params
) -> None:
    train, queries = draw(n), draw(m)
    expected = rows(params, train) @ dense_inverse(params, train) @ rows(params, queries).mT
    ggn = gf.curvature.ggn(model, params, [train], likelihood=SOFTMAX)
    solver = gf.curvature.cg(ggn, tolerance=1e-10)
    sides: Any = (train, queries)
    given = {k: x for k, x in options.items() if k != "loaders"}
    if "loaders" in options:
        sides = Loader(train, 4), Loader(queries, 2)
    found = gf.influence(model, params, *sides, curvature=solver, damping=DAMPING, **given)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_scores_by_ekfac_are_dot_products_with_its_solutions(params: Params) -> None:
    train, queries = draw(9), draw(3)
    made = gf.curvature.ekfac(model, params, [train], likelihood=SOFTMAX)
    scores = gf.influence(model, params, train, queries, curvature=made, damping=DAMPING)
    assert scores.shape == (9, 3)
    for j in range(3):
        one = {k: x[j : j + 1] for k, x in queries.items()}
        u = made.solve(gf.direction(model, params, one), DAMPING)
        expected = gf.ghost_dot_prod(model, params, train, direction=u)
        torch.testing.assert_close(scores[:, j], expected)
    # The other side is solved for, and nothing else changes.
    turned = gf.influence(model, params, queries, train, curvature=made, damping=DAMPING)
    torch.testing.assert_close(turned.mT, scores)
    relative = gf.influence(
        model, params, train, queries, curvature=made, damping=DAMPING, relative=True
    )
    assert not torch.allclose(relative, scores)


def test_no_curvature_is_a_dot_product(params: Params) -> None:
    train, queries = draw(5), draw(3)
    scores = gf.influence(model, params, train, queries, curvature=None)
    torch.testing.assert_close(scores, rows(params, train) @ rows(params, queries).mT)


def test_contributions_of_parameters_add_up(params: Params) -> None:
    train, queries = draw(5), draw(3)
    made = gf.curvature.ekfac(model, params, [train], likelihood=SOFTMAX)
    options: Any = {"curvature": made, "damping": DAMPING}
    for sides in ((train, queries), (queries, train)):
        parts = gf.influence(model, params, *sides, per_param=True, **options)
        assert parts.keys() == params.keys()
        total = gf.influence(model, params, *sides, **options)
        torch.testing.assert_close(sum(parts.values()), total)


def test_contributions_of_positions_add_up() -> None:
    params = {"e": torch.randn(5, 4).double(), "w": torch.randn(5, 4).double()}

    def of_tokens(p: Params, ids: Tensor) -> Tensor:
        h = torch.tanh(F.embedding(ids, p["e"]))
        return F.cross_entropy(
            F.linear(h, p["w"]).flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="none"
        ).view(ids.shape).mean(1)  # fmt: skip

    train, queries = torch.randint(5, (3, 6)), torch.randint(5, (4, 6))
    made = gf.curvature.ekfac(of_tokens, params, [train, queries], fisher="empirical")
    options: Any = {"curvature": made, "damping": DAMPING}
    total = gf.influence(of_tokens, params, train, queries, **options)
    parts = gf.influence(of_tokens, params, train, queries, per_position=True, **options)
    assert parts.shape == (3, 4, 6)
    torch.testing.assert_close(parts.sum(2), total)


def test_queries_may_have_a_loss_of_their_own(params: Params) -> None:
    train, queries = draw(5), draw(2)

    def margin(p: Params, b: Any) -> Tensor:
        z = logits(p, b)
        return z[:, 0] - z[:, 1]

    scores = gf.influence(model, params, train, queries, curvature=None, query_fn=margin)
    g = sample_grads(margin, params, queries)
    other = torch.cat([g[k].flatten(1) for k in sorted(g)], 1)
    torch.testing.assert_close(scores, rows(params, train) @ other.mT)


# --- sign and scale ---------------------------------------------------------------------------


def slope(predicted: Tensor, actual: Tensor) -> tuple[float, float]:
    """Of actual on predicted, and the correlation."""
    x, y = predicted.flatten(), actual.flatten()
    correlation = torch.corrcoef(torch.stack([x, y]))[0, 1]
    return float((x @ y) / (x @ x)), float(correlation)


def test_scores_are_the_change_by_leaving_out_of_a_ridge_regression() -> None:
    n, weight = 200, 0.2
    x, w = torch.randn(n, 6).double(), torch.randn(1, 6).double()
    train = {"x": x, "y": x @ w.mT + torch.randn(n, 1)}
    queries = {"x": torch.randn(4, 6).double(), "y": torch.randn(4, 1).double()}

    def outputs(p: Params, b: Any) -> Tensor:
        return F.linear(b["x"], p["w"])

    def squares(p: Params, b: Any) -> Tensor:
        return (outputs(p, b) - b["y"]).square().sum(1)

    def fit(kept: Tensor) -> Params:
        """The minimum of `sum_kept loss / n + weight / 2 ||w||^2`."""
        a = 2 * x[kept].mT @ x[kept] / n + weight * torch.eye(6, dtype=torch.float64)
        return {"w": torch.linalg.solve(a, 2 * x[kept].mT @ train["y"][kept] / n).mT}

    everything = torch.ones(n, dtype=torch.bool)
    params = fit(everything)
    gaussian = gf.curvature.gaussian(outputs, lambda b: b["y"])
    made = gf.curvature.ekfac(squares, params, [train], fisher="exact", likelihood=gaussian)
    scores = gf.influence(squares, params, train, queries, curvature=made, damping=weight)
    changes = []
    for i in range(60):
        kept = everything.clone()
        kept[i] = False
        changes.append(squares(fit(kept), queries) - squares(params, queries))
    found, correlation = slope(scores[:60] / n, torch.stack(changes))
    assert found == pytest.approx(1, abs=0.06)
    assert correlation > 0.995


def test_scores_are_the_change_by_leaving_out_of_a_logistic_regression() -> None:
    n, weight = 120, 0.1
    train = {"x": torch.randn(n, 5).double(), "y": torch.randint(3, (n,))}
    queries = {"x": torch.randn(5, 5).double(), "y": torch.randint(3, (5,))}

    def linear(p: Params, b: Any) -> Tensor:
        return F.linear(b["x"], p["w"])

    def losses(p: Params, b: Any) -> Tensor:
        return F.cross_entropy(linear(p, b), b["y"], reduction="none")

    def objective(w: Tensor, weights: Tensor) -> Tensor:
        fitted = (losses({"w": w}, train) * weights).sum() / n
        return fitted + weight / 2 * w.square().sum()

    def fit(weights: Tensor) -> Params:
        w = torch.zeros(3, 5, dtype=torch.float64)
        for _ in range(8):  # Newton's method
            g = torch.func.grad(objective)(w, weights).flatten()
            h = torch.func.hessian(objective)(w, weights).view(15, 15)
            w = w - torch.linalg.solve(h, g).view(3, 5)
        assert float(g.norm()) < 1e-12
        return {"w": w}

    params = fit(torch.ones(n))
    softmax = gf.curvature.softmax(linear, lambda b: b["y"])
    solver = gf.curvature.cg(
        gf.curvature.ggn(losses, params, [train], likelihood=softmax), tolerance=1e-8
    )
    scores = gf.influence(losses, params, train, queries, curvature=solver, damping=weight)
    changes = []
    for i in range(20):
        weights = torch.ones(n)
        weights[i] = 0
        changes.append(losses(fit(weights), queries) - losses(params, queries))
    found, correlation = slope(scores[:20] / n, torch.stack(changes))
    assert found == pytest.approx(1, abs=0.06)
    assert correlation > 0.99


# --- bad input --------------------------------------------------------------------------------


def test_a_curvature_of_other_params_is_refused(params: Params) -> None:
    train = draw(4)
    other = {**params, "b": params["b"] + 1e-3}
    fewer = {k: params[k] for k in "bv"}
    made = gf.curvature.ekfac(model, params, [train], likelihood=SOFTMAX)
    ggn = gf.curvature.ggn(model, params, [train], likelihood=SOFTMAX)
    for curvature in (made, gf.curvature.cg(ggn), gf.curvature.neumann(ggn, scale=0.1)):
        with pytest.raises(CurvatureError, match="other values of these parameters"):
            gf.influence(model, other, train, train, curvature=curvature, damping=0.1)
        with pytest.raises(CurvatureError, match="of other parameters"):
            gf.influence(model, fewer, train, train, curvature=curvature, damping=0.1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"damping": None}, "a curvature needs a damping"),
        ({"damping": 0.0}, "damping=0.0 must be positive"),
        ({"curvature": None, "damping": 0.1}, "there is nothing to damp"),
        ({"curvature": None, "damping": None, "relative": True}, "relative=True is for an EKFAC"),
        ({"directions_at_once": 0}, "directions_at_once=0"),
        ({"chunk_size": 1.5}, "chunk_size must be"),
        ({"train": iter([draw(2)])}, "train is a .*iterator, which can be gone through once"),
    ],
)
def test_options(options: dict[str, Any], said: str, params: Params) -> None:
    made = gf.curvature.ekfac(model, params, [draw(4)], likelihood=SOFTMAX)
    given = {"train": draw(4), "queries": draw(2), "curvature": made, "damping": 0.1, **options}
    with pytest.raises(gf.OptionError, match=said):
        gf.influence(model, params, given.pop("train"), given.pop("queries"), **given)


def test_a_solver_of_ones_own(params: Params) -> None:
    class Half:
        def solve(self, direction: Any, damping: float) -> Any:
            return {k: x / (0.5 + damping) for k, x in direction.items()}

    class Wrong:
        def solve(self, direction: Any, damping: float) -> Any:
            return {k: x.flatten() for k, x in direction.items()}

    train, queries = draw(4), draw(2)
    scores = gf.influence(model, params, train, queries, curvature=Half(), damping=0.5)
    torch.testing.assert_close(scores, rows(params, train) @ rows(params, queries).mT)
    with pytest.raises(gf.ParamsError, match=r"what curvature\.solve returned leaf 'v' must have"):
        gf.influence(model, params, train, queries, curvature=Wrong(), damping=0.5)


def test_batches_may_be_mappings_of_any_kind() -> None:
    """A mapping that is no dict is a batch, and no iterable of batches."""
    w = {"w": torch.randn(3, 2, dtype=torch.float64)}

    def model_fn(p: Any, batch: Any) -> Tensor:
        return (batch["x"] @ p["w"]).square().sum(1)

    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    expected = gf.influence(model_fn, w, {"x": x}, {"x": y}, curvature=None)
    found = gf.influence(model_fn, w, UserDict(x=x), UserDict(x=y), curvature=None)
    assert torch.equal(found, expected)
