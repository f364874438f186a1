"""`gf.verify` where scores cancel, and where they are wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

import ghostfunc as gf
from ghostfunc._rules.registry import RULES
from ghostfunc._transforms import verify as verifying


def cancelling(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    """Two terms of a gradient that differ in their eighth digit."""
    x = batch["x"]
    return (x @ params["w"]).exp().sum(1) - ((1 + 1e-8) * x @ params["w"]).exp().sum(1)


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def problem(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    w, x, y = (random(*s, seed=seed) for s in ((5, 3), (4, 5), (3, 5)))
    return {"w": w}, {"x": x}, {"x": y}


@pytest.mark.parametrize("seed", range(4))
def test_scores_that_cancel_are_known_to_no_more_than_rounding_leaves(seed: int) -> None:
    report = gf.verify(cancelling, *problem(seed))
    assert report.ok, report
    assert report.total.noise > 0
    asked = gf.verify(cancelling, *problem(seed), tolerance=1e-12)
    assert not asked.ok
    assert asked.total.noise == 0


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-4), (torch.float64, 1e-8), (torch.bfloat16, 0.5)]
)
def test_a_wrong_score_is_no_noise(
    dtype: torch.dtype, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any, mode: str, **options: Any) -> Any:
        dots = gf.ghost_dot_prod(*args, mode=mode, **options)
        return {k: x * (1 + error * (mode == "ghost")) for k, x in dots.items()}

    def model_fn(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return (batch["x"] @ params["w"]).tanh().square().sum(1)

    monkeypatch.setattr(verifying, "ghost_dot_prod", wrong)
    report = gf.verify(model_fn, *optree.tree_map(lambda x: x.to(dtype), problem(0)))
    assert not report.ok
    assert report.total.error >= 0.5 * error


def test_a_report_says_that_no_call_returns_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def model_fn(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return (batch["x"] @ params["w"]).tanh().square().sum(1)

    assert gf.verify(model_fn, *problem(0)).refused == ""

    def another(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return (batch["x"] @ params["w"]).tanh().square().sum(1)

    rule = RULES[Tensor.matmul]

    def off(b: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert rule.fn is not None
        return rule.fn(b * 1.01, *args, **kwargs)

    monkeypatch.setitem(RULES, Tensor.matmul, replace(rule, fn=off))
    report = gf.verify(another, *problem(0))
    assert not report.ok
    assert "not those of plain autograd" in report.refused
    assert f"refuses these numbers: {report.refused}" in str(report)
    with pytest.raises(gf.SampleAxisError):
        gf.ghost_dot_prod(another, *problem(0))
