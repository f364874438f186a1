"""Files that a warm call enters: what `docs/reading_the_code.md` lists."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MOST = 36
"""Files that a warm call enters; the number only goes down."""


@pytest.fixture(scope="module")
def files() -> Iterator[ModuleType]:
    """The script that counts."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield __import__("files")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("files", "in_docs"):
            sys.modules.pop(name, None)


def test_the_table_is_that_of_today(files: ModuleType) -> None:
    """`python benchmarks/files.py --record` writes it."""
    assert files.table() == files.IN_DOCS.recorded()


def test_a_warm_call_looks_its_trace_up_once(files: ModuleType) -> None:
    found = files.warm_call()
    assert found["_trace/fitting.py"]["_look_up"] == 1
    assert found["_base/remembered.py"]["memory"] <= 3
    assert len(found) <= MOST


@pytest.mark.parametrize(("m", "length"), [(1, 7), (8, 5)])
def test_two_runs_look_up_one_trace_each(files: ModuleType, m: int, length: int) -> None:
    """Where validation samples are longer, or too many for one run."""
    found = files.warm_call((m, length))
    assert found["_taps/run.py"]["run"] == 2
    assert found["_trace/fitting.py"]["_look_up"] == 2
    assert len(found) <= MOST + 1


def test_files_are_noted_once_in_their_order(files: ModuleType) -> None:
    from ghostfunc._base import dtypes, trees

    with files.watching() as found:
        trees.tensors_of([1, 2])
        trees.tensors_of(3)
        dtypes.wide(torch.ones(2))
    assert list(found) == ["_base/trees.py", "_base/dtypes.py"]
    assert found["_base/trees.py"]["tensors_of"] == 2
