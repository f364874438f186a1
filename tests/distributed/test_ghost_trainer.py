"""`GhostTrainer` in several processes: the weights and values of one, or of a plain Trainer's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from ddp_ranks import results
from trainer_worker import DATA, ghost, outcome
from transformers import DataCollatorWithFlattening

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def difference(found: Any, expected: Any) -> float:
    """The largest, relative to the largest number."""
    a, b = torch.tensor(found), torch.tensor(expected)
    return float((a - b).abs().max() / b.abs().max())


def check_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found["ids"] == expected["ids"]
    assert found["counts"] == expected["counts"]
    assert difference(found["values"], expected["values"]) < tolerance
    assert difference(found["weights"], expected["weights"]) < tolerance
    for name, value in expected["logged"].items():
        assert found["logged"][name] == pytest.approx(value, rel=1e-3), name


def flattened() -> dict[str, Any]:
    """Every rank's samples in one row, as documents."""
    train, score = DATA["train_dataset"], DATA["score_dataset"]["a"]
    lists = [[{k: x.tolist() for k, x in item.items()} for item in part] for part in (train, score)]
    collator = DataCollatorWithFlattening()
    return {"train_dataset": lists[0], "score_dataset": lists[1], "data_collator": collator}


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {}),
        (4, {"score_form": "previous_state"}),
        (2, {"score_form": "exact", "log_gradients": True}),
        (2, flattened()),
    ],
    ids=["sgd", "previous_state", "exact", "flattened"],
)
def test_values_and_weights_are_those_of_one_process_and_of_trainer(
    size: int, options: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    expected = outcome(ghost(str(tmp_path / "one"), 1, None, {}, **options))
    runs = results(
        "trained_by_trainer", size, tmp_path, str(tmp_path / "ddp"), {}, options, None, True
    )
    for found in runs:
        check_same(found, expected, 1e-5)
        assert found["loss"] == pytest.approx(found["plain loss"], rel=1e-6)
        assert difference(found["weights"], found["plain"]) < 1e-6
    table = pq.read_table(tmp_path / "ddp" / "scores.parquet")
    assert sorted(table["sample_id"].to_pylist()) == expected["ids"]


def test_a_run_of_two_processes_goes_on_with_three(tmp_path: Path) -> None:
    check_resumed(tmp_path, "")


def check_resumed(tmp_path: Path, shards: str, **options: Any) -> None:
    """Two processes take two steps, three the next two: as one takes all four."""
    constant = {"lr_scheduler_type": "constant"}
    saving = {**constant, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    (tmp_path / "one").mkdir()
    expected = outcome(
        ghost(str(tmp_path / "one"), 1, None, {**constant, "max_steps": 4}, **options)
    )
    run, folder = "trained_by_trainer", str(tmp_path / "run")
    results(run, 2, tmp_path, folder, saving, options, None, False, shards)
    (tmp_path / "three").mkdir()
    args = folder, {**saving, "max_steps": 4}, options, f"{folder}/checkpoint-2", False, shards
    for found in results(run, 3, tmp_path / "three", *args):
        check_same(found, {**expected, "logged": {}}, 1e-5)


def test_sharded_parameters_are_trained_and_scored_alike(tmp_path: Path) -> None:
    """By FSDP2, as transformers loads a model."""
    (tmp_path / "one").mkdir()
    expected = outcome(ghost(str(tmp_path / "one"), 1, None, {}))
    args = str(tmp_path / "run"), {}, {}, None, True, "loaded"
    for found in results("trained_by_trainer", 2, tmp_path, *args):
        check_same(found, expected, 1e-5)
        assert found["loss"] == pytest.approx(found["plain loss"], rel=1e-6)
        assert difference(found["weights"], found["plain"]) < 1e-6
        assert re.search(
            r'OptionError: GhostTrainer with FSDP does not take score_form="exact", log_gradients',
            found["refused"],
        )


def test_a_sharded_run_of_two_processes_goes_on_with_three(tmp_path: Path) -> None:
    """By FSDP2, as accelerate wraps a model."""
    check_resumed(tmp_path, "accelerate", score_form="previous_state")


def test_an_error_of_one_process_ends_all(tmp_path: Path) -> None:
    others, own = results("refused", 2, tmp_path, str(tmp_path / "run"), "model")
    assert own == "LookupError: this model fails"
    said = r"RankError: GhostTrainer: while training, after 0 steps, rank 1 failed with LookupError"
    assert re.search(said, others), others


def test_other_data_of_one_process_end_all(tmp_path: Path) -> None:
    for said in results("refused", 2, tmp_path, str(tmp_path / "run"), "data"):
        assert re.search(r"RankError: GhostTrainer: the ranks have to be given the same", said)
