"""Processes of tests: a server that has imported what they need forks them, in no time.

`multiprocessing` has one such server for all folders, and it imports the list that it was given
last: so one list stands here.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
PLACES = [TESTS / "distributed", TESTS, TESTS / "hf", TESTS.parent]
"""Where the server finds the files of workers."""

WORKERS = ["ddp_worker", "trainer_worker", "fsdp_worker", "examples.graddotprod_lm.train"]

FORKS: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
if sys.platform != "win32":
    FORKS.set_forkserver_preload(WORKERS)


def forked(function: Callable[..., Any], *args: Any) -> BaseProcess:
    """Start a process that calls a function."""
    process: BaseProcess = FORKS.Process(target=_call, args=(function, *args))
    places = [*map(str, PLACES), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as environment:  # of the server, which the first one starts
        environment.setenv("PYTHONPATH", os.pathsep.join(places))
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("HF_HUB_OFFLINE", "1")
        process.start()
    return process


def _call(function: Callable[..., Any], *args: Any) -> None:
    gc.freeze()  # what the server has imported: transformers' trainers make full collections
    function(*args)


def preloaded() -> list[str]:
    """Those of `WORKERS` that a new process need not import."""
    return [name for name in WORKERS if name in sys.modules]
