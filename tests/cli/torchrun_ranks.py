"""Commands in processes as torchrun starts them, and what may befall one of these."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from forks import forked

from ghostfunc import NonFiniteLossError
from ghostfunc.cli import main
from ghostfunc.data import _score


class Line(NamedTuple):
    """A command line, and what befalls rank 1 in its first part: "killed" or "not finite"."""

    words: Sequence[str]
    trouble: str = ""


class Said(NamedTuple):
    """How a command ended on one rank: its exit code (None if killed), how many finished parts the
    folders of runs then held, and what it printed."""

    code: int | None
    parts: int
    text: str


def together(lines: Sequence[Line], size: int, folder: Path) -> list[list[Said]]:
    """For every command line, what became of it on every rank."""
    ports = [_free_port() for _ in lines]
    processes = [forked(rank, number, size, ports, lines, folder) for number in range(size)]
    for process in processes:
        process.join(200)
        process.kill()
        process.join()
    return [[_said(folder / f"rank{r}-{i}") for r in range(size)] for i in range(len(lines))]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port


def _said(path: Path) -> Said:
    ended, text = path.with_suffix(".json"), path.with_suffix(".out")
    code, parts = json.loads(ended.read_text()) if ended.exists() else (None, 0)
    return Said(code, parts, text.read_text() if text.exists() else "never began")


def rank(number: int, size: int, ports: list[int], lines: Sequence[Line], folder: Path) -> None:
    """One process: makes all commands, one after the other."""
    torch.set_num_threads(1)
    os.chdir(folder)
    own = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    for i, (line, port) in enumerate(zip(lines, ports, strict=True)):
        os.environ.update({k: str(x) for k, x in {**own, "MASTER_PORT": port}.items()})
        path = folder / f"rank{number}-{i}"
        said = os.open(path.with_suffix(".out"), os.O_CREAT | os.O_WRONLY)
        os.dup2(said, 1)
        os.dup2(said, 2)
        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(_score, "PART", 8)
            if line.trouble:
                stack.enter_context(_trouble(patch, line.trouble, number, folder / f"begun-{i}"))
            code = main(list(line.words))
        parts = len(list(folder.glob("*.run/part-*")))
        path.with_suffix(".json").write_text(json.dumps([code, parts]))
    os._exit(0)  # gloo's threads may not have ended


@contextmanager
def _trouble(patch: pytest.MonkeyPatch, what: str, number: int, begun: Path) -> Any:
    """Rank 1 makes no part; the others make theirs when that has befallen it."""
    part = _score._part

    def troubled(*args: Any) -> Any:
        if number == 1:
            begun.touch()
            if what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise NonFiniteLossError("a loss is not finite")
        while not begun.exists():
            time.sleep(0.01)
        time.sleep(0.3)
        return part(*args)

    patch.setattr(_score, "_part", troubled)
    yield
