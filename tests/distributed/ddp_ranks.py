"""Starts functions of worker files in processes of one group, and collects what they return."""

from __future__ import annotations

import json
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import ddp_worker
from forks import forked


class Ended(NamedTuple):
    """How one rank ended: what it returned (None if it raised), its exit code, its last words."""

    result: Any
    code: int | None
    stderr: str


class Started(NamedTuple):
    """A group that runs.

    Attributes:
        name: the function that its ranks call.
        folder: where they write.
        processes: one per rank.
        end: until when they may run, by the monotonic clock.
    """

    name: str
    folder: Path
    processes: list[BaseProcess]
    end: float

    def ended(self) -> list[Ended]:
        """Wait for all ranks. Those that still run at the end are killed: their exit code is -9."""
        for process in self.processes:
            process.join(max(0.0, self.end - time.monotonic()))
        for process in self.processes:
            process.kill()
            process.join()
        paths = [self.folder / f"{self.name}-{r}" for r in range(len(self.processes))]
        return [_ended(path, p.exitcode) for path, p in zip(paths, self.processes, strict=True)]


def start(name: str, size: int, folder: Path, *args: Any, seconds: float = 60) -> Started:
    """`<name>(*args)` of a worker file in every process of a group whose collectives time out after
    so many seconds. The ranks have four times as many, and a minute."""
    processes = [
        forked(ddp_worker.rank, name, size, str(folder), rank, args, seconds)
        for rank in range(size)
    ]
    return Started(name, folder, processes, time.monotonic() + 4 * seconds + 60)


def _ended(path: Path, code: int | None) -> Ended:
    result, said = path.with_suffix(".json"), path.with_suffix(".err")
    return Ended(
        json.loads(result.read_text()) if result.exists() else None,
        code,
        said.read_text() if said.exists() else "",
    )


def results(name: str, size: int, folder: Path, *args: Any) -> list[Any]:
    """What every rank returned; all have to."""
    ended = start(name, size, folder, *args).ended()
    assert all(e.code == 0 for e in ended), "\n".join(e.stderr for e in ended)
    return [e.result for e in ended]
