"""The examples run, and come to the conclusions they claim."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(
    name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_greats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "curves" / "greats.png"
    arguments = ("--seeds", "1", "--flops", "1e9", "--figure", str(figure))
    out = run("greats.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    accuracy = dict(re.findall(r"^(\S.*?) +\d+ +(\d+\.\d)%", out, re.M))
    assert float(accuracy["GREATS"]) > 10 + float(accuracy["uniform"])
    assert float(accuracy["GREATS"]) > 10 + float(accuracy["uniform, clean ones included"])
    assert figure.stat().st_size > 10_000


def test_dp_sgd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("dp_accounting")
    arguments = ("--epsilon", "4", "--epochs", "4")
    out = run("dp_sgd.py", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    rows = re.findall(r"^ +(\S+) +([\d.]+) +([\d.]+)% ", out, re.M)
    (epsilon, noise, private), (infinite, none, plain) = rows
    assert 3.8 < float(epsilon) <= 4.0
    assert infinite == "infinite"
    assert float(noise) > 0.5 > float(none)
    assert min(float(private), float(plain)) > 70
