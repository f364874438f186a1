"""The best samples of every query, over a stream of chunks and over several processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import check_type


class TopK(NamedTuple):
    """The best samples of every query, best first; equal scores in order of ids.

    Attributes:
        scores: `[q, k]`.
        ids: `[q, k]` sample ids.
    """

    scores: Float[Tensor, "q k"]
    ids: Int[Tensor, "q k"]


def best(stream: Iterator[tuple[range, Tensor]], k: int, *, queries: int) -> TopK:
    """The k best of a stream of scores, in order of ids; what is kept is `[q, k]`."""
    kept = TopK(
        torch.empty(queries, 0, device="cpu"),
        torch.empty(queries, 0, dtype=torch.int64, device="cpu"),
    )
    for chunk, s in stream:
        ids = torch.arange(chunk.start, chunk.stop, device="cpu").expand(len(s), -1)
        kept = _head(torch.cat([kept.scores, s], 1), torch.cat([kept.ids, ids], 1), k)
    return kept


def merge_topk(parts: Sequence[TopK], k: int) -> TopK:
    """The k best of several answers to one query, each over other chunks of a store.

        merge_topk([store.topk(q, k, chunks=range(r, store.n_chunks, 4)) for r in range(4)], k)

    is `store.topk(q, k)`, bit for bit; each part may come from a process of its own.

    Args:
        parts: `TopK(scores [q, k_p], ids [q, k_p])` of the parts; no sample in two of them.
        k: how many.

    Returns:
        `TopK(scores [q, k], ids [q, k])`, fewer columns if there are not as many samples.

    Raises:
        OptionError: no parts, parts of other queries, or a sample that is in two of them.
    """
    check_k(k)
    check_type("parts", parts, (list, tuple), "a list of answers, as Store.topk returns")
    for part in parts:
        check_type("a member of parts", part, TopK, "what Store.topk returns")
    if not parts or len({len(part.scores) for part in parts}) > 1:
        sizes = [tuple(part.scores.shape) for part in parts]
        raise OptionError(f"parts must be answers to one query, at least one; got sizes {sizes}.")
    scores, ids = torch.cat([p.scores for p in parts], 1), torch.cat([p.ids for p in parts], 1)
    ids, order = ids.sort(dim=1)
    if bool((ids[:, 1:] == ids[:, :-1]).any()):
        raise OptionError("parts hold a sample twice: give each of them other chunks.")
    return _head(scores.gather(1, order), ids, k)


def check_k(k: object) -> None:
    """Raise `OptionError` for what is no number of samples."""
    if isinstance(k, bool) or not isinstance(k, Integral) or int(k) < 1:
        raise OptionError(f"k={k!r} must be a whole number of at least 1.")


def _head(scores: Tensor, ids: Tensor, k: int) -> TopK:
    """The k best of candidates `[q, c]`, in order of ids or best first: by score, then by id."""
    k = min(k, scores.shape[1])
    top, at = scores.topk(k, dim=1)
    last = top[:, -1:]
    if bool(((scores == last).sum(1) > (top == last).sum(1)).any()):
        # Which of several equal ones `topk` takes is not defined.
        order = _by_score_then_id(scores, ids)[:, :k]
    else:
        order = at.gather(1, _by_score_then_id(top, ids.gather(1, at)))
    return TopK(scores.gather(1, order), ids.gather(1, order))


def _by_score_then_id(scores: Tensor, ids: Tensor) -> Tensor:
    by_id = ids.argsort(dim=1)
    by_score = scores.gather(1, by_id).argsort(dim=1, descending=True, stable=True)
    return by_id.gather(1, by_score)
