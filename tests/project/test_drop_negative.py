"""`examples/drop_negative.py` from end to end on a few samples, and its arithmetic."""

from __future__ import annotations

import json
import os
import runpy
import sys
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import forked

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load() -> dict[str, Any]:
    sys.path.insert(0, str(EXAMPLES))
    return runpy.run_path(str(EXAMPLES / "drop_negative.py"), run_name="drop_negative")


def run_small(out: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    script = load()
    small = {"batch_size": 8, "layers": 1, "width": 16, "chunk_bytes": 32, "train_chunks": 20}
    script["main"](
        script["Config"](**small, steps=8, test_chunks=8, read_every=2, seeds=1, lr=1e-2, out=out)
    )


def test_end_to_end(tmp_path: Path) -> None:
    process = forked(run_small, tmp_path)
    process.join(60)
    assert process.exitcode == 0
    (repetition,) = json.loads((tmp_path / "results.json").read_text())["repetitions"]
    curves = repetition["curves"]
    assert len(curves) == 4
    assert all([step for step, _ in curve] == [2, 4, 6, 8] for curve in curves.values())
    assert all(0 <= share <= 1 for share in repetition["dropped"].values())
    assert (tmp_path / "drop_negative.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("loss", "steps"), [(2.5, 15), (2.0, 20), (1.0, inf), (2.9, 11)])
def test_steps_to(loss: float, steps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    got = load()["steps_to"]([(10, 3.0), (20, 2.0), (30, 2.2)], loss)
    assert got == pytest.approx(steps)
