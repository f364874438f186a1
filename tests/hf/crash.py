"""Kill a scoring run at every write, and at random; a resumed run must be bit-equal.

    python tests/hf/crash.py                 # every write, and 50 random kills
    python tests/hf/crash.py --kills 200 --every 0

Each case runs in a forked child, which dies by `os._exit`: nothing is cleaned up. Writes are all
calls that put something on disk in a run: of ours (temporary file, rename, table), of transformers
and torch (weights, optimizer, scheduler, random state, trainer state). A death in the middle of a
write leaves the first half of the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerState, modeling_utils

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
from hf_trainers import arguments, gpt2, texts

import ghostfunc as gf
from ghostfunc._base import whole_files

DIED = 77
WHEN = ("before", "in the middle of", "after")


def trainer(folder: Path) -> Any:
    """A run of six steps with a checkpoint after every second, of which two are kept."""
    args = arguments(
        folder, save_strategy="steps", save_steps=2, max_steps=6, save_total_limit=2,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    made = gf.hf.GhostTrainer(
        model=gpt2(resid_pdrop=0.1), args=args, train_dataset=texts(8, 0),
        score_dataset=texts(5, 1), score_form="previous_state",
    )  # fmt: skip
    return made


def outcome(folder: Path, *, resume: bool) -> bytes:
    """Weights and scores of a run, as bytes."""
    run = trainer(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which checkpoints are passed over
        try:
            run.train(resume_from_checkpoint=True if resume else None)
        except ValueError as error:  # no checkpoint yet, or none that is whole
            if not resume or not str(error).startswith(("No valid checkpoint", "No checkpoint")):
                raise
            run = trainer(folder)
            run.train()
    tensors = [*run.model.state_dict().values(), *run.scores]
    return b"".join(x.detach().numpy().tobytes() for x in tensors)


@contextmanager
def writes(at: Callable[[str], None]) -> Iterator[None]:
    """`at("before")`, `at("in the middle of")`, `at("after")` around every write."""

    def wrapped(write: Callable[..., Any], path_of: Callable[..., Any]) -> Callable[..., Any]:
        def writing(*args: Any, **kwargs: Any) -> Any:
            at("before")
            out = write(*args, **kwargs)
            path = Path(str(path_of(*args, **kwargs)))
            content = path.read_bytes() if path.is_file() else b""
            path.write_bytes(content[: len(content) // 2])
            at("in the middle of")
            path.write_bytes(content)
            at("after")
            return out

        return writing

    def renamed(source: Any, target: Any) -> None:
        at("before")
        replace(source, target)
        at("after")

    replace = os.replace
    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (torch, "save", wrapped(torch.save, lambda x, f, *a, **k: f)),
        (modeling_utils, "safe_save_file", wrapped(save_file, lambda x, f, *a, **k: f)),
        (TrainerState, "save_to_json", wrapped(TrainerState.save_to_json, lambda self, f: f)),
        (whole_files, "put", wrapped(whole_files.put, lambda write, aside: aside)),
        (os, "replace", renamed),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, new in places:
        setattr(owner, name, new)
    try:
        yield
    finally:
        for owner, name, old in kept:
            setattr(owner, name, old)


def in_child(work: Callable[[], None]) -> int:
    """The exit code of a forked child."""
    child = os.fork()
    if not child:
        code = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count_writes(folder: Path) -> list[str]:
    """The moments around the writes of a run, in order."""
    seen: list[str] = []
    with writes(seen.append):
        outcome(folder, resume=False)
    return seen


def dies_at(number: int, folder: Path) -> int:
    """A run in a child that dies at a moment."""

    def work() -> None:
        left = [number]

        def at(_: str) -> None:
            if left[0] == 0:
                os._exit(DIED)
            left[0] -= 1

        with writes(at):
            outcome(folder, resume=False)

    return in_child(work)


def at_every_write(folder: Path, every: int = 1) -> Counter[str]:
    """Deaths at every moment (or every few), each followed by a resumed run."""
    want = outcome(folder / "whole", resume=False)
    moments = count_writes(folder / "counted")
    counts: Counter[str] = Counter()
    for number in range(0, len(moments), every):
        run = folder / f"run-{number}"
        assert dies_at(number, run) == DIED
        counts["deaths"] += 1
        counts[moments[number]] += 1
        counts["bit-equal" if outcome(run, resume=True) == want else "other"] += 1
        shutil.rmtree(run)
    return counts


def at_random(folder: Path, kills: int, seed: int) -> Counter[str]:
    """As many runs that are killed (SIGKILL) at random times, and resumed."""
    want = outcome(folder / "whole", resume=False)
    start = time.perf_counter()
    outcome(folder / "timed", resume=False)
    length = time.perf_counter() - start
    draw, counts = random.Random(seed), Counter[str]()
    for number in itertools.count():
        if counts["killed"] == kills:
            return counts
        run = folder / f"killed-{number}"
        child = os.fork()
        if not child:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            outcome(run, resume=False)
            os._exit(0)
        at = draw.uniform(0.2, 1.0) * length
        time.sleep(at)
        os.kill(child, signal.SIGKILL)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        counts["killed" if killed else "had ended"] += 1
        length *= 1.02 if killed else 0.9  # a machine is as fast as its other work lets it
        if killed:
            counts["bit-equal" if outcome(run, resume=True) == want else "other"] += 1
        shutil.rmtree(run, ignore_errors=True)
    raise AssertionError("the numbers of runs have no end")


def main() -> None:
    """Both parts, with their counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="kills at random; 0 for none")
    parser.add_argument("--every", type=int, default=1, help="of so many moments one; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if given.every:
            found = at_every_write(Path(folder) / "w", given.every)
            print(json.dumps({"at every write": found}), flush=True)
        if given.kills:
            found = at_random(Path(folder) / "k", given.kills, given.seed)
            print(json.dumps({"at random": found}), flush=True)


if __name__ == "__main__":
    main()
