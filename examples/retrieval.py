"""How well scores find the chunks of the query's own domain."""

from __future__ import annotations

from collections.abc import Sequence

import bm25s
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


def recall_at_k(scores: Float[Tensor, " n"], relevant: Bool[Tensor, " n"], k: int) -> float:
    """Share of the relevant samples that are among the k best scores.

    Of equal scores the earlier sample counts as the better one.

    Raises:
        ValueError: no sample is relevant, k is not between 1 and n, or a score is NaN.
    """
    if not relevant.any() or not 1 <= k <= len(scores) or scores.isnan().any():
        raise ValueError(
            f"recall@{k} of {len(scores)} scores, {int(relevant.sum())} of them relevant and "
            f"{int(scores.isnan().sum())} NaN: k must be between 1 and their number, one or more "
            "relevant, none NaN."
        )
    best = scores.argsort(descending=True, stable=True)[:k]
    return float(relevant[best].sum() / relevant.sum())


def chance(n: int, k: int) -> float:
    """What random scores reach on average."""
    return k / n


def bm25(documents: Sequence[str], queries: Sequence[str]) -> Float[Tensor, "n q"]:
    """BM25 of every document for every query: words in common, the rare ones counting more.

    Words are what `bm25s` makes of a text with its default pattern, lower case, without a list of
    stop words (code has its own). A query without any scores zero everywhere.
    """
    index = bm25s.BM25()
    corpus = bm25s.tokenize(list(documents), stopwords=None, show_progress=False)
    index.index(corpus, show_progress=False)
    words = bm25s.tokenize(list(queries), stopwords=None, return_ids=False, show_progress=False)
    none = np.zeros(len(documents), dtype=np.float32)
    rows = [index.get_scores(query) if query else none for query in words]
    return torch.stack([torch.from_numpy(row) for row in rows], dim=1)
