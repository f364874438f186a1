"""Questions to a store: which samples matter for a query.

With the metric `A` (the identity, or a preconditioner's damped inverse) and rows `x_i`, `q_j`:

    normalize="none"       q^T A x
    normalize="cosine"     q^T A x / sqrt(q^T A q  x^T A x)
    normalize="relative"   q^T A x / sqrt(x^T A x)

summed over checkpoints with their weights. Rows are streamed a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import one_of
from ghostfunc.projection import Projection
from ghostfunc.projection._blocks import select

if TYPE_CHECKING:
    from ghostfunc.store._store import Store

Query: TypeAlias = Tensor | dict[str, Tensor]
"""`[q, k]`, or one such per checkpoint."""
Weights: TypeAlias = str | dict[str, float] | None


class TopK(NamedTuple):
    """The best samples of every query, best first.

    Attributes:
        scores: `[q, k]`.
        ids: `[q, k]` sample ids.
    """

    scores: Float[Tensor, "q k"]
    ids: Int[Tensor, "q k"]


@dataclass(frozen=True)
class Preconditioner:
    """`A = (C + lambda I)^-1` per group of columns, `C` the second moment of the stored rows.

    Attributes:
        roots: `L` with `A = L L^T`, by group: `x L` are whitened rows.
    """

    roots: dict[str, Float[Tensor, "k k"]]


def preconditioner(store: Store, checkpoint: str, *, damping: float) -> Preconditioner:
    """The damped inverse second moment of the stored rows, per parameter.

        A_b = (1/N sum_i x_ib x_ib^T + lambda_b I)^-1,   lambda_b = damping * (mean eigenvalue)

    Args:
        store: a complete store.
        checkpoint: whose rows.
        damping: relative to the mean eigenvalue of each block; LoGra uses 0.1.

    References:
        Choe et al., 2024 (LoGra); Park et al., 2023 (TRAK); Grosse et al., "Studying Large Language
        Model Generalization with Influence Functions", 2023.
    """
    if damping <= 0:
        raise OptionError(f"damping={damping} must be positive.")
    groups = store.projection.groups
    moments = {
        name: torch.zeros((c.stop - c.start,) * 2, dtype=torch.float64)
        for name, c in groups.items()
    }
    for _, rows in store.chunks(checkpoint):
        for name, columns in groups.items():
            x = rows[:, columns].double()
            moments[name] += x.mT @ x
    return Preconditioner(
        {name: _root(c / store.n_samples, damping).float() for name, c in moments.items()}
    )


def _root(c: Tensor, damping: float) -> Tensor:
    """`L` with `(C + lambda I)^-1 = L L^T`."""
    scale = c.diagonal().mean()
    if scale == 0:  # a parameter without gradient: any metric gives zero
        return torch.eye(len(c), dtype=c.dtype)
    damped = c + damping * scale * torch.eye(len(c), dtype=c.dtype)
    lower = torch.linalg.cholesky(damped)
    return torch.linalg.solve_triangular(lower, torch.eye(len(c), dtype=c.dtype), upper=False).mT


class RowView:
    """Rows as a query wants them: some columns, in a metric, in one piece or by block."""

    def __init__(
        self,
        projection: Projection,
        layers: Sequence[str] | None,
        metric: Preconditioner | None,
        *,
        per_block: bool,
    ) -> None:
        self._columns = {g: projection.groups[g] for g in select(list(projection.groups), layers)}
        self._roots = None if metric is None else metric.roots
        self._everything = layers is None and not per_block
        self._per_block = per_block

    def plain(self, rows: Tensor) -> list[Tensor]:
        """`x`."""
        if self._everything:
            return [rows]
        return self._pieces({g: rows[:, c] for g, c in self._columns.items()})

    def whitened(self, rows: Tensor) -> list[Tensor]:
        """`x L`, whose ordinary inner products are those of the metric `A = L L^T`."""
        if self._roots is None:
            return self.plain(rows)
        return self._pieces({g: rows[:, c] @ self._roots[g] for g, c in self._columns.items()})

    def applied(self, rows: Tensor) -> list[Tensor]:
        """`x A`."""
        if self._roots is None:
            return self.plain(rows)
        roots = self._roots
        return self._pieces(
            {g: rows[:, c] @ roots[g] @ roots[g].mT for g, c in self._columns.items()}
        )

    def _pieces(self, parts: dict[str, Tensor]) -> list[Tensor]:
        return list(parts.values()) if self._per_block else [torch.cat(list(parts.values()), 1)]


def iter_scores(
    store: Store,
    query: Query,
    *,
    normalize: str,
    layers: Sequence[str] | None,
    precondition: Preconditioner | dict[str, Preconditioner] | None,
    weights: Weights,
    per_block: bool,
) -> Iterator[tuple[range, Tensor]]:
    """`(ids, scores [q, ids])` chunk by chunk; `[q, ids, blocks]` for `per_block`."""
    one_of("normalize", normalize, ("none", "cosine", "relative"))
    queries = _by_checkpoint(store, query)
    scale = _weights(store, list(queries), weights)
    metrics = (
        precondition
        if isinstance(precondition, dict)
        else ({} if precondition is None else dict.fromkeys(queries, precondition))
    )
    if metrics and set(metrics) != set(queries):
        raise OptionError(
            f"precondition is given for checkpoints {sorted(metrics)}, the query for "
            f"{sorted(queries)}."
        )
    views, prepared = {}, {}
    for name, q in queries.items():
        q = q.detach().cpu().float()
        view = RowView(store.projection, layers, metrics.get(name), per_block=per_block)
        # Without norms the metric is applied once, to the query.
        prepared[name] = view.applied(q) if normalize == "none" else view.whitened(q)
        if normalize == "cosine":
            prepared[name] = [unit(part) for part in prepared[name]]
        views[name] = view
    streams = [store.chunks(name) for name in queries]
    for chunks in zip(*streams, strict=True):
        total: list[Tensor] = []
        for (_, rows), name in zip(chunks, queries, strict=True):
            view = views[name]
            samples = view.plain(rows) if normalize == "none" else view.whitened(rows)
            for b, (q, x) in enumerate(zip(prepared[name], samples, strict=True)):
                s = q @ x.mT
                if normalize != "none":
                    s = s / _norms(x).mT
                s = s * scale[name]
                if b < len(total):
                    total[b] = total[b] + s
                else:
                    total.append(s)
        yield chunks[0][0], torch.stack(total, 2) if per_block else total[0]


def _norms(x: Tensor) -> Tensor:
    """`[rows, 1]`; a zero row has similarity 0 with everything, not 0/0."""
    norms = x.norm(dim=1, keepdim=True)
    return norms.masked_fill(norms == 0, 1)


def unit(x: Tensor) -> Tensor:
    """Rows of length 1; zero rows stay zero."""
    return x / _norms(x)


def _by_checkpoint(store: Store, query: Query) -> dict[str, Tensor]:
    names = list(store.checkpoints)
    if not isinstance(query, dict):
        if len(names) != 1:
            raise OptionError(
                f"the store has checkpoints {names or 'none'}: give the query as a dict "
                "{checkpoint: [q, k]}, made at the parameters of each."
            )
        query = {names[0]: query}
    for name, q in query.items():
        if name not in names:
            raise OptionError(f"query: there is no checkpoint {name!r}; the store has {names}.")
        if q.ndim != 2 or q.shape[1] != store.projection.k:
            raise OptionError(
                f"query has shape {tuple(q.shape)}; expected [q, {store.projection.k}], as "
                "ghost_project with store.projection makes it."
            )
    if not query or len({len(q) for q in query.values()}) > 1:
        raise OptionError("query must have the same number of rows for every checkpoint.")
    return query


def _weights(store: Store, names: list[str], weights: Weights) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(names, 1.0)
    if isinstance(weights, dict):
        if set(weights) != set(names):
            raise OptionError(f"weights are for {sorted(weights)}, the query for {sorted(names)}.")
        return weights
    one_of("weights", weights, ("lr",))
    rates = store.checkpoints
    without = [name for name in names if rates[name] is None]
    if without:
        raise OptionError(
            f'weights="lr", but the checkpoints {without} were added without a learning rate. Pass '
            "weights={checkpoint: weight}."
        )
    return {name: float(rates[name] or 0.0) for name in names}


def best(stream: Iterator[tuple[range, Tensor]], k: int) -> TopK:
    """The k best of a stream of scores; what is kept is `[q, k]`."""
    if k < 1:
        raise OptionError(f"k={k} must be at least 1.")
    scores: Tensor | None = None
    ids: Tensor | None = None
    for chunk, s in stream:
        n = torch.arange(chunk.start, chunk.stop).expand(len(s), -1)
        if scores is not None and ids is not None:
            s, n = torch.cat([scores, s], 1), torch.cat([ids, n], 1)
        scores, at = s.topk(min(k, s.shape[1]), dim=1)
        ids = n.gather(1, at)
    # A store has at least one chunk.
    assert scores is not None
    assert ids is not None
    return TopK(scores, ids)
