"""The questions that a store answers: which samples matter for a query."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxtyping import Float
from torch import Tensor

from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import check_whole
from ghostfunc.store import _faiss, _metric, _query, _topk
from ghostfunc.store._faiss import SearchIndex
from ghostfunc.store._metric import Preconditioner
from ghostfunc.store._query import Query, Weights
from ghostfunc.store._rows import StoredRows
from ghostfunc.store._topk import TopK


class Questions(StoredRows):
    """Stored rows, compared with those of queries."""

    def scores(
        self,
        query: Query,
        *,
        normalize: str = "none",
        layers: Sequence[str] | None = None,
        precondition: Preconditioner | dict[str, Preconditioner] | None = None,
        weights: Weights = None,
        per_block: bool = False,
    ) -> Float[Tensor, "q N ..."]:
        """How much every stored sample matters for every query.

            scores[j, i] = sum_c w_c q_cj^T A_c x_ci

        Args:
            query: `[q, k]` projected gradients of the queries (`ghost_project` with
                `store.projection`), or one such per checkpoint.
            normalize: "none", "cosine" (the formula divided by the norms of both), or "relative"
                (by that of the stored row alone: what is large everywhere counts less); norms are
                those of the metric, per checkpoint.
            layers: glob patterns of the parameters to count; None for all.
            precondition: the metric `A`, from `store.preconditioner`; None for the identity.
            weights: of the checkpoints: None for 1, "lr" for their learning rates (TracIn), or
                a dict.
            per_block: keep the parameters apart, each compared by itself: `[q, N, blocks]`.

        Returns:
            `[q, N]`, float32. The rows are streamed; only the scores are held. For a corpus whose
            scores are too many, see `topk`.

        Raises:
            OptionError: a query that does not fit. IncompleteStoreError, DamagedRowsError: rows are
            missing or damaged.

        References:
            Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent"
            (TracIn), 2020. Barshan et al., "RelatIF", 2020. Xia et al., "LESS", 2024.
        """
        plan = _query.plan(
            self,
            query,
            normalize=normalize,
            layers=layers,
            precondition=precondition,
            weights=weights,
            per_block=per_block,
        )
        return _query.all_scores(self, plan)

    def topk(
        self,
        query: Query,
        k: int,
        *,
        normalize: str = "none",
        layers: Sequence[str] | None = None,
        precondition: Preconditioner | dict[str, Preconditioner] | None = None,
        weights: Weights = None,
        chunks: Iterable[int] | None = None,
    ) -> TopK:
        """The k samples with the highest scores for every query, best first.

        Other arguments and errors are those of `scores`; memory is that of one chunk, whatever the
        size of the store.

        Args:
            chunks: numbers of the chunks to look at, None for all. Several processes share a query:
                each looks at `range(rank, store.n_chunks, world_size)`, and `merge_topk` makes one
                answer of theirs.

        Returns:
            `TopK(scores [q, k], ids [q, k])`.
        """
        _topk.check_k(k)
        plan = _query.plan(
            self,
            query,
            normalize=normalize,
            layers=layers,
            precondition=precondition,
            weights=weights,
            chunks=None if chunks is None else _numbers(chunks),
        )
        queries = len(next(iter(plan.queries.values()))[0])
        return _topk.best(_query.iter_scores(self, plan), k, queries=queries)

    def preconditioner(self, checkpoint: str, *, damping: float) -> Preconditioner:
        """The damped inverse second moment of a checkpoint's rows, per parameter.

            A_b = (1/N sum_i x_ib x_ib^T + lambda_b I)^-1,  lambda_b = damping * mean eigenvalue

        Args:
            checkpoint: its name.
            damping: relative to the mean eigenvalue of each block (LoGra: 0.1).

        Raises:
            OptionError: a damping that is not positive, or has no digits beside the moments.
        """
        return _metric.preconditioner(self, checkpoint, damping=damping)

    def index(
        self,
        checkpoint: str,
        *,
        factory: str,
        normalize: str = "cosine",
        layers: Sequence[str] | None = None,
        precondition: Preconditioner | None = None,
        train_rows: int = 100_000,
    ) -> SearchIndex:
        """An index for approximate search over one checkpoint (needs `ghostfunc[faiss]`).

        It holds the rows in memory in whatever form `factory` says. Ask `topk` as well for a few
        queries to see what the index misses.

        Args:
            checkpoint: its name.
            factory: as in `faiss.index_factory`: "Flat" (exact), "HNSW32,Flat", "IVF256,SQ8", ...
            normalize: "cosine" or "none", as in `scores`.
            layers, precondition: as in `scores`.
            train_rows: how many rows the index may train on.

        Returns:
            A `SearchIndex` with `.topk(query, k)`, and `.index`, the `faiss.Index`.

        Raises:
            ImportError: FAISS is not installed. OptionError: an unknown factory or option.
        """
        return _faiss.build(
            self,
            checkpoint,
            factory=factory,
            normalize=normalize,
            layers=layers,
            precondition=precondition,
            train_rows=train_rows,
        )


def _numbers(chunks: object) -> list[int]:
    """Numbers of chunks, in order."""
    if not isinstance(chunks, Iterable) or isinstance(chunks, (str, bytes)):
        raise OptionError(f"chunks is a {type(chunks).__name__}; expected numbers of chunks.")
    return sorted({check_whole("a member of chunks", c, 0) for c in chunks})
