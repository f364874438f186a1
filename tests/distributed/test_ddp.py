"""Ranks of a group score and train as one process with all their samples does."""

from __future__ import annotations

from pathlib import Path

import pytest
from ddp_ranks import results

NAMES = "mlp_on_sequences,tied_lm,weight_norm,lora,unused_parameter"
"""All problems hold to these bounds; these run here."""


@pytest.mark.parametrize(("size", "dtype"), [(2, "float64"), (2, "float32"), (4, "float64")])
def test_a_step_of_all_ranks_is_that_of_one_process(size: int, dtype: str, tmp_path: Path) -> None:
    names = NAMES if dtype == "float64" else "mlp_on_sequences,tied_lm,weight_norm"
    for found in results("equal", size, tmp_path, dtype, names):
        for name, errors in found.items():
            assert max(errors.values()) < {"float64": 1e-12, "float32": 1e-6}[dtype], (name, errors)


@pytest.mark.parametrize("size", [2, 4])
def test_weights_are_those_of_one_process_and_of_ddp(size: int, tmp_path: Path) -> None:
    found = results("trained", size, tmp_path)
    assert len({one.pop("first weight") for one in found}) == 1
    for one in found:
        assert max(one.values()) < 1e-10, one


def test_all_ways_to_ask(tmp_path: Path) -> None:
    for found in results("others", 2, tmp_path):
        assert max(found.values()) < 1e-12, found


def test_buckets_leave_while_the_backward_pass_goes_on(tmp_path: Path) -> None:
    size, words = 2, 8
    for one in results("travelled", size, tmp_path, "0.001"):
        table = size * 3 * words
        tables = [x for x in one["calls"] if x == table]
        buckets = [x for x in one["calls"] if x != table]
        assert len(tables) == 3  # the arguments, the validation gradient, the step
        assert sum(buckets) == 2 * one["model"]
        assert len(buckets) == 2 * 3  # two matrices, and what comes after them
        assert one["early"] == [3, 2], one  # the tied matrix is whole at the end of the step
