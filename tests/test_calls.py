"""Calls, waits and lines of Python of every public function: what `benchmarks/calls.json` holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RECORDED: dict[str, dict[str, int]] = json.loads((BENCHMARKS / "calls.json").read_text())
LINES_OFF = 1.1
"""Releases of Python count the lines of a comprehension in their own ways."""


@pytest.fixture(scope="module")
def calls() -> Iterator[ModuleType]:
    """The script that counts."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield __import__("calls")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("calls", "shapes"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def found(calls: ModuleType) -> dict[str, dict[str, int]]:
    """The counts of today."""
    return {name: calls.count(run) for name, run in calls.functions().items()}


def test_every_function_is_recorded(found: dict[str, dict[str, int]]) -> None:
    assert list(found) == list(RECORDED)


@pytest.mark.parametrize("name", RECORDED)
def test_no_more_calls_than_recorded(name: str, found: dict[str, dict[str, int]]) -> None:
    """`python benchmarks/calls.py --record` notes what became less."""
    now, then = found[name], dict(RECORDED[name])
    then["lines"] = int(then["lines"] * LINES_OFF)
    assert all(now[k] <= then[k] for k in then), (now, then)


def test_what_waits(calls: ModuleType) -> None:
    x = torch.arange(4.0)
    for wait in (
        lambda: bool((x > 1).any()),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: torch.tensor([1.0, 2.0]),
        lambda: torch.equal(x, x),
    ):
        with calls.CountCalls() as count:
            wait()
        assert count.waits.total() >= 1, wait
    with calls.CountCalls() as count:
        torch.where(x > 1, x, 0).sum().clamp(min=1)
        x[torch.arange(2)]
    assert count.waits.total() == 0
    assert set(count.calls) >= {"where", "sum", "index", "gt"}


def test_lines_of_the_package_are_counted_alone(calls: ModuleType) -> None:
    from ghostfunc._base.dtypes import wide

    with calls.counting_lines() as count:
        wide(torch.ones(2))
        sum(range(3))
    assert count.lines == 1
