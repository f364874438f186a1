"""Approximate search: the rows of a store in a FAISS index. Needs `ghostfunc[faiss]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import check_type, check_whole, one_of
from ghostfunc.store._metric import Preconditioner, RowView, unit
from ghostfunc.store._query import check_query
from ghostfunc.store._rows import StoredRows
from ghostfunc.store._topk import TopK, check_k


class SearchIndex:
    """The rows of one checkpoint in memory, ready for approximate search.

    Made by `Store.index`.

    Attributes:
        index: the `faiss.Index`, to set what only it knows (`nprobe`, `efSearch`).
    """

    def __init__(self, index: Any, view: RowView, k: int, *, cosine: bool) -> None:
        self.index = index
        self._view = view
        self._k = k
        self._cosine = cosine

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def topk(self, query: Float[Tensor, "q k_all"], k: int) -> TopK:
        """The k samples with about the highest scores for every query, best first.

        Args:
            query: `[q, k]` projected gradients, as `Store.topk` takes them.
            k: how many.

        Returns:
            `TopK(scores [q, k], ids [q, k])`. An index that finds fewer fills up with ids of -1 and
            scores of -inf.
        """
        check_k(k)
        check_query(query, self._k)
        (rows,) = self._view.whitened(query.detach().cpu().float())
        rows = unit(rows) if self._cosine else rows
        check_query(rows, rows.shape[1], " in float32, and in the metric,")
        scores, ids = self.index.search(rows.contiguous().numpy(), min(k, len(self)))
        found = torch.from_numpy(ids)
        return TopK(torch.from_numpy(scores).masked_fill(found < 0, -torch.inf), found)


def build(
    store: StoredRows,
    checkpoint: str,
    *,
    factory: str,
    normalize: str,
    layers: Sequence[str] | None,
    precondition: Preconditioner | None,
    train_rows: int,
) -> SearchIndex:
    """The index that `Store.index` returns."""
    one_of("normalize", normalize, ("none", "cosine"))
    check_whole("train_rows", train_rows)
    faiss = _faiss()
    if precondition is not None:
        check_type("precondition", precondition, Preconditioner, "store.preconditioner(...)")
        precondition.check(store.projection)
    view = RowView(store.projection, layers, precondition, per_block=False)

    def prepared(rows: Tensor) -> Any:
        (x,) = view.whitened(rows)
        return (unit(x) if normalize == "cosine" else x).contiguous().numpy()

    size = prepared(torch.zeros(1, store.projection.k, dtype=torch.float32, device="cpu")).shape[1]
    try:
        index = faiss.index_factory(size, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise OptionError(
            f"factory={factory!r} is not a FAISS index of {size} numbers a row: "
            f"{str(error).splitlines()[-1].strip()}. Use 'Flat' (exact), 'HNSW32,Flat' or "
            "'IVF256,SQ8', say."
        ) from error
    store.need(checkpoint, None)
    if not index.is_trained:
        index.train(prepared(_spread(store, checkpoint, train_rows)))
    for _, rows in store.chunks(checkpoint):
        index.add(prepared(rows))
    return SearchIndex(index, view, store.projection.k, cosine=normalize == "cosine")


def _spread(store: StoredRows, checkpoint: str, most: int) -> Tensor:
    """At most `most` rows (a chunk more at the worst), from chunks all over the store."""
    wanted = max(1, min(store.n_chunks, most // store.chunk_rows))
    step = store.n_chunks / wanted
    return torch.cat([store.read(store.chunk(int(i * step)), checkpoint) for i in range(wanted)])


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "Store.index needs FAISS: pip install 'ghostfunc[faiss]'. Store.topk is exact and "
            "needs nothing."
        ) from error
    return faiss
