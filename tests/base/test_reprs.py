"""Results print in one line, whatever their size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ghostfunc as gf

NET = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 1))
MODEL_FN, P = gf.from_module(NET, lambda m, x: m(x)[:, 0].sin())
X = torch.randn(200, 20)

RESULTS: dict[str, Any] = {
    "GhostStep": lambda: gf.ghost_value_and_grad(MODEL_FN, P, X, X[:2]),
    "GhostVjp": lambda: gf.ghost_vjp(MODEL_FN, P, X, {"square": gf.SqNorm()}),
    "ClippedGrad": lambda: gf.ghost_clipped_grad(MODEL_FN, P, X, max_norm=1.0),
    "FactoredGrads": lambda: gf.factored_grads(MODEL_FN, P, X),
    "Report": lambda: gf.verify(MODEL_FN, P, X[:3], X[:2]),
    "Plan": lambda: gf.explain(MODEL_FN, P, X, X[:2]),
    "Scores": lambda: gf.score_dataset(MODEL_FN, P, X, val=X[:2]),
}


@pytest.mark.parametrize("name", RESULTS)
def test_one_line(name: str) -> None:
    text = repr(RESULTS[name]())
    assert text.startswith(f"{name}(")
    assert "\n" not in text
    assert len(text) < 200


def test_what_the_line_says() -> None:
    step = RESULTS["GhostStep"]()
    assert repr(step) == (
        "GhostStep(losses=float32[200], grads={4 tensors, 661 numbers}, dot_prods=float32[200])"
    )
    assert repr(RESULTS["GhostVjp"]()).endswith("grads=None)")


@pytest.mark.parametrize("name", ["Report", "Plan"])
def test_tables_in_a_notebook(name: str) -> None:
    result = RESULTS[name]()
    assert result._repr_html_().startswith("<pre>")
    assert str(result).splitlines()[0] in result._repr_html_()
