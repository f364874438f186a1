"""The work of `project_dataset`, cut into batches: whose it is, what is read ahead."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ghostfunc._base.errors import OptionError
from ghostfunc._base.types import PyTree
from ghostfunc.store._rows import StoredRows
from ghostfunc.store._work import Work


class Job(NamedTuple):
    """One batch of a chunk: samples `ids[at]` of the chunk's missing samples `ids`."""

    ids: list[int]
    at: list[int]
    first: bool
    last: bool
    skipped: int


def jobs_of(
    store: StoredRows,
    checkpoint: str,
    chunks: Sequence[int],
    work: Work,
) -> Iterator[Job]:
    """The batches of all that is missing in these chunks."""
    skipped = 0
    for chunk in chunks:
        ids = [i for run in store.missing(checkpoint, [chunk]) for i in run]
        skipped += len(store.chunk(chunk)) - len(ids)
        batches = work.batches_of(ids)
        for number, at in enumerate(batches):
            first, last = number == 0, number + 1 == len(batches)
            yield Job(ids, at, first, last, skipped if first else 0)
        skipped = 0 if ids else skipped


def ahead(
    loader: ThreadPoolExecutor, jobs: Iterator[Job], load: Callable[[Sequence[int]], PyTree]
) -> Iterator[tuple[Job, PyTree]]:
    """Every job with its batch; the next batch is made meanwhile."""

    def submit(job: Job) -> tuple[Job, Future[PyTree]]:
        return job, loader.submit(load, [job.ids[i] for i in job.at])

    pending = [submit(job) for job in islice(jobs, 1)]
    while pending:
        job, batch = pending.pop()
        pending += [submit(following) for following in islice(jobs, 1)]
        yield job, batch.result()


def deal(
    store: StoredRows, checkpoint: str, shard: tuple[int, int] | None, device: torch.device
) -> list[int]:
    """Numbers of the chunks with something missing that this process makes.

    Within a process group that is there, rank 0 looks what is missing and all deal that out. No
    other processes can agree on one look, so each takes every world_size-th chunk of all.
    """
    rank, world = shard_of(shard)
    if shard is None and _grouped():
        missing = _missing_chunks(store, checkpoint) if rank == 0 else None
        said: list[Any] = [missing]
        dist.broadcast_object_list(
            said, src=0, device=device if dist.get_backend() == "nccl" else None
        )
        shared: list[int] = said[0]
        return shared[rank::world]
    return [number for number in _missing_chunks(store, checkpoint) if number % world == rank]


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def _missing_chunks(store: StoredRows, checkpoint: str) -> list[int]:
    """Numbers of the chunks that have samples without a row, in order."""
    size = store.chunk_rows
    runs = store.missing(checkpoint)
    numbers: list[NDArray[np.int64]] = [
        np.arange(run.start // size, -(-run.stop // size)) for run in runs
    ]
    found: list[int] = np.unique(np.concatenate(numbers)).tolist() if numbers else []
    return found


def shard_of(shard: tuple[int, int] | None) -> tuple[int, int]:
    """`(rank, world_size)`: as given, of the process group, or of torchrun's environment."""
    if shard is None and _grouped():
        return dist.get_rank(), dist.get_world_size()
    if shard is None:
        if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
            raise OptionError(
                "only one of the environment variables RANK and WORLD_SIZE is set; torchrun sets "
                "both. Pass shard=(rank, world_size)."
            )
        if "RANK" not in os.environ:
            return 0, 1
        shard = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rank, world = _pair(shard)
    if not 0 <= rank < world:
        raise OptionError(f"shard={shard} must be (rank, world_size) with 0 <= rank < world_size.")
    return rank, world


def _pair(shard: object) -> tuple[int, int]:
    """`shard`, if it is a pair of integers."""
    match shard:
        case (int() as rank, int() as world):
            return rank, world
    raise OptionError(f"shard={shard!r} must be (rank, world_size), two integers, or None.")


@contextmanager
def progress_bar(total: int, *, shown: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar's way to advance."""
    if not shown:
        yield lambda count: None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, unit="sample", desc="projecting") as bar:
        yield bar.update
