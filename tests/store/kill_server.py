"""Forks workers that fill a store and kills them: `kill_server.py path n kills seed`.

One process imports everything, so that a worker starts in no time and is killed at work.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback

import torch
from helpers import fill, make_store

from ghostfunc.store import Store


def work(path: str, n: int) -> None:
    fill(Store.open(path, writable=True), n)


def written(path: str) -> int:
    """Chunks whose rows are there."""
    try:
        return len(os.listdir(f"{path}/checkpoints/final/rows"))
    except FileNotFoundError:
        return 0


def main() -> None:
    path, n, kills, seed = sys.argv[1], *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    fill(make_store("memory://warm-up", 8), 8)
    start = time.perf_counter()
    fill(make_store("memory://timed", 8), 8)
    chunk = time.perf_counter() - start  # as fast as the machine is now
    chance = random.Random(seed)
    for _ in range(kills):
        worker = os.fork()
        if worker == 0:
            try:
                work(path, n)
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        # Wherever the machine's pace puts it: a few chunks on, and a random while after that.
        before, ahead = written(path), chance.randrange(4)
        while written(path) < before + ahead:
            if os.waitpid(worker, os.WNOHANG)[0]:
                sys.exit("a worker ended by itself")
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 2 * chunk))
        os.kill(worker, signal.SIGKILL)
        _, status = os.waitpid(worker, 0)
        print("killed" if os.WIFSIGNALED(status) else "finished", flush=True)


if __name__ == "__main__":
    main()
