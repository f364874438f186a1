"""Norms, cosines and Gram matrices of per-sample gradients."""

from __future__ import annotations

from torch import Tensor

from ghostfunc import _chunks, _norms
from ghostfunc._blocks import GramBlocks
from ghostfunc._book import collect
from ghostfunc._capture import compilable
from ghostfunc._cosines import sample_norms
from ghostfunc._errors import OptionError, check_contract_dtype, one_of
from ghostfunc._factors import add_up
from ghostfunc._quantities import SqNorm
from ghostfunc._scores import ask
from ghostfunc._tree import flatten_params
from ghostfunc._types import ContractDtype, Mode, ModelFn, PyTree, Randomness, Reduction
from ghostfunc._vjp import run

_MODES = ("ghost", "materialized")


@compilable()
def ghost_norm(
    model_fn: ModelFn,
    params: PyTree,
    batch: PyTree,
    *,
    per_param: bool = False,
    mode: Mode = "ghost",
    vectorize: bool | None = None,
    contract_dtype: ContractDtype = None,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> PyTree:
    """Norms of per-sample gradients.

        ||g_i|| = sqrt(sum_p ||g_i^p||^2),   g_i = d losses[i] / d params

    A linear layer's share is `sum_ts <b_it, b_is> <a_it, a_is>`: two Gram matrices of T positions
    instead of a gradient, or blocks of the gradient where those are cheaper. Parameters that
    samples meet at several places (tied, called twice) count all cross terms between the places:
    their inputs and cotangents are kept until the backward pass is over.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses [n]`.
        params: pytree of floating-point tensors.
        batch: pytree of tensors `[n, ...]`.
        per_param: return the norm of every parameter's gradient; their squares add up.
        mode: "ghost" or "materialized" (`vmap(grad)`, as large as n models).
        vectorize: for "materialized": True for vmap, False for a loop over samples, None for the
            loop where vmap cannot run the model.
        contract_dtype: torch.bfloat16 or torch.float16 rounds the operands of matrix products to
            it, as in `ghost_dot_prod`. Squares are sums of T x T terms that may cancel, so a norm
            can lose more digits than each term does.
        chunk_size: the most samples to run at one time; by default all of them.
        randomness: "error" or "different".

    Returns:
        `[n]`, float32 or wider; for `per_param` a pytree like `params` of those. NaN or infinite
        where the gradient has such an entry. Samples whose square over- or underflows are run once
        more, at another scale (not with `randomness="different"`); what is below 1e-22 in float32
        may read as zero.

    Raises:
        GhostError: one of its children, as for `ghost_vjp`.

    Reference:
        Goodfellow, "Efficient Per-Example Gradient Computations", 2015; Li et al., "Large Language
        Models Can Be Strong Differentially Private Learners", ICLR 2022 (ghost norms).
    """
    one_of("mode", mode, _MODES)
    one_of("randomness", randomness, ("error", "different"))
    check_contract_dtype(contract_dtype, mode)
    leaves, spec = flatten_params(params)
    squares = SqNorm().contracting(contract_dtype)

    def of_chunk(chunk: PyTree) -> list[Tensor]:
        if mode == "ghost":
            taken = run(model_fn, leaves, spec, chunk, [squares], randomness=randomness)
            return [sample_norms(model_fn, leaves, spec, chunk, taken.values[0], randomness)]
        book = collect(
            model_fn, leaves, spec, chunk, mode=mode, vectorize=vectorize, randomness=randomness
        )
        return [book.param_norms()]

    (rows,) = _chunks.joined(_chunks.each(of_chunk, batch, chunk_size), axis=1)
    return spec.unflatten(list(rows)) if per_param else _norms.joint(rows)


@compilable()
def ghost_gram(
    model_fn: ModelFn,
    params: PyTree,
    batch: PyTree,
    other: PyTree | None = None,
    *,
    per_param: bool = False,
    normalize: bool = False,
    mode: Mode = "ghost",
    memory_budget: int | None = None,
    vectorize: bool | None = None,
    randomness: Randomness = "error",
) -> PyTree:
    """Inner products of all pairs of per-sample gradients.

        G_ij = <g_i, g_j>   (with `other`: g_i of batch, g_j of other)

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses [n]`.
        params: pytree of floating-point tensors.
        batch: pytree of tensors `[n, ...]`.
        other: pytree of tensors `[m, ...]`; lengths may differ from those of `batch`.
        per_param: return the contributions of every parameter; they sum to the total.
        normalize: cosines instead, `G_ij / (||g_i|| ||g_j||)`; 0 where a gradient is zero. With
            `other`, both batches are run once more for their norms.
        mode: "ghost" or "materialized" (`vmap(grad)`, as large as n models).
        memory_budget: bytes that may be allocated at one time, apart from the result. Samples are
            then run in blocks, one against the other, as large as the budget allows: k blocks take
            `k (k + 1) / 2` forward and backward passes of one block (with `other`, one for every
            pair of blocks and one for every block of it). By default everything is run at once.
            What a sample takes is measured, on two of them, at the first call with given shapes.
        vectorize: for "materialized": True for vmap, False for a loop over samples, None for the
            loop where vmap cannot run the model.
        randomness: "error" or "different" (not with a budget: every block would draw anew).

    Returns:
        `[n, n]`, symmetric, or `[n, m]`; float32 or wider; for `per_param` a pytree like `params`
        of those. The diagonal is `ghost_norm(...) ** 2`.

    Raises:
        OptionError: not even one sample at a time fits into the budget.
        GhostError: another of its children, as for `ghost_vjp`.
    """
    one_of("mode", mode, _MODES)
    one_of("randomness", randomness, ("error", "different"))
    if memory_budget is not None and (mode, randomness) != ("ghost", "error"):
        raise OptionError(
            'memory_budget needs mode="ghost" and randomness="error": it runs samples in blocks, '
            "some more than once."
        )
    if normalize and other is not None and randomness != "error":
        raise OptionError(
            'normalize=True with other needs randomness="error": norms come from a run of their '
            'own. ghost_cosine(..., reduction="none") takes them from the same one.'
        )
    leaves, spec = flatten_params(params)
    if mode == "ghost":
        blocks = GramBlocks(model_fn, leaves, spec, per_param, memory_budget, randomness)
        grams = blocks.within(batch) if other is None else blocks.between(batch, other)
        if normalize:
            squares = [[g.diagonal() for g in grams]]
            if other is not None:
                squares = [blocks.squares(batch, other), blocks.squares(other, batch)]
            lengths = [list(map(_norms.root, side)) for side in squares]
    else:
        books = [
            collect(
                model_fn, leaves, spec, b, mode=mode, vectorize=vectorize, randomness=randomness
            )
            for b in ([batch] if other is None else [batch, other])
        ]
        grams = books[0].param_grams(*books[1:])
        grams = grams if per_param else [add_up(grams)]
        if normalize:
            lengths = [list(b.param_norms()) if per_param else [b.norms()] for b in books]
    if normalize:
        grams = list(map(_norms.cosine, grams, lengths[0], lengths[-1]))
    return spec.unflatten(grams) if per_param else grams[0]


@compilable()
def ghost_cosine(
    model_fn: ModelFn,
    params: PyTree,
    train: PyTree,
    val: PyTree | None = None,
    *,
    direction: PyTree | None = None,
    reduction: Reduction = "mean",
    per_param: bool = False,
    mode: Mode = "ghost",
    vectorize: bool | None = None,
    contract_dtype: ContractDtype = None,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> PyTree:
    """Cosines between every train sample's gradient and the validation gradient.

        c_i = <g_i, u> / (||g_i|| ||u||),   u = mean_j d losses_val[j] / d params

    `ghost_dot_prod(..., normalize=True)` under a name of its own: scores without the lengths, so
    that a sample does not score by having a large loss. One backward pass over `train` gives dot
    products and norms.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses`, one loss per sample.
        params: pytree of floating-point tensors.
        train: pytree of tensors `[n, ...]`.
        val: pytree of tensors `[m, ...]`, or a dict of them, as for `ghost_dot_prod`.
        direction: instead of `val`, a pytree like `params`, or a dict of them.
        reduction: "mean" (or "sum", which has the same cosine), or "none" for the cosine with every
            validation sample's gradient, `[n, m]`.
        per_param: cosines parameter by parameter, each between the gradients of that parameter
            alone. They do not sum to the total.
        mode: "ghost" or "materialized" (`vmap(grad)`, as large as n + m models).
        vectorize: for "materialized": True for vmap, False for a loop over samples, None for the
            loop where vmap cannot run the model.
        contract_dtype: torch.bfloat16 or torch.float16 rounds the operands of matrix products to
            it, in dot products and in norms, as in `ghost_dot_prod` and `ghost_norm`.
        chunk_size: the most samples to run at one time, as in `ghost_dot_prod`.
        randomness: "error" or "different".

    Returns:
        `[n]` (`[n, m]` for `reduction="none"`) in [-1, 1]; for `per_param` a pytree like `params`
        of those; for several validation batches a dict. Where one of the two gradients is zero the
        cosine is 0: no direction, no
        similarity. NaN where a gradient is not finite.

    Raises:
        GhostError: one of its children, as for `ghost_dot_prod`.
    """
    return ask(
        model_fn,
        params,
        train,
        val,
        direction,
        mode=mode,
        reduction=reduction,
        per_param=per_param,
        normalize=True,
        vectorize=vectorize,
        contract_dtype=contract_dtype,
        chunk_size=chunk_size,
        randomness=randomness,
    ).scores()
