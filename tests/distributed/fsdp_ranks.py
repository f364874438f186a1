"""Starts a script on several ranks, in processes that need not import torch anew."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ddp_worker import script
from forks import forked

TIMEOUT = 900
"""Seconds for all ranks of one start."""


class Done(NamedTuple):
    """How a rank ended: its exit code, and what it printed."""

    returncode: int | None
    stdout: str


def started(name: str, world: int, directory: Path, *args: str) -> Callable[[], list[Done]]:
    """Start a script on every rank. What is returned waits for all of them."""
    running = []
    for rank in range(world):
        argv = [name, str(rank), str(world), str(directory), *args]
        running.append(forked(script, argv, str(directory / f"{rank}.out")))
    end = time.monotonic() + TIMEOUT

    def ended() -> list[Done]:
        for process in running:
            process.join(max(0.0, end - time.monotonic()))
        for process in running:
            process.kill()
            process.join()
        said = [directory / f"{rank}.out" for rank in range(world)]
        return [
            Done(p.exitcode, x.read_text() if x.exists() else "")
            for p, x in zip(running, said, strict=True)
        ]

    return ended


def ranks_of(name: str, world: int, directory: Path, *args: str) -> list[Done]:
    """Start a script on every rank and wait for all of them."""
    return started(name, world, directory, *args)()
