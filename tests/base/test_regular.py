"""A FIFO in the place of a file is named at once: opened like a file, it would be waited for."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ghostfunc as gf
from ghostfunc.data import Rows
from ghostfunc.data._parts import Parts, read_recipe
from ghostfunc.hf._checkpoints import LAST_WRITTEN, flaw_of
from ghostfunc.hf._state import STATE_FILE, load_state


def part(path: Path) -> object:
    return Parts(path.parent, {}).load(0)


def checkpoint(path: Path) -> object:
    """Why a trainer's checkpoint with a FIFO among its files is passed over."""
    folder = path.parent
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", LAST_WRITTEN):
        if path.name == name:
            continue
        if name.endswith(".pt"):
            torch.save({}, folder / name)
        elif name == LAST_WRITTEN:
            (folder / name).write_text(json.dumps({"global_step": 1}))
        else:
            from safetensors.torch import save_file

            save_file({"w": torch.zeros(1)}, folder / name)
    raise gf.OptionError(str(flaw_of(folder, weights_alone=False)))


CASES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "rows": ("pool.jsonl", Rows.open),
    "parquet": ("pool.parquet", Rows.open),
    "recipe": ("run.json", lambda path: read_recipe(path.parent)),
    "part": ("run/part-000000.npz", part),
    "curvature": ("c.safetensors", gf.curvature.load),
    "state": (STATE_FILE, load_state),
    "trainer's state": (LAST_WRITTEN, checkpoint),
    "weights": ("model.safetensors", checkpoint),
    "optimizer": ("optimizer.pt", checkpoint),
    "scores": (STATE_FILE, checkpoint),
}


@pytest.mark.skipif(sys.platform == "win32", reason="no such files there")
@pytest.mark.parametrize("case", CASES)
def test_nobody_waits_for_a_fifo(tmp_path: Path, case: str) -> None:
    name, act = CASES[case]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(gf.GhostError, match=f"{path.name}|weights"):
        act(path)
