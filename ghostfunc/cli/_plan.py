"""What `ghostfunc score` would take, and which tokens carry a score."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from ghostfunc._base.trees import tensors_of
from ghostfunc._base.types import PyTree
from ghostfunc._transforms.dot_prods import ghost_dot_prod
from ghostfunc._transforms.grads import direction
from ghostfunc.cli._curvature import Batches, chosen, made
from ghostfunc.cli._data import target_batches
from ghostfunc.cli._inputs import Inputs
from ghostfunc.cli._options import Score
from ghostfunc.cli._say import size
from ghostfunc.curvature import EKFAC
from ghostfunc.data._batches import group, width
from ghostfunc.data._chats import pieces_of
from ghostfunc.data._columns import columns_of
from ghostfunc.data._progress import duration, progress_bar
from ghostfunc.data._score import in_parts
from ghostfunc.report import Heat

T = TypeVar("T")


def plan(inputs: Inputs, options: Score) -> str:
    """What would be done. One batch is timed, of middling length."""
    model, pool = inputs.model, inputs.pool
    lengths = [len(x) for x in pool.tokens]
    groups = in_parts(lengths, inputs.token_budget)
    shapes = [(len(at), width(max(lengths[i] for i in at))) for at in groups]
    batch = inputs.batch(groups[len(groups) // 2])
    u = direction(model.model_fn, model.params, target_batches(model, inputs.target))
    quantity = "cosine" if options.score == "cosine" else "dot"

    def one_batch() -> object:
        return columns_of(model.model_fn, model.params, batch, {"": u}, (quantity, "loss"), "error")

    first = _timed(one_batch)[0]  # traces, and proves the shape
    warm = _timed(one_batch)[0]
    tokens = sum(rows * longest for rows, longest in shapes)
    seconds = warm * tokens / batch["input_ids"].numel()
    seconds += max(0.0, first - warm) * len(set(shapes))
    held = _bytes(model.params)
    memory = f"{size(2 * held)} for parameters and direction; then a batch's activations"
    more = {}
    if options.score == "influence":
        taken, more["curvature"], of_curvature = _curvature(inputs, options)
        seconds += taken
        memory = f"{size(of_curvature)} for the curvature; {memory}"
    numbers = sum(p.numel() for p in model.params.values())
    outputs = [str(x) for x in (options.out, options.scores, options.report) if x is not None]
    lines = {
        "model": f"{options.model}: {numbers:,} parameters that count, {size(held)}",
        "pool": f"{len(pool):,} rows, {pool.total:,} tokens",
        "target": f"{len(inputs.target):,} rows, {inputs.target.total:,} tokens",
        **more,
        "batches": f"{len(groups):,} of up to {inputs.token_budget:,} tokens; {len(set(shapes))} "
        "shapes, the first batch of each is proved",
        "memory": memory,
        "time": f"about {duration(seconds)} on this machine",
        "would write": ", ".join(outputs),
    }
    return "\n".join(f"{name:<12} {text}" for name, text in lines.items())


def _curvature(inputs: Inputs, options: Score) -> tuple[float, str, int]:
    """Seconds, words and bytes of a curvature.

    Both passes and the eigenbases are timed on one batch, of middling length, and on the same batch
    twice: the difference is what a batch takes.
    """
    asked = options.curvature
    samples = chosen(asked.curvature_rows, len(inputs.pool))
    batches = Batches(inputs, samples)
    batch = batches[len(batches) // 2]
    made(inputs, [batch], asked)  # the first call traces
    once, curvature = _timed(lambda: made(inputs, [batch], asked))
    twice, _ = _timed(lambda: made(inputs, [batch, batch], asked))
    total = sum(len(inputs.pool.tokens[i]) for i in samples)
    others = max(0.0, total / batch["input_ids"].numel() - 1)
    words = f"EK-FAC of {len(samples):,} rows, {asked.fisher} labels, two passes"
    return once + others * max(0.0, twice - once), words, _held(curvature)


def _held(curvature: EKFAC) -> int:
    """Bytes while eigenvalues are summed: bases and sums in float64, and bases as they are used."""
    numbers = 0
    for block in curvature.blocks:
        sides = block.rows**2 * block.left + block.columns**2 * block.right
        numbers += block.groups * (sides + block.rows * block.columns)
    return 12 * numbers


def _bytes(tree: PyTree) -> int:
    return sum(x.numel() * x.element_size() for x in tensors_of(tree))


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def shares(inputs: Inputs, u: PyTree, rows: Sequence[int], *, shown: bool) -> dict[int, Heat]:
    """Every token's share in the scores of some rows along a direction."""
    model, pool = inputs.model, inputs.pool
    sample_of = {row: i for i, row in enumerate(pool.rows)}
    lengths = [len(pool.tokens[sample_of[row]]) for row in rows]
    found = {}
    with progress_bar(len(rows), "tokens' shares", shown=shown) as bar:
        for at in group(lengths, inputs.token_budget, None):
            longest = max(lengths[i] for i in at)
            bar.begin(f"{len(at)} of up to {longest:,} tokens", (len(at), width(longest)))
            batch = inputs.batch([sample_of[rows[i]] for i in at])
            table = ghost_dot_prod(
                model.model_fn, model.params, batch, direction=u, per_position=True
            )
            for i, share in zip(at, table.tolist(), strict=True):
                pieces = pieces_of(inputs.rows, rows[i], model.tokenizer, model.max_length)
                found[rows[i]] = Heat(pieces, share[: lengths[i]])
            bar.advance(len(at), len(at) * longest)
    return found
