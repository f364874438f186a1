"""Scores or indices to weights, for `FactoredGrads.weighted_sum` or a weighted loss."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ghostfunc._errors import OptionError
from ghostfunc.select._check import check_count, check_positive, check_scores


def softmax_weights(
    scores: Float[Tensor, " n"], *, temperature: float = 1.0
) -> Float[Tensor, " n"]:
    """Weights that sum to 1 and grow with the score.

        w_i = exp(scores_i / temperature) / sum_j exp(scores_j / temperature)

    Args:
        scores: `[n]`, finite.
        temperature: towards 0 the best sample takes all, towards infinity all weigh the same.

    Returns:
        `[n]`. Dot products change by orders of magnitude during training; cosines
        (`gf.ghost_cosine`) keep one temperature meaningful.

    Raises:
        OptionError: `scores` or `temperature` are not that.
    """
    check_scores("scores", scores)
    check_positive("temperature", temperature)
    return torch.softmax(scores / temperature, 0)


def uniform_weights(chosen: Int[Tensor, " k"], n: int) -> Float[Tensor, " n"]:
    """`1 / k` for the chosen samples and 0 for the others: the mean over the chosen.

    Args:
        chosen: indices `[k]`, no two the same.
        n: number of samples.

    Returns:
        `[n]`.

    Raises:
        OptionError: an index is repeated or there is no such sample.
    """
    check_count(len(chosen), n)
    weights = torch.zeros(n, device=chosen.device)
    if int(chosen.min()) < 0 or int(chosen.max()) >= n:
        raise OptionError(f"chosen must be indices of {n} samples; got {chosen.tolist()}.")
    weights[chosen] = 1 / len(chosen)
    if int((weights > 0).sum()) != len(chosen):
        raise OptionError(f"chosen holds a sample twice: {chosen.tolist()}.")
    return weights
