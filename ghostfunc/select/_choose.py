"""Scores to indices."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from ghostfunc._errors import OptionError
from ghostfunc.select._check import check_count, check_positive, check_scores


def top_k(scores: Float[Tensor, " n"], k: int) -> Int[Tensor, " k"]:
    """The k samples with the highest scores, best first; of equals the earlier one.

    Args:
        scores: `[n]`, finite.
        k: between 1 and n.

    Returns:
        Indices `[k]`.

    Raises:
        OptionError: `scores` or `k` are not that.
    """
    check_count(k, check_scores("scores", scores))
    return torch.argsort(scores, descending=True, stable=True)[:k]


def greats(
    dot_prods: Float[Tensor, " n"],
    gram: Float[Tensor, "n n"],
    k: int,
    *,
    step: float,
) -> Int[Tensor, " k"]:
    """Greedy choice of samples that lower the validation loss together (GREATS).

        next i = argmax_{i not in S} <g_i, u> - step * sum_{j in S} <g_i, g_j>,   S = those chosen

    Stepping along `-step * sum_{j in S} g_j` changes the validation gradient by about
    `-step * H sum_j g_j`; with the Hessian H replaced by the identity that is what the sum above
    takes off. A sample that repeats chosen ones loses its score, so the choice is diverse. With
    `step -> 0` this is `top_k(dot_prods, k)`.

    Args:
        dot_prods: `<g_i, u>`, `[n]`, u the validation gradient.
        gram: `<g_i, g_j>`, `[n, n]`.
        k: between 1 and n.
        step: the factor of each chosen gradient in the update: the learning rate divided by k, if
            the update takes their mean.

    Returns:
        Indices `[k]`, in the order of choice.

    Raises:
        OptionError: a shape, `k` or `step` is not that.

    Reference:
        Wang et al., "GREATS: Online Selection of High-Quality Data for LLM Training in Every
        Iteration", NeurIPS 2024.
    """
    n = check_scores("dot_prods", dot_prods)
    check_count(k, n)
    check_positive("step", step)
    if gram.shape != (n, n) or not bool(gram.isfinite().all()):
        raise OptionError(
            f"gram must be a finite tensor of shape [{n}, {n}]; its shape is {tuple(gram.shape)}."
        )
    scores = dot_prods.clone()
    chosen = []
    for _ in range(k):
        best = scores.argmax()
        chosen.append(best)
        scores = scores - step * gram[best]
        scores[best] = -torch.inf  # and stays so, whatever is taken off
    return torch.stack(chosen)


def sample_k(
    scores: Float[Tensor, " n"],
    k: int,
    *,
    temperature: float = 1.0,
    generator: Generator | None = None,
) -> Int[Tensor, " k"]:
    """k samples drawn without replacement, each next one from the softmax of those left.

    Args:
        scores: `[n]`, finite.
        k: between 1 and n.
        temperature: of the softmax of `scores / temperature`; towards 0 this is `top_k`, towards
            infinity a uniform choice.
        generator: of the random numbers.

    Returns:
        Indices `[k]`, in the order of drawing.

    Raises:
        OptionError: `scores`, `k` or `temperature` are not that.

    Reference:
        Kool et al., "Stochastic Beams and Where to Find Them: The Gumbel-Top-k Trick", ICML 2019.
    """
    check_count(k, check_scores("scores", scores))
    check_positive("temperature", temperature)
    uniform = torch.rand(
        len(scores), generator=generator, dtype=torch.float64, device=scores.device
    )
    gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
    return torch.argsort(scores.double() / temperature + gumbel, descending=True)[:k]
