"""Calls, waits and lines of Python of every public function: what `benchmarks/calls.json` holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
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
    for counted in ("functions", "lines"):
        then[counted] = int(then[counted] * LINES_OFF)
    assert all(now[k] <= then[k] for k in then), (now, then)


@pytest.mark.parametrize(
    ("name", "figure", "most"),
    [
        ("ghost_value_and_grad", "calls", 1.8),
        ("ghost_value_and_grad", "all", 2.5),
        ("ghost_value_and_grad, direction", "calls", 1.8),
        ("ghost_dot_prod", "calls", 1.6),
        ("ghost_dot_prod", "all", 2.5),
    ],
)
def test_beside_a_plain_step(name: str, figure: str, most: float) -> None:
    assert RECORDED[name][figure] <= most * RECORDED["plain"][figure]


@pytest.mark.parametrize(
    ("name", "figure", "most"),
    [
        ("ghost_value_and_grad", "functions", 3900),
        ("ghost_value_and_grad", "lines", 20600),
        ("ghost_dot_prod", "functions", 3550),
        ("ghost_dot_prod", "lines", 18950),
    ],
)
def test_python_of_a_warm_step(name: str, figure: str, most: int) -> None:
    """Of 259 torch calls and 28 uses of parameters."""
    assert RECORDED[name][figure] <= most


@pytest.fixture(scope="module")
def waiting(calls: ModuleType) -> dict[str, Any]:
    """Every function, counted on a model that never waits itself."""
    from shapes import Shape, untied_gpt, untied_loss

    shape = Shape(1, 64, 20, 6, 8, 1)
    counts = {}
    runs = calls.functions(shape, untied_gpt, untied_loss, "blocks.*.up.weight")
    for name, run in runs.items():
        run()
        with calls.CountCalls() as counts[name]:
            run()
    return counts


@pytest.mark.parametrize("name", RECORDED)
def test_no_function_waits_twice(name: str, waiting: dict[str, Any]) -> None:
    silent = name.startswith("plain") or name.endswith("no check")
    assert waiting[name].waits.total() == (0 if silent else 1), waiting[name].waits


@pytest.mark.parametrize("name", [x for x in RECORDED if not x.startswith("plain")])
def test_functions_wait_when_all_is_queued(name: str, waiting: dict[str, Any]) -> None:
    """After the last product and the last kernel of attention."""
    order = waiting[name].order
    if name.endswith("no check"):
        return
    (at,) = [i for i, op in enumerate(order) if op == "_local_scalar_dense"]
    large = {"mm", "addmm", "bmm", "native_layer_norm_backward", "embedding_dense_backward"}
    assert not large.intersection(order[at:]), order[at:]


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
    assert (count.lines, count.functions) == (1, 1)
