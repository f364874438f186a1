"""Choosing samples by their scores: pure functions from scores to indices or weights.

book = gf.factored_grads(model_fn, params, batch)                  # one backward pass
u = gf.direction(model_fn, params, val)
chosen = gf.select.greats(book.dot_prods(u), book.gram(), k, step=lr / k)
grads = book.weighted_sum(gf.select.uniform_weights(chosen, n))    # no second pass
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import check_positive, check_type, check_whole

__all__ = [
    "greats",
    "reducible_loss",
    "sample_k",
    "softmax_weights",
    "top_k",
    "uniform_weights",
]


WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
"""Dtypes of indices."""


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
    _check_count(k, _check_scores("scores", scores))
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
    n = _check_scores("dot_prods", dot_prods)
    _check_count(k, n)
    check_positive("step", step)
    check_type("gram", gram, Tensor, "a tensor [n, n]")
    real = gram.is_floating_point()
    if gram.shape != (n, n) or not real or not bool(gram.isfinite().all()):
        raise OptionError(
            f"gram must be a finite floating-point tensor of shape [{n}, {n}]; it is one of "
            f"{gram.dtype} and {tuple(gram.shape)}."
        )
    scores, left = dot_prods.double(), torch.ones_like(dot_prods, dtype=torch.bool)
    chosen = []
    for _ in range(k):
        best = scores.masked_fill(~left, -torch.inf).argmax()
        chosen.append(best)
        left[best] = False
        scores = scores - step * gram[best].double()
    if not bool(scores.isfinite().all()):
        raise OptionError(f"step={step!r} times gram is not finite. Use a smaller step.")
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
    _check_count(k, _check_scores("scores", scores))
    check_positive("temperature", temperature)
    if generator is not None:
        check_type("generator", generator, Generator, "a torch.Generator, or None")
    uniform = torch.rand(
        len(scores), generator=generator, dtype=torch.float64, device=scores.device
    )
    gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
    # In that order, and finite, however small or large the temperature is.
    wide, low = scores.double(), temperature < 1
    drawn = wide + temperature * gumbel if low else wide / temperature + gumbel
    return torch.argsort(drawn, descending=True, stable=True)[:k]


def reducible_loss(
    losses: Float[Tensor, " n"], irreducible: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """The part of every loss that training can still remove (RHO-LOSS).

        score_i = losses_i - irreducible_i

    High for what is not learnt yet but learnable; low for what is known already, and for noise,
    which a model trained on held-out data gets wrong as well.

    Args:
        losses: of the model in training, `[n]`.
        irreducible: of the same samples under a model trained on held-out data, `[n]`.

    Returns:
        Scores `[n]`, for `top_k`.

    Raises:
        OptionError: the two are not finite vectors of one length.

    Reference:
        Mindermann et al., "Prioritized Training on Points that are Learnable, Worth Learning, and
        Not Yet Learnt", ICML 2022.
    """
    n, m = _check_scores("losses", losses), _check_scores("irreducible", irreducible)
    if n != m:
        raise OptionError(f"losses and irreducible must have one length; they have {n} and {m}.")
    return losses - irreducible


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
    if not _check_scores("scores", scores):
        return scores.clone()
    check_positive("temperature", temperature)
    below = scores.double() - scores.double().max()
    return torch.softmax(below / temperature, 0).to(scores.dtype)


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
    check_type("chosen", chosen, Tensor, "a tensor of indices [k]")
    if chosen.ndim != 1 or chosen.dtype not in WHOLE:
        raise OptionError(f"chosen must be a tensor of indices [k]; got {chosen.dtype}.")
    check_whole("n", n)
    _check_count(len(chosen), n)
    weights = torch.zeros(n, device=chosen.device)
    if int(chosen.min()) < 0 or int(chosen.max()) >= n:
        raise OptionError(f"chosen must be indices of {n} samples; got {chosen.tolist()}.")
    weights[chosen.long()] = 1 / len(chosen)  # torch takes uint8 for a mask
    if int((weights > 0).sum()) != len(chosen):
        raise OptionError(f"chosen holds a sample twice: {chosen.tolist()}.")
    return weights


def _check_scores(name: str, scores: object) -> int:
    """The number of scores, if they are a vector of finite numbers."""
    if not isinstance(scores, Tensor) or scores.ndim != 1 or not scores.is_floating_point():
        found = (
            f"{tuple(scores.shape)} of {scores.dtype}"
            if isinstance(scores, Tensor)
            else type(scores).__name__
        )
        raise OptionError(f"{name} must be a floating-point tensor of shape [n]; got {found}.")
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise OptionError(f"{name} must be finite; they are not for samples {bad[:5]}.")
    return len(scores)


def _check_count(k: int, n: int) -> None:
    """Raise `OptionError` unless k of n can be chosen."""
    if not 1 <= check_whole("k", k, -1) <= n:
        raise OptionError(f"k={k!r}: choose between 1 and all {n} samples.")
