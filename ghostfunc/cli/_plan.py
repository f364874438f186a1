"""What `ghostfunc score` reads first, what it would take, and which tokens carry a score."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ghostfunc._base.types import PyTree
from ghostfunc._transforms.dot_prods import ghost_dot_prod
from ghostfunc._transforms.grads import direction
from ghostfunc.cli._data import target_batches
from ghostfunc.cli._model import Loaded
from ghostfunc.cli._options import Score
from ghostfunc.cli._say import duration, size
from ghostfunc.data import Encoded, Rows
from ghostfunc.data._batches import group
from ghostfunc.data._chats import pieces_of
from ghostfunc.data._columns import columns_of
from ghostfunc.report import Heat


@dataclass(frozen=True)
class Inputs:
    """What was read before anything is computed."""

    model: Loaded
    rows: Rows
    pool: Encoded
    target: Encoded
    token_budget: int

    def batch(self, samples: Sequence[int]) -> PyTree:
        """A batch of the pool, on the model's device."""
        device = next(iter(self.model.params.values())).device
        batch = self.model.collate([self.pool[i] for i in samples])
        return {name: x.to(device) for name, x in batch.items()}


def plan(inputs: Inputs, options: Score) -> str:
    """What would be done. One batch is timed, of middling length."""
    model, pool = inputs.model, inputs.pool
    groups = group([len(x) for x in pool.tokens], inputs.token_budget, None)
    batch = inputs.batch(groups[len(groups) // 2])
    u = direction(model.model_fn, model.params, target_batches(model, inputs.target))

    def one_batch() -> float:
        start = time.perf_counter()
        columns_of(model.model_fn, model.params, batch, {"": u}, (options.score, "loss"), "error")
        return time.perf_counter() - start

    one_batch()  # the first call traces
    seconds = one_batch() / batch["input_ids"].numel() * pool.total
    numbers = sum(p.numel() for p in model.params.values())
    held = sum(p.numel() * p.element_size() for p in model.params.values())
    outputs = [str(x) for x in (options.out, options.scores, options.report) if x is not None]
    lines = {
        "model": f"{options.model}: {numbers:,} parameters that count, {size(held)}",
        "pool": f"{len(pool):,} rows, {pool.total:,} tokens",
        "target": f"{len(inputs.target):,} rows, {inputs.target.total:,} tokens",
        "batches": f"up to {inputs.token_budget:,} tokens",
        "memory": f"{size(2 * held)} for parameters and direction; then a batch's activations",
        "time": f"about {duration(seconds)} on this machine",
        "would write": ", ".join(outputs),
    }
    return "\n".join(f"{name:<12} {text}" for name, text in lines.items())


def shares(inputs: Inputs, rows: Sequence[int]) -> dict[int, Heat]:
    """Every token's share in the scores of some rows."""
    model = inputs.model
    u = direction(model.model_fn, model.params, target_batches(model, inputs.target))
    sample_of = {row: i for i, row in enumerate(inputs.pool.rows)}
    found = {}
    for row in rows:
        batch = inputs.batch([sample_of[row]])
        (share,) = ghost_dot_prod(
            model.model_fn, model.params, batch, direction=u, per_position=True
        ).tolist()
        pieces = pieces_of(inputs.rows, row, model.tokenizer, model.max_length)
        found[row] = Heat(pieces, share)
    return found
