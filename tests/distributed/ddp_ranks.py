"""Starts functions of worker files in processes of one group, and collects what they return.

A server imports torch and ghostfunc once and forks the ranks: starting one takes no time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import ddp_worker

HERE = Path(__file__).resolve().parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ddp_worker", "trainer_worker"])


class Ended(NamedTuple):
    """How one rank ended: what it returned (None if it raised), its exit code, its last words."""

    result: Any
    code: int | None
    stderr: str


def find_workers() -> None:
    """Tell the server, before it starts, where the worker files are."""
    tests = HERE.parent
    paths = [str(HERE), str(tests), str(tests / "hf"), str(tests.parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"


def ranks(name: str, size: int, folder: Path, *args: Any, seconds: float = 60) -> list[Ended]:
    """`<name>(*args)` of a worker file in every process of a group whose collectives time out after
    so many seconds. Those that still run after four times as many, and a minute, are killed: their
    exit code is -9."""
    find_workers()
    started = [
        FORKS.Process(target=ddp_worker.rank, args=(name, size, str(folder), rank, args, seconds))
        for rank in range(size)
    ]
    for process in started:
        process.start()
    end = time.monotonic() + 4 * seconds + 60
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
    for process in started:
        process.kill()
        process.join()
    return [_ended(folder / f"{name}-{r}", p.exitcode) for r, p in enumerate(started)]


def _ended(path: Path, code: int | None) -> Ended:
    result, said = path.with_suffix(".json"), path.with_suffix(".err")
    return Ended(
        json.loads(result.read_text()) if result.exists() else None,
        code,
        said.read_text() if said.exists() else "",
    )


def results(name: str, size: int, folder: Path, *args: Any) -> list[Any]:
    """What every rank returned; all have to."""
    ended = ranks(name, size, folder, *args)
    assert all(e.code == 0 for e in ended), "\n".join(e.stderr for e in ended)
    return [e.result for e in ended]
