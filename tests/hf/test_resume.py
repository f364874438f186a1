"""A run that died goes on as if it had not; what does not belong together is not added up."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hf_trainers import arguments, gpt2, texts
from transformers import Trainer, TrainerCallback

import ghostfunc as gf
from ghostfunc.hf._state import HEADER, STATE_FILE

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
DATA = {"train_dataset": texts(8, 0), "score_dataset": texts(5, 1)}
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def ghost(folder: Path, args: dict[str, Any] | None = None, **options: Any) -> Any:
    args = {**SAVING, **(args or {})}
    options = {**DATA, **options}
    return gf.hf.GhostTrainer(model=gpt2(), args=arguments(folder, **args), **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that nothing happened to, with checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = ghost(folder)
    trainer.train()
    return folder, trainer


def copied(whole: tuple[Path, Any], to: Path, *steps: int) -> Path:
    """The run's folder with some of its checkpoints."""
    for step in steps:
        name = f"checkpoint-{step}"
        shutil.copytree(whole[0] / name, to / name)
    return to


def same(trainer: Any, other: Any) -> bool:
    pairs = zip(trainer.model.parameters(), other.model.parameters(), strict=True)
    return all(map(torch.equal, trainer.scores, other.scores)) and all(
        torch.equal(x, y) for x, y in pairs
    )


# --- torn checkpoints ---


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda d: (d / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda d: (d / "trainer_state.json").write_text("{"), "trainer_state.json is torn"),
        (lambda d: (d / "model.safetensors").unlink(), "its weights are missing"),
        (lambda d: truncate(d / "model.safetensors"), "model.safetensors is torn"),
        (lambda d: (d / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda d: truncate(d / "optimizer.pt"), "optimizer.pt is torn"),
        (lambda d: truncate(d / "rng_state.pth"), "rng_state.pth is torn"),
        (lambda d: truncate(d / STATE_FILE), f"{STATE_FILE} is damaged"),
        (lambda d: shutil.copy(d.parent / "checkpoint-2" / STATE_FILE, d), "is of step 2, not 4"),
    ],
)
def test_the_newest_whole_checkpoint(
    harm: Any, said: str, whole: tuple[Path, Any], tmp_path: Path
) -> None:
    copied(whole, tmp_path, 2, 4)
    harm(tmp_path / "checkpoint-4")
    trainer = ghost(tmp_path)
    with pytest.warns(UserWarning, match=f"from checkpoint-2; passed over: checkpoint-4 .*{said}"):
        trainer.train(resume_from_checkpoint=True)
    assert same(trainer, whole[1])


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_no_checkpoint_is_whole(whole: tuple[Path, Any], tmp_path: Path) -> None:
    copied(whole, tmp_path, 2)
    truncate(tmp_path / "checkpoint-2" / STATE_FILE)
    with pytest.raises(gf.OptionError, match=r"No checkpoint in .* is whole: checkpoint-2"):
        ghost(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(gf.OptionError, match=r"no whole checkpoint: .*is damaged"):
        ghost(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="No valid checkpoint"):
        ghost(tmp_path / "none").train(resume_from_checkpoint=True)


def test_a_checkpoint_written_over_is_not_whole(whole: tuple[Path, Any], tmp_path: Path) -> None:
    """Of an earlier run: its mark goes before the first file is written anew."""
    copied(whole, tmp_path, 2)

    trainer = ghost(tmp_path)
    trainer._save_optimizer_and_scheduler = lambda folder: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


# --- corrupted state ---


@pytest.mark.parametrize("where", [0, HEADER - 5, HEADER + 3, HEADER + 40, -3])
def test_a_flipped_byte_is_noticed(where: int, whole: tuple[Path, Any], tmp_path: Path) -> None:
    folder = copied(whole, tmp_path, 2) / "checkpoint-2"
    content = bytearray((folder / STATE_FILE).read_bytes())
    content[where] ^= 1
    (folder / STATE_FILE).write_bytes(content)
    with pytest.raises(gf.OptionError, match="damaged"):
        ghost(tmp_path).train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize("content", [b"", b"ghostfunc", b"x" * 500, b"ghostfunc scores 1 " * 20])
def test_garbage_is_one_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / STATE_FILE
    path.write_bytes(content)
    with pytest.raises(gf.OptionError, match=rf"{STATE_FILE} does not hold .*older checkpoint"):
        gf.hf._state.load_state(path)


# --- what does not belong together ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"score_form": "exact"}, "score_form was 'sgd' and is 'exact'"),
        ({"score_order": 2}, "score_order was 1 and is 2"),
        ({"score_dataset": texts(5, 2)}, "score_dataset 'score' has other samples"),
        ({"score_dataset": texts(4, 1)}, "score_dataset 'score' has other samples"),
        ({"score_dataset": {"a": texts(5, 1)}}, r"were \['score'\] and are \['a'\]"),
        ({"train_dataset": texts(8, 0)[::-1]}, "train_dataset was"),
        ({"id_column": "row"}, "id_column was None and is 'row'"),
    ],
)
def test_scores_made_in_another_way(
    options: dict[str, Any], said: str, whole: tuple[Path, Any]
) -> None:
    with pytest.raises(gf.OptionError, match=f"made in another way: .*{said}"):
        ghost(whole[0], **options).train(resume_from_checkpoint=str(whole[0] / "checkpoint-4"))


def test_from_a_plain_trainers_checkpoint(tmp_path: Path) -> None:
    args = arguments(tmp_path, **SAVING)
    Trainer(model=gpt2(), args=args, train_dataset=DATA["train_dataset"]).train()
    trainer = ghost(tmp_path)
    with pytest.warns(UserWarning, match="checkpoint-4 has no scores .* from step 4 on"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 6
    assert int(trainer.scores.counts.sum()) == 2 + 3
    table = pq.read_table(tmp_path / "scores.parquet")
    assert json.loads(table.schema.metadata[b"ghostfunc"])["scored_from_step"] == 4
    # Its own checkpoints remember since when.
    again = ghost(tmp_path, {"max_steps": 8})
    again.train(resume_from_checkpoint=True)
    assert again._kept.scored_from == 4


def test_an_exception_leaves_the_table(tmp_path: Path) -> None:
    class Dies(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    trainer = ghost(tmp_path, callbacks=[Dies()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    table = pq.read_table(tmp_path / "scores.parquet")
    assert sum(table["steps"].to_pylist()) == 8
    assert json.loads(table.schema.metadata[b"ghostfunc"])["global_step"] == 3


# --- death at every write ---


def test_death_at_writes(tmp_path: Path) -> None:
    """A few of `crash.py`'s cases, which takes every write."""
    # By its path: the store has a harness of this name too.
    spec = importlib.util.spec_from_file_location("hf_crash", Path(__file__).parent / "crash.py")
    assert spec is not None
    assert spec.loader is not None
    crash = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(crash)
    counts = crash.at_every_write(tmp_path, every=19)
    assert counts["bit-equal"] == counts["deaths"] > 3
