"""Gram matrices: inner products of pairs of samples' gradients."""

from __future__ import annotations

from ghostfunc._base.compilable import compilable
from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import CHECKS, one_of
from ghostfunc._base.trees import flatten_params
from ghostfunc._base.types import Check, Mode, ModelFn, PyTree, Randomness
from ghostfunc._factors import extreme_norms
from ghostfunc._factors.contract import add_up
from ghostfunc._transforms.factored import collect
from ghostfunc._transforms.gram_blocks import GramBlocks
from ghostfunc._transforms.norms import _MODES


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
    vectorize: bool = True,
    check: Check = "new",
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
        vectorize: for "materialized", False loops over samples.
        check: when numbers are held against plain autograd, in two more passes: "new", where the
            way through the program or the shapes are new; "always"; or "never".
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
    one_of("check", check, CHECKS)
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
        blocks = GramBlocks(model_fn, leaves, spec, per_param, memory_budget, check, randomness)
        grams = blocks.within(batch) if other is None else blocks.between(batch, other)
        if normalize:
            squares = [[g.diagonal() for g in grams]]
            if other is not None:
                squares = [blocks.squares(batch, other), blocks.squares(other, batch)]
            lengths = [list(map(extreme_norms.root, side)) for side in squares]
    else:
        books = [
            collect(
                model_fn,
                leaves,
                spec,
                b,
                mode=mode,
                vectorize=vectorize,
                check=check,
                randomness=randomness,
            )
            for b in ([batch] if other is None else [batch, other])
        ]
        grams = books[0].param_grams(*books[1:])
        grams = grams if per_param else [add_up(grams)]
        if normalize:
            lengths = [list(b.param_norms()) if per_param else [b.norms()] for b in books]
    if normalize:
        grams = list(map(extreme_norms.cosine, grams, lengths[0], lengths[-1]))
    return spec.unflatten(grams) if per_param else grams[0]
