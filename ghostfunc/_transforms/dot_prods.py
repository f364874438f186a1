"""The public functions: dot products of per-sample gradients with validation gradients."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from ghostfunc._base.compilable import compilable
from ghostfunc._base.options import check_flags
from ghostfunc._base.processes.pieces import of_all_ranks
from ghostfunc._base.reprs import brief
from ghostfunc._base.types import Check, ContractDtype, Mode, ModelFn, PyTree, Randomness, Reduction
from ghostfunc._transforms.scores.over_ranks import asked_of_all
from ghostfunc._transforms.scores.question import Question, ask


class GhostStep(NamedTuple):
    """What one training step with scores returns.

    Attributes:
        losses: per-sample losses, `[n]`.
        grads: gradient of the mean loss, a pytree like `params`.
        dot_prods: `<g_i, u>`, `[n]` (`[n, m]` for `reduction="none"`), or a pytree of those like
            `params` for `per_param=True`; for several validation batches a dict of that.
    """

    losses: Float[Tensor, " n"]
    grads: PyTree
    dot_prods: PyTree

    def __repr__(self) -> str:
        return brief("GhostStep", **self._asdict())


@compilable()
@of_all_ranks("gf.ghost_dot_prod")
def ghost_dot_prod(
    model_fn: ModelFn,
    params: PyTree,
    train: PyTree,
    val: PyTree | None = None,
    *,
    direction: PyTree | None = None,
    mode: Mode = "ghost",
    reduction: Reduction = "mean",
    per_param: bool = False,
    per_position: bool = False,
    normalize: bool = False,
    vectorize: bool | None = None,
    contract_dtype: ContractDtype = None,
    chunk_size: int | None = None,
    check: Check = "new",
    randomness: Randomness = "error",
    check_finite: bool = True,
    group: Any = None,
) -> PyTree:
    """Dot products of every train sample's gradient with the validation gradient.

        s_i = <g_i, u>,  g_i = d losses_train[i] / d params,  u = mean_j d losses_val[j] / d params

    To first order, a step of `-lr * g_i` changes the mean validation loss by `-lr * s_i`: a
    positive score is a sample that helps.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses`, one loss per sample.
        params: pytree of floating-point tensors.
        train: pytree of tensors `[n, ...]`.
        val: pytree of tensors `[m, ...]`; lengths may differ from those of `train`. Or a dict of
            such batches, `{"code": batch, "prose": batch}`: every one is run once, `train` once for
            all (see below).
        direction: instead of `val`, a pytree like `params` to dot with, such as `gf.direction(...)`
            returns: the way to score many batches at one checkpoint. Or what `gf.factored_grads`
            returns for a validation batch: kept as factors, its gradients are cheaper to dot with
            where they have few positions (each parameter's are, or are not, by cost), and
            `reduction` applies to them. Or a dict of either.
        mode: "ghost" (from factors, one backward pass), "jvp" (directional derivative of the
            losses; any model with forward-mode AD), or "materialized" (`vmap(grad)`; exact by
            definition, as large as n models).
        reduction: over validation samples: "mean", "sum", or "none" for `[n, m]`.
        per_param: return the contributions of every parameter; they sum to the total.
        per_position: return the contributions of every position, `[n, T]`; they sum to the total
            (see below). Ghost mode only, and not for `reduction="none"`.
        normalize: cosines instead, `s_i / (||g_i|| ||u||)`; 0 where a gradient is zero, NaN
            where the product of norms underflows. Not for `mode="jvp"`.
        vectorize: for `mode="materialized"`: True for vmap, False for a loop over samples, None for
            the loop where vmap cannot run the model; `verify` says which it was.
        contract_dtype: torch.bfloat16 or torch.float16: the two operands of every matrix product of
            a contraction (of factors with each other, with `u`, or into the `u` of `val`) are
            rounded to it; products are added up in float32, and their sum is rounded once more.
            Where processors multiply it faster, scores are cheaper, and right to 2 or 3 digits:
            `verify` measures the error. Elementwise products, sums, look-ups and parameters without
            a matrix product are not rounded, nor is the model itself. None, the default: float32
            or wider. Not for other modes, which contract nothing, nor for `per_position`.
        chunk_size: the most samples to run at one time, of `train` and of `val`, where all of them
            do not fit into memory. The numbers do not depend on it. With `reduction="none"` every
            chunk of `train` is run once for every chunk of `val`. None also allows one run of both
            batches, where they are alike: with few validation samples, or of a sharded module,
            where every rank may compute those of all (docs/sharded.md).
        check: when numbers are held against plain autograd: "new", where the way through the
            program or the shapes are new, in two more passes; "always", there and with one sample
            drawn at random in every call; or "never".
        randomness: "error" refuses a model that draws random numbers; "different" allows it.
        check_finite: whether to look for losses that are NaN or infinite, which waits for the
            device once, when all is queued. Without it nothing waits: look at what is returned.
            Ghost mode only.
        group: a process group of `torch.distributed`. Every rank gives train and validation samples
            of its own, in any numbers, and `u` is the mean (or sum) over all ranks' validation
            samples; a `direction` is the caller's, and has to be the same on all ranks. Scores are
            those of the rank's own samples: `gf.distributed.gather` has them all. Not for
            `reduction="none"`.

    Returns:
        `[n]` (`[n, m]` for `reduction="none"`), float32 or wider; for `per_param` a pytree like
        `params` of those; for a dict of validation batches or directions a dict of all that. Units:
        those of loss^2 per parameter^2. Scales: `g_i` is the gradient of sample i's own loss, not
        divided by n.

    **Several validation batches.** A batch may itself be a dict, so the structure of `train`
    decides: `val` with that structure is one batch, a dict whose values all have it is several.
    Where nothing has exactly that structure (a batch with other keys besides), keys in common have
    to settle it, and if they do not, it is an error. A direction is told from a dict of them by the
    structure of `params`.

    **Positions.** Where an op `y = op(a, W)` uses parameters, the share of position t is
    `<b_it, y'_it>`: `y'` is how `y` changes when the parameters move along `u`, and `b` the
    gradient of the loss at `y`. For a linear layer that is `b_it^T U a_it`, for a position table
    what position t looked up. In a causal language model position t is the place of token t in
    the sequence, where it is embedded, normalised, projected and its successor predicted: the share
    says where parameters are used with what effect on the score, not which token's loss it is. T is
    the size of axis 1 of the batch's tensors. Ops may have it on any one axis, which is found by a
    run on shorter samples; convolutions count at their output's positions. Uses without positions
    (a pooled classifier's head, a penalty on weights), with positions on two axes (a table of pairs
    of tokens) or with another number of them than the other uses raise `PositionAxisError`.

    Raises:
        PositionAxisError: `per_position`, and a parameter meets samples without positions.
        RankError: with a `group`, another rank failed, is gone, or was given something else. All
            ranks end with an error that names it.
        GhostError: another of its children: which op, parameter, sample or option, and what to do.

    Reference:
        Wang et al., "Data Shapley in One Training Run", ICLR 2025.
    """
    given = partial(
        ask,
        model_fn,
        params,
        train,
        val,
        direction,
        mode=mode,
        reduction=reduction,
        per_param=per_param,
        normalize=normalize,
        vectorize=vectorize,
        contract_dtype=contract_dtype,
        chunk_size=chunk_size,
        check=check,
        randomness=randomness,
        check_finite=check_finite,
    )

    def make() -> Question:
        check_flags(per_position=per_position)
        return given()

    asked = make() if group is None else asked_of_all(group, "ghost_dot_prod", make)
    return asked.positions() if per_position else asked.scores()


@compilable(GhostStep)
@of_all_ranks("gf.ghost_value_and_grad")
def ghost_value_and_grad(
    model_fn: ModelFn,
    params: PyTree,
    train: PyTree,
    val: PyTree | None = None,
    *,
    direction: PyTree | None = None,
    mode: Mode = "ghost",
    reduction: Reduction = "mean",
    per_param: bool = False,
    normalize: bool = False,
    vectorize: bool | None = None,
    contract_dtype: ContractDtype = None,
    chunk_size: int | None = None,
    check: Check = "new",
    randomness: Randomness = "error",
    check_finite: bool = True,
    group: Any = None,
) -> GhostStep:
    """One training step's losses, gradient and scores, from one backward pass over `train` (and
    over `val`, the same one where the batches are alike).

        losses_i,   grads = d mean_i losses_i / d params,   dot_prods_i = <g_i, u>

    Arguments and errors are those of `ghost_dot_prod`. Nothing is written anywhere: hand `grads` to
    a functional optimizer, or copy them into `.grad`.

    A `contract_dtype` rounds scores alone, never losses or `grads`. Where it is cheapest to read a
    parameter's scores off the products that make `grads`, that step is not rounded either.

    With a `group`, `grads` is the gradient of the mean over all samples of all ranks, whatever
    number of them each has, and the same on all ranks. It is summed up in float32 or wider, in
    buckets that travel while the backward pass goes on. `losses` and `dot_prods` are those of the
    rank's own samples.

    Returns:
        `GhostStep(losses [n], grads, dot_prods)`. `grads` is a pytree like `params`, of their
        dtypes, the gradient of the *mean* loss; `g_i` in `dot_prods` is that of sample i's own
        loss.
    """
    make = partial(
        ask,
        model_fn,
        params,
        train,
        val,
        direction,
        mode=mode,
        reduction=reduction,
        per_param=per_param,
        normalize=normalize,
        vectorize=vectorize,
        contract_dtype=contract_dtype,
        chunk_size=chunk_size,
        check=check,
        randomness=randomness,
        check_finite=check_finite,
    )
    asked = make() if group is None else asked_of_all(group, "ghost_value_and_grad", make)
    losses, grads, scores = asked.step()
    return GhostStep(losses, asked.program.spec.unflatten(grads), scores)


@compilable()
@of_all_ranks("gf.ghost_cosine")
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
    check: Check = "new",
    randomness: Randomness = "error",
    check_finite: bool = True,
    group: Any = None,
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
        check: when numbers are held against plain autograd: "new", where the way through the
            program or the shapes are new, in two more passes; "always", there and with one sample
            drawn at random in every call; or "never".
        randomness: "error" or "different".
        check_finite: as in `ghost_dot_prod`. Without it cosines of gradients whose square over- or
            underflows are NaN.
        group: as in `ghost_dot_prod`.

    Returns:
        `[n]` (`[n, m]` for `reduction="none"`) in [-1, 1]; for `per_param` a pytree like `params`
        of those; for several validation batches a dict. Where one of the two gradients is zero the
        cosine is 0: no direction, no
        similarity. NaN where a gradient is not finite.

    Raises:
        GhostError: one of its children, as for `ghost_dot_prod`.
    """
    make = partial(
        ask,
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
        check=check,
        randomness=randomness,
        check_finite=check_finite,
    )
    asked = make() if group is None else asked_of_all(group, "ghost_cosine", make)
    return asked.scores()
