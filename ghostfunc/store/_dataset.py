"""From a dataset to a store: every sample's projected gradient, resumable."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, Protocol

import optree
import torch
from torch import Tensor

from ghostfunc._base.errors import OptionError
from ghostfunc._base.trees import flatten_params
from ghostfunc._base.types import ModelFn, PyTree, Randomness
from ghostfunc._transforms.grads import per_sample_grads
from ghostfunc.projection import Projection, ghost_project
from ghostfunc.store._store import Store


class Dataset(Protocol):
    """A map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def project_dataset(
    model_fn: ModelFn,
    params: PyTree,
    dataset: Dataset,
    projection: Projection,
    store: Store,
    *,
    checkpoint: str,
    collate: Callable[[list[Any]], PyTree],
    batch_size: int,
    length: Callable[[Any], int] | None = None,
    transform: Callable[[PyTree], PyTree] | None = None,
    shard: tuple[int, int] | None = None,
    randomness: Randomness = "error",
    progress: bool = True,
) -> int:
    """Project the gradients of every sample that the store has no row of.

        store[i] = projection(d losses[i] / d params)

    Stop it at any moment and call it again: work is done chunk by chunk of the store, and a chunk
    is written as a whole. What is computed depends on the chunk alone, so a resumed run writes what
    an uninterrupted one would have, bit for bit.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses [n]`.
        params: those of the checkpoint; others are refused.
        dataset: map-style; sample ids are its indices.
        projection: the store's.
        store: open and writable, with `checkpoint` added.
        checkpoint: its name in the store.
        collate: makes a batch, a pytree of tensors `[n, ...]`, of a list of samples.
        batch_size: samples per backward pass.
        length: of a sample; samples of like length (in one chunk) then share a batch, so that
            little is padded.
        transform: of per-sample gradients, before the projection: for what is not linear, such as
            `adam_scaled`. Per-sample gradients are then formed, `batch_size` models large.
        shard: `(rank, world_size)`: this process makes every world_size-th chunk. By default that
            of torchrun (`RANK` and `WORLD_SIZE`), else `(0, 1)`.
        randomness: "error" or "different".
        progress: show a progress bar, on rank 0 (needs tqdm).

    Returns:
        The number of rows that were written.

    Raises:
        IncompatibleStoreError: another projection or model than the store's.
        OptionError: a dataset of another size, or a bad option.
    """
    store.check_projection(projection)
    store.check_model(checkpoint, params)
    if len(dataset) != store.n_samples:
        raise OptionError(
            f"the dataset has {len(dataset)} samples, the store room for {store.n_samples}. "
            "store.append(count) makes room for more."
        )
    if batch_size < 1:
        raise OptionError(f"batch_size={batch_size} must be at least 1.")
    rank, world = _shard(shard)
    device = flatten_params(params)[0][0].device

    def rows_of(batch: PyTree) -> Tensor:
        if transform is None:
            return ghost_project(model_fn, params, batch, projection, randomness=randomness)
        grads = per_sample_grads(model_fn, params, batch, mode="ghost", randomness=randomness)
        return projection.apply(transform(grads))

    def load(ids: Sequence[int]) -> PyTree:
        batch = collate([dataset[i] for i in ids])
        return optree.tree_map(lambda x: x.to(device), batch)

    own = range(rank, store.n_chunks, world)
    jobs = _jobs(store, checkpoint, own, dataset, length, batch_size)
    bar = _bar(sum(len(store.chunk(c)) for c in own), shown=progress and rank == 0)
    written = 0
    with ThreadPoolExecutor(1) as loader, ThreadPoolExecutor(1) as writer, bar as advance:
        writing: Future[None] | None = None
        for job, batch in _ahead(loader, jobs, load):
            if job.first:
                rows = torch.empty(len(job.ids), projection.k)
                advance(job.skipped)
            rows[job.at] = rows_of(batch).detach().float().cpu()
            advance(len(job.at))
            if job.last:
                if writing is not None:
                    writing.result()
                writing = writer.submit(store.write, job.ids, rows, checkpoint)
                written += len(job.ids)
        if writing is not None:
            writing.result()
    return written


class _Job(NamedTuple):
    """One batch of a chunk: samples `ids[at]` of the chunk's missing samples `ids`."""

    ids: list[int]
    at: list[int]
    first: bool
    last: bool
    skipped: int


def _jobs(
    store: Store,
    checkpoint: str,
    chunks: Sequence[int],
    dataset: Dataset,
    length: Callable[[Any], int] | None,
    batch_size: int,
) -> Iterator[_Job]:
    skipped = 0
    for chunk in chunks:
        ids = store.missing(checkpoint, [chunk]).tolist()
        skipped += len(store.chunk(chunk)) - len(ids)
        order = list(range(len(ids)))
        if length is not None:
            lengths = [length(dataset[i]) for i in ids]
            order.sort(key=lengths.__getitem__)  # stable: the same order every time
        for start in range(0, len(ids), batch_size):
            at = order[start : start + batch_size]
            first, last = start == 0, start + batch_size >= len(ids)
            yield _Job(ids, at, first, last, skipped if first else 0)
        skipped = 0 if ids else skipped


def _ahead(
    loader: ThreadPoolExecutor, jobs: Iterator[_Job], load: Callable[[Sequence[int]], PyTree]
) -> Iterator[tuple[_Job, PyTree]]:
    """Every job with its batch; the next batch is made meanwhile."""

    def submit(job: _Job) -> tuple[_Job, Future[PyTree]]:
        return job, loader.submit(load, [job.ids[i] for i in job.at])

    pending = [submit(job) for job in islice(jobs, 1)]
    while pending:
        job, batch = pending.pop()
        pending += [submit(following) for following in islice(jobs, 1)]
        yield job, batch.result()


def _shard(shard: tuple[int, int] | None) -> tuple[int, int]:
    if shard is None:
        if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
            raise OptionError(
                "only one of the environment variables RANK and WORLD_SIZE is set; torchrun sets "
                "both. Pass shard=(rank, world_size)."
            )
        if "RANK" not in os.environ:
            return 0, 1
        shard = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rank, world = shard
    if not 0 <= rank < world:
        raise OptionError(f"shard={shard} must be (rank, world_size) with 0 <= rank < world_size.")
    return rank, world


@contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar's way to advance."""
    if not shown:
        yield lambda count: None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, unit="sample", desc="projecting") as bar:
        yield bar.update
