"""Every quantity on tensors derived from parameters, and through the op they meet samples in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, random_direction, sample_grads
from problems import Problem
from torch import Tensor, nn
from torch.nn.utils import prune

import ghostfunc as gf
from ghostfunc.projection import full_projection, kronecker_projection

D, T = 4, 3
Made = tuple[Callable[[Any, Any], Tensor], Any]


def of_module(module: nn.Module) -> Made:
    return gf.from_module(module.double().eval(), lambda m, x: m(x).flatten(1).sin().sum(1))


def weight_norm() -> Made:
    return of_module(torch.nn.utils.parametrizations.weight_norm(nn.Linear(D, 5)))


def spectral_norm() -> Made:
    module = torch.nn.utils.parametrizations.spectral_norm(nn.Conv1d(T, 6, 2))
    return of_module(module)


def spectral_norm_by_hook() -> Made:
    return of_module(torch.nn.utils.spectral_norm(nn.Linear(D, 5)))


def pruned() -> Made:
    module = prune.random_unstructured(nn.Linear(D, 5), "weight", amount=0.4)
    return of_module(module)


class Merged(nn.Module):
    """A low-rank update merged into a frozen weight, which is used on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.randn(D, D), requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.randn(D, 2))

    def forward(self, x: Tensor) -> Tensor:
        w = self.base + 0.5 * self.b @ self.a
        return (x @ w).tanh() @ w.t()


class Biased(nn.Module):
    """Attention with a table of relative positions for its mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2 * T - 1, 2)
        self.project = nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.project(x).chunk(3, -1))
        at = torch.arange(T)
        bias = self.table(at[:, None] - at + T - 1).permute(2, 0, 1).unsqueeze(0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(len(x), -1, -1, -1))


class Cast(nn.Module):
    """Weights kept wider than they are used, and cut out of one packed tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(2 * D, D))
        self.gain = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.packed.to(torch.float64).chunk(2)
        return F.linear(F.linear(x, up).relu() * (1 + self.gain), down.T, self.gain)


CASES: dict[str, Callable[[], Made]] = {
    "weight norm": weight_norm,
    "spectral norm": spectral_norm,
    "spectral norm by hook": spectral_norm_by_hook,
    "pruned": pruned,
    "merged low rank": lambda: of_module(Merged()),
    "relative positions": lambda: of_module(Biased()),
    "cast and cut": lambda: of_module(Cast()),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_every_quantity(name: str) -> None:
    model_fn, params = CASES[name]()
    x, other = torch.randn(4, T, D).double(), torch.randn(3, T, D).double()
    problem = Problem(model_fn, params, draw=lambda *_: None)
    g, h = (dict(zip(sorted(params), sample_grads(problem, b), strict=True)) for b in (x, other))
    rows, others = (
        torch.cat([y.reshape(len(y), -1) for y in grads.values()], 1) for grads in (g, h)
    )
    norms = rows.norm(dim=1)
    u = random_direction(params)
    along = {k: y.reshape(4, -1) @ u[k].flatten() for k, y in g.items()}
    limit = float(norms.median())
    factors = (limit / norms).clamp(max=1)
    clipped, found = gf.ghost_clipped_grad(model_fn, params, x, max_norm=limit)
    step = gf.ghost_value_and_grad(model_fn, params, x, other)
    kept = gf.factored_grads(model_fn, params, x)
    pairs = {
        "g_i": (gf.per_sample_grads(model_fn, params, x, mode="ghost"), g),
        "<g_i, u>": (gf.ghost_dot_prod(model_fn, params, x, direction=u, per_param=True), along),
        "<g_i, v>": (gf.ghost_dot_prod(model_fn, params, x, other), rows @ others.mean(0)),
        "<g_i, v_j>": (
            gf.ghost_dot_prod(model_fn, params, x, other, reduction="none"),
            rows @ others.mT,
        ),
        "step": (step.dot_prods, rows @ others.mean(0)),
        "gradient": (step.grads, {k: y.mean(0) for k, y in g.items()}),
        "cosines": (
            gf.ghost_cosine(model_fn, params, x, other),
            F.cosine_similarity(rows, others.mean(0, keepdim=True)),
        ),
        "norms": (gf.ghost_norm(model_fn, params, x), norms),
        "clipped": (clipped, {k: torch.tensordot(factors, y, 1) for k, y in g.items()}),
        "norms before": (found, norms),
        "gram": (gf.ghost_gram(model_fn, params, x), rows @ rows.mT),
        "gram of two": (gf.ghost_gram(model_fn, params, x, other), rows @ others.mT),
        "kept": (kept.gram(), rows @ rows.mT),
    }
    for what, (got, want) in pairs.items():
        try:
            assert_close(got, want, 1e-10)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from None
    for projection in (
        full_projection(params),
        kronecker_projection(params, rank_total=4, rank_min=1, kind="gaussian", seed=0),
    ):
        projected = gf.ghost_project(model_fn, params, x, projection)
        assert_close(projected, projection.apply(g), 1e-10)
