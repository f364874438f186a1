"""The model of what travels, held against counted collectives, and its page against the model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from ddp_ranks import results

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model() -> ModuleType:
    path = ROOT / "benchmarks" / "scaling_model.py"
    spec = importlib.util.spec_from_file_location("scaling_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling_model"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", [2, 4])
def test_a_step_gives_to_collectives_what_the_model_says(
    size: int, model: ModuleType, tmp_path: Path
) -> None:
    for one in results("travelled", size, tmp_path, "25"):
        said = model.ddp_step(one["model"] / 4, one["tensors"], size)
        assert sum(one["calls"]) == said.gradients + said.tables
        assert sum(one["orders"]) == said.order
        assert sum(one["calls"]) + sum(one["orders"]) == said.given


def test_the_page_shows_the_models_tables(model: ModuleType) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for table in (model.corpus_table, model.ddp_table, model.step_table):
        assert table(model.H200) in page, table(model.H200)


def test_first_figures(model: ModuleType) -> None:
    assert model.projecting(model.M7, 1e9, 512) == pytest.approx(1.43e22, rel=0.01)
    assert model.H200.hours(model.projecting(model.M7, 1e9, 512)) == pytest.approx(1e4, rel=0.01)
    assert model.rows_bytes(1e9, 4096, 4) == pytest.approx(16.4e12, rel=0.01)
    assert model.ddp_step(1e9, 1, 2).moved == pytest.approx(8e9, rel=1e-6)
    assert model.fsdp_step(model.M70, 64) == pytest.approx(4 * 140e9 * 63 / 64)
