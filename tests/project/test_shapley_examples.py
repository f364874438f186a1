"""The scripts run, and come to the conclusions they claim."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run_script(name: str, *arguments: str) -> str:
        pytest.importorskip("sklearn")
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    dtype = torch.get_default_dtype()
    yield run_script
    torch.set_default_dtype(dtype)


def test_mislabelled_digits(run) -> None:
    out = run("mislabelled_digits.py", "--seeds", "1", "--epochs", "2")
    (row,) = re.findall(r"^ +2 +(.*)$", out, re.M)
    dot, cosine, influence, loss = map(float, re.findall(r"([\d.]+) \(", row))
    assert min(dot, cosine) > 0.6
    assert min(influence, loss) > 0.75


def test_optimizer_aware(run) -> None:
    out = run("optimizer_aware.py", "--tasks", "digits", "--seeds", "1", "--steps", "1", "60")
    first, later = re.findall(r"^ +\d+ .*$", out, re.M)
    assert first.count("nan") == 3  # without moments the one-pass form tells nothing apart
    _, sgd, _, previous, _, exact, _, _, _, agreement = map(float, re.findall(r"[\d.]+", later))
    assert exact > 0.99
    assert previous > sgd
    assert agreement > 0.9
