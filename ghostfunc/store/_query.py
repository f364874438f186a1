"""Questions to a store: which samples matter for a query.

With the metric `A` (the identity, or a preconditioner's damped inverse) and rows `x_i`, `q_j`:

    normalize="none"       q^T A x
    normalize="cosine"     q^T A x / sqrt(q^T A q  x^T A x)
    normalize="relative"   q^T A x / sqrt(x^T A x)

summed over checkpoints with their weights. Rows are streamed a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import check_flags, check_number, check_type, one_of
from ghostfunc._factors.matmul import inner_products
from ghostfunc.store._errors import StoreError
from ghostfunc.store._metric import Preconditioner, RowView, measured, unit
from ghostfunc.store._rows import StoredRows

Query: TypeAlias = Tensor | dict[str, Tensor]
"""`[q, k]`, or one such per checkpoint."""
Weights: TypeAlias = str | dict[str, float] | None


class Plan(NamedTuple):
    """A query that has been looked at: all it needs is there.

    Attributes:
        chunks: numbers of the chunks to read, in order; None for all.
        queries: by checkpoint, in pieces that meet those of the rows.
        views: by checkpoint.
        scale: weights by checkpoint.
        normalize, per_block: as in `Store.scores`.
    """

    chunks: Sequence[int] | None
    queries: dict[str, list[Tensor]]
    views: dict[str, RowView]
    scale: dict[str, float]
    normalize: str
    per_block: bool


def plan(
    store: StoredRows,
    query: Query,
    *,
    normalize: str,
    layers: Sequence[str] | None,
    precondition: Preconditioner | dict[str, Preconditioner] | None,
    weights: Weights,
    per_block: bool = False,
    chunks: Sequence[int] | None = None,
) -> Plan:
    """A query ready to be run.

    Whatever is wrong with the query or the store is raised here, before a row is read.
    """
    one_of("normalize", normalize, ("none", "cosine", "relative"))
    check_flags(per_block=per_block)
    given = _by_checkpoint(store, query)
    scale = _weights(store, list(given), weights)
    metrics = (
        precondition
        if isinstance(precondition, dict)
        else ({} if precondition is None else dict.fromkeys(given, precondition))
    )
    for metric in metrics.values():
        check_type("precondition", metric, Preconditioner, "what store.preconditioner(...) returns")
        metric.check(store.projection)
    if metrics and set(metrics) != set(given):
        raise OptionError(
            f"precondition is given for checkpoints {sorted(metrics)}, the query for "
            f"{sorted(given)}."
        )
    queries, views = {}, {}
    for name, q in given.items():
        q = q.detach().cpu().float()
        view = RowView(store.projection, layers, metrics.get(name), per_block=per_block)
        # Without norms the metric is applied once, to the query.
        queries[name] = view.applied(q) if normalize == "none" else view.whitened(q)
        if normalize == "cosine":
            queries[name] = [unit(part) for part in queries[name]]
        if not all(bool(part.isfinite().all()) for part in queries[name]):
            raise OptionError(
                f"query for checkpoint {name!r} holds numbers that are too large for float32, of "
                f"up to {float(given[name].abs().max()):.3g}. Divide it by its length."
            )
        views[name] = view
    for name in given:
        store.need(name, chunks)
    return Plan(chunks, queries, views, scale, normalize, per_block)


def iter_scores(store: StoredRows, plan: Plan) -> Iterator[tuple[range, Tensor]]:
    """`(ids, scores [q, ids])` chunk by chunk; `[q, ids, blocks]` for `per_block`."""
    plain = plan.normalize == "none"
    streams = [store.chunks(name, plan.chunks) for name in plan.queries]
    for chunks in zip(*streams, strict=True):
        total: list[Tensor] = []
        for (_, rows), name in zip(chunks, plan.queries, strict=True):
            view = plan.views[name]
            samples = view.plain(rows) if plain else view.whitened(rows)
            for b, (q, x) in enumerate(zip(plan.queries[name], samples, strict=True)):
                if plain:
                    s = inner_products(q, x)
                else:
                    x, lengths = measured(x)
                    s = inner_products(q, x) / lengths.mT
                s = s * plan.scale[name]
                if b < len(total):
                    total[b] = total[b] + s
                else:
                    total.append(s)
        scores = torch.stack(total, 2) if plan.per_block else total[0]
        _refuse_overflow(scores, chunks[0][0])
        yield chunks[0][0], scores


def _refuse_overflow(scores: Tensor, ids: range) -> None:
    """Raise `StoreError` for scores that float32 does not hold."""
    # A sum is finite only if all are, and is less work.
    if bool(scores.sum().isfinite()) or bool(scores.isfinite().all()):
        return
    bad = (~scores.isfinite()).transpose(0, 1).flatten(1).any(1)
    raise StoreError(
        f"the score of sample {ids[int(bad.nonzero()[0])]} is too large for float32: rows and "
        'query are. Divide the query by its length, or use normalize="cosine".'
    )


def all_scores(store: StoredRows, plan: Plan) -> Tensor:
    """`[q, N]` or `[q, N, blocks]`: the scores of all chunks, in memory taken once."""
    out: Tensor | None = None
    for ids, scores in iter_scores(store, plan):
        if out is None:
            out = scores.new_empty(len(scores), store.n_samples, *scores.shape[2:])
        out[:, ids.start : ids.stop] = scores
    # A store has at least one chunk.
    assert out is not None
    return out


def check_query(q: object, k: int, where: str = "") -> None:
    """Raise `OptionError` unless it is `[q, k]`, finite floating-point numbers."""
    if not isinstance(q, Tensor):
        raise OptionError(f"query{where} is a {type(q).__name__}; expected a tensor [q, k].")
    if not q.is_floating_point():
        raise OptionError(f"query{where} is of {q.dtype}; expected floating-point numbers.")
    if q.ndim != 2 or q.shape[1] != k:
        raise OptionError(
            f"query{where} has shape {tuple(q.shape)}; expected [q, {k}], as ghost_project with "
            "store.projection makes it."
        )
    if not bool(torch.isfinite(q).all()):
        raise OptionError(f"query{where} holds numbers that are not finite.")


def _by_checkpoint(store: StoredRows, query: Query) -> dict[str, Tensor]:
    names = store.checkpoint_names
    if not isinstance(query, dict):
        store.check_whole()
        if len(names) != 1:
            raise OptionError(
                f"the store has checkpoints {names or 'none'}: give the query as a dict "
                "{checkpoint: [q, k]}, made at the parameters of each."
            )
        query = {names[0]: query}
    for name, q in query.items():
        if name not in names:
            raise OptionError(f"query: there is no checkpoint {name!r}; the store has {names}.")
        check_query(q, store.projection.k, f" for checkpoint {name!r}")
    if not query or len({len(q) for q in query.values()}) > 1:
        raise OptionError("query must have the same number of rows for every checkpoint.")
    return query


def _weights(store: StoredRows, names: list[str], weights: Weights) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(names, 1.0)
    if isinstance(weights, dict):
        if set(weights) != set(names):
            raise OptionError(f"weights are for {sorted(weights)}, the query for {sorted(names)}.")
        return {name: check_number(f"weights[{name!r}]", w) for name, w in weights.items()}
    one_of("weights", weights, ("lr",))
    rates = {name: store.learning_rate(name) for name in names}
    without = [name for name in names if rates[name] is None]
    if without:
        raise OptionError(
            f'weights="lr", but the checkpoints {without} were added without a learning rate. Pass '
            "weights={checkpoint: weight}."
        )
    return {name: float(rates[name] or 0.0) for name in names}
