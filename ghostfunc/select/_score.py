"""Losses to scores."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ghostfunc._errors import OptionError
from ghostfunc.select._check import check_scores


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
    n, m = check_scores("losses", losses), check_scores("irreducible", irreducible)
    if n != m:
        raise OptionError(f"losses and irreducible must have one length; they have {n} and {m}.")
    return losses - irreducible
