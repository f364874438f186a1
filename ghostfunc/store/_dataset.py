"""From a dataset to a store: every sample's projected gradient, resumable."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import (
    check_callable,
    check_dataset,
    check_flags,
    check_model_fn,
    check_positive,
    check_type,
    check_whole,
    one_of,
)
from ghostfunc._base.processes.pieces import refuse_pieces
from ghostfunc._base.types import ModelFn, PyTree, Randomness
from ghostfunc.projection import Projection
from ghostfunc.store._again import Comparison
from ghostfunc.store._jobs import ahead, deal, jobs_of, progress_bar, shard_of
from ghostfunc.store._store import Store
from ghostfunc.store._work import Dataset, Work


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
    tolerance: float | None = None,
) -> int:
    """Project the gradients of every sample that the store has no row of.

        store[i] = projection(d losses[i] / d params)

    Stop it at any moment and call it again: work is done chunk by chunk of the store, and a chunk
    is written as a whole. What is computed depends on the chunk alone, so a resumed run writes what
    an uninterrupted one would have, bit for bit.

    Rows of different recipes are not mixed. The first call writes down what the rows are made with;
    a later one is refused if its frozen tensors, `transform` or `randomness` are others. Every call
    computes one finished batch of rows again and compares, which finds another loss and another
    order of samples (not with `randomness="different"`, where rows do not come twice).

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
        shard: `(rank, world_size)`: this process makes every world_size-th chunk. By default rank 0
            of the process group deals out what is missing; without a group, this process makes all.
        randomness: "error" or "different".
        progress: show a progress bar, on rank 0 (needs tqdm).
        tolerance: by how much of its norm a row may differ when it is computed again. By default
            0.005, or 16 units in the last place of the least precise dtype of parameters and store;
            `math.inf` accepts all.

    Returns:
        The number of rows that were written.

    Raises:
        IncompatibleStoreError: another projection, model or recipe than the store's.
        OptionError: a dataset of another size, a bad option, or one of torchrun's processes that
            has neither a process group nor a shard.
        BatchError: `collate` returned another number of samples than it was given.
    """
    check_model_fn(model_fn)
    check_dataset(dataset)
    check_type("store", store, Store, "what gf.store.Store.create or open returns")
    check_callable("collate", collate, "from a list of samples to a batch")
    for name, function in (("length", length), ("transform", transform)):
        if function is not None:
            check_callable(name, function, "or None")
    one_of("randomness", randomness, ("error", "different"))
    check_flags(progress=progress)
    check_whole("batch_size", batch_size)
    if tolerance is not None:
        check_positive("tolerance", tolerance, infinite=True)
    refuse_pieces(model_fn, "gf.store.project_dataset")
    store.check_projection(projection)
    store.check_model(checkpoint, params)
    if len(dataset) != store.n_samples:
        raise OptionError(
            f"the dataset has {len(dataset)} samples, the store room for {store.n_samples}. "
            "store.append(count) makes room for more."
        )
    work = Work(
        model_fn=model_fn,
        params=params,
        dataset=dataset,
        projection=projection,
        collate=collate,
        batch_size=batch_size,
        length=length,
        transform=transform,
        randomness=randomness,
    )
    ranks = shard_of(shard)
    own = deal(store, checkpoint, shard, work.device)
    comparison = Comparison(store, checkpoint, work, ranks, tolerance)
    bar = progress_bar(sum(len(store.chunk(c)) for c in own), shown=progress and ranks[0] == 0)
    with bar as advance:
        return _fill(comparison, own, advance)


def _fill(comparison: Comparison, own: list[int], advance: Callable[[int], object]) -> int:
    """Make the missing rows of the chunks `own`; returns how many."""
    store, checkpoint, work = comparison.store, comparison.checkpoint, comparison.work
    recipe = work.recipe()
    written = 0
    with ThreadPoolExecutor(1) as loader, ThreadPoolExecutor(1) as writer:

        def load(ids: list[int]) -> PyTree:
            return loader.submit(work.load, ids).result()

        # A recipe without rows binds nobody: that of a run which was stopped at once, say.
        begun = len(store.finished(checkpoint)) > 0
        known = store.check_recipe(checkpoint, recipe) if begun else None
        compared = comparison.run(load, known)
        if own and known is None:
            store.put_recipe(checkpoint, recipe)
        writing: Future[None] | None = None
        for job, batch in ahead(loader, jobs_of(store, checkpoint, own, work), work.load):
            if job.first:
                rows = torch.empty(
                    len(job.ids), work.projection.k, dtype=torch.float32, device="cpu"
                )
                advance(job.skipped)
            rows[job.at] = work.rows_of(batch)
            advance(len(job.at))
            if not job.last:
                continue
            if writing is None:
                # Others may have begun at the same time.
                known = store.check_recipe(checkpoint, recipe)
                compared = compared or comparison.run(load, known)
            else:
                writing.result()
            writing = writer.submit(store.write, job.ids, rows, checkpoint)
            written += len(job.ids)
        if writing is not None:
            writing.result()
    return written
