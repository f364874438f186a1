"""What attribution scores are held against: retrained models, one more step, kinds of samples."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr
from torch import Tensor


def rank_correlation(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Spearman's.

    Raises:
        ValueError: one of the two is constant or has a NaN: it has no ranks to compare.
    """
    if not (x.isfinite().all() and y.isfinite().all() and x.std() > 0 and y.std() > 0):
        raise ValueError("rank correlation of values that are constant or not finite")
    return float(spearmanr(x.numpy(), y.numpy()).statistic)


def datamodeling_score(
    scores: Float[Tensor, "n q"], subsets: Bool[Tensor, "s n"], losses: Float[Tensor, "s q"]
) -> float:
    """The linear datamodeling score (LDS), mean over the queries.

        LDS_j = spearman_S( sum_{i in S} score_ij , -loss_j of a model trained on S )

    Args:
        scores: of training sample i for query j; higher is more helpful.
        subsets: which samples a model was trained on.
        losses: of those models, on every query.

    Reference:
        Park et al., "TRAK: Attributing Model Behavior at Scale", ICML 2023.
    """
    predicted = subsets.to(scores.dtype) @ scores
    per_query = [rank_correlation(p, -y) for p, y in zip(predicted.mT, losses.mT, strict=True)]
    return sum(per_query) / len(per_query)


def leave_one_out(
    scores: Float[Tensor, "n q"], left_out: Int[Tensor, " l"], rises: Float[Tensor, "l q"]
) -> float:
    """Rank correlation with leaving one sample out and training again, mean over the queries.

    Args:
        scores: of training sample i for query j.
        left_out: the samples whose effect was measured.
        rises: how much higher each query's loss is without that sample.
    """
    chosen = scores[left_out]
    per_query = [rank_correlation(s, y) for s, y in zip(chosen.mT, rises.mT, strict=True)]
    return sum(per_query) / len(per_query)


def overlap(a: Float[Tensor, "n q"], b: Float[Tensor, "n q"], k: int) -> float:
    """Share of the k best samples of `a` that are among the k best of `b`, mean over queries."""
    ours, theirs = a.topk(k, dim=0).indices, b.topk(k, dim=0).indices
    return float((ours[:, None] == theirs[None]).any(1).float().mean())
