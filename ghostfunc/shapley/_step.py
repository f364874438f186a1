"""One training step with the value of each of its samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import optree
import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base import definition
from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import (
    CHECKS,
    check_flags,
    check_model_fn,
    check_number,
    check_positive,
    check_type,
    one_of,
)
from ghostfunc._base.processes.pieces import in_step, of_all_ranks, refuse_pieces, samples_of_all
from ghostfunc._base.program import Program
from ghostfunc._base.reprs import brief
from ghostfunc._base.trees import batch_size, flatten_like
from ghostfunc._base.types import Check, ModelFn, PyTree, Randomness
from ghostfunc._factors.contract import add_up
from ghostfunc._quantities.quantity import Dot, Prepared, Quantity
from ghostfunc._taps.run import run
from ghostfunc._taps.use_shapes import use_shapes
from ghostfunc._trace.fitting import prove_plain
from ghostfunc._transforms.factored import FactoredGrads
from ghostfunc._transforms.scores.validation import validation_readers
from ghostfunc.shapley._curvature import Hvp, grad_and_hvp
from ghostfunc.shapley._optimizers import Optimizer

Form: TypeAlias = Literal["exact", "previous_state"]


class ShapleyStep(NamedTuple):
    """What one training step with values returns.

    Attributes:
        losses: per-sample losses, `[n]`.
        grads: the gradient of the weighted sum of the losses (their mean by default), which the
            optimizer gets; a pytree like `params`.
        values: what each sample's share in the step changes every validation loss by, `[n, sets]`,
            in the order of `val_sets`. Negative: it lowers the loss, the sample helps.
    """

    losses: Float[Tensor, " n"]
    grads: PyTree
    values: Float[Tensor, "n sets"]

    def __repr__(self) -> str:
        return brief("ShapleyStep", **self._asdict())


@of_all_ranks("gf.shapley.step")
def step(
    model_fn: ModelFn,
    params: PyTree,
    train: PyTree,
    val_sets: Mapping[str, PyTree],
    *,
    optimizer: Optimizer,
    order: Literal[1, 2] = 1,
    form: Form = "exact",
    weight: float | None = None,
    loss_scale: float = 1.0,
    keep_factors: bool = True,
    hvp: Hvp = "forward",
    check: Check = "new",
    randomness: Randomness = "error",
) -> ShapleyStep:
    """Losses and gradient of a training step, and the value of every sample in it.

    The step is `p -> p + D(G)`, `G = weight * sum_i g_i`, D the optimizer's update with derivative
    J. The value of sample i is its Shapley value for the change of the mean validation loss L in
    this step, in the expansion of L and D about `params`:

        order 1:  value_i = weight * <g_i, J^T u>                u = grad L
        order 2:  value_i = weight * <g_i, J^T (u + H (D(G) + D(0)) / 2)>     H = hessian of L

    For SGD, `D(G) = -lr G`, that is `-lr weight <g_i, u>`, and plus
    `lr^2 weight / 2 * <g_i, H G>`. Values are in units of the loss. A NEGATIVE VALUE LOWERS THE
    VALIDATION LOSS: the sample helps. Where D is linear, the values of order 2 sum to the change
    `L(p + D(G)) - L(p + D(0))` up to third order in D.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses [n]`.
        params: pytree of floating-point tensors, before the step.
        train: pytree of tensors `[n, ...]`.
        val_sets: name -> pytree of tensors `[m, ...]`: one column of values for each.
        optimizer: `gf.shapley.sgd(lr=...)`, `adamw(...)`, `from_optimizer(...)`, or an
            `Optimizer` of your own.
        order: 1 or 2.
        form: where J depends on the gradient (Adam, clipping). "exact": J at G, which needs G
            before values are read. "previous_state": J at a zero gradient, from the optimizer's
            state alone, in one pass. For optimizers linear in the gradient they are the same.
        weight: of every sample's loss in the loss that is trained, `1 / n` by default. For a
            micro-batch, 1 / the number of samples of the whole batch.
        loss_scale: the backward pass over `train` is run on losses times this, so that 16-bit
            gradients do not underflow; `grads` and `values` are divided by it (exact for powers of
            two). The passes over validation sets are not scaled.
        keep_factors: where G comes first, keep the factors of the gradients (memory as for the
            activations) instead of running the model on `train` a second time (with draws of its
            own, if it draws).
        hvp: for order 2, "forward" (`jvp` over `grad`) or "reverse" (`grad` over `grad`, for ops
            without forward-mode AD).
        check: when numbers are held against plain autograd: "new", where the way through the
            program or the shapes are new, in two more passes; "always", there and with one sample
            drawn at random in every call; or "never".
        randomness: "error" or "different".

    Returns:
        `ShapleyStep(losses, grads, values)`.

    Raises:
        OptionError: no validation set, or an option that does not exist.
        GhostError: another of its children, as for `ghost_vjp`.

    Reference:
        Wang et al., "Data Shapley in One Training Run", ICLR 2025.
    """
    _check_form(form, order)
    _check_sets(val_sets)
    _check_asked(model_fn, optimizer, randomness)
    _check_passes(check, hvp, keep_factors)
    _check_scales(loss_scale, weight)
    program = Program.of(model_fn, params, randomness)
    everything, unflatten = range(len(program.leaves)), program.spec.unflatten
    _check_pieces(model_fn, optimizer, order)
    weight = 1 / samples_of_all(model_fn, batch_size(train, "train")) if weight is None else weight
    tapped = partial(run, program, train, scale=weight * loss_scale, check=check)

    if order == 1 and (optimizer.linear or form == "previous_state"):
        quantities, factor = _one_pass(program, train, val_sets, optimizer, check)
        taken = tapped(quantities, grads=everything)
        values = torch.stack([add_up(dots) for dots in taken.values], dim=1) * (factor * weight)
        grads = _unscaled(taken.grads, loss_scale)
        return ShapleyStep(taken.losses, unflatten(grads), values)

    taken = tapped([], grads=everything, collect=everything if keep_factors else ())
    gradient = unflatten(_unscaled(taken.grads, loss_scale))
    us = directions(
        model_fn,
        params,
        val_sets,
        optimizer=optimizer,
        grads=gradient,
        order=order,
        hvp=hvp,
        randomness=randomness,
    )
    if keep_factors:
        book = FactoredGrads.of(taken, program)
        columns = [book.dot_prods(u) / loss_scale for u in us.values()]
    else:
        dots = tapped([Dot(u) for u in us.values()]).values
        columns = [add_up(row) * weight for row in dots]
    return ShapleyStep(taken.losses, gradient, torch.stack(columns, dim=1))


@of_all_ranks("gf.shapley.directions")
def directions(
    model_fn: ModelFn,
    params: PyTree,
    val_sets: Mapping[str, PyTree],
    *,
    optimizer: Optimizer,
    grads: PyTree | None = None,
    order: Literal[1, 2] = 1,
    hvp: Hvp = "forward",
    randomness: Randomness = "error",
) -> dict[str, PyTree]:
    """What a sample's weighted gradient is dotted with to give its value: `step` in two halves.

        order 1:  J^T u                    order 2:  J^T (u + H (D(G) + D(0)) / 2)

    For steps of several micro-batches: `weight * <g_i, direction>` is the value of sample i of any
    of them (`gf.Dot(direction)` in `gf.ghost_vjp`).

    Args:
        grads: the gradient G the optimizer gets, of all micro-batches; None takes J at a zero
            gradient, which is exact for linear optimizers and "previous_state" for others.

    Other arguments and errors are those of `step`.

    Returns:
        name -> a pytree like `params`.
    """
    _check_order(order)
    _check_sets(val_sets)
    _check_asked(model_fn, optimizer, randomness)
    one_of("hvp", hvp, ("forward", "reverse"))
    if order == 2 and grads is None:
        raise OptionError("order=2 needs grads, the gradient of the step.")
    _check_pieces(model_fn, optimizer, order)
    program = Program.of(model_fn, params, randomness)
    leaves, spec = program.leaves, program.spec
    zeros = spec.unflatten([torch.zeros_like(x) for x in leaves])
    at = zeros if grads is None else spec.unflatten(flatten_like(grads, leaves, spec, "grads"))
    move: list[Tensor] = []
    if order == 2:
        ends = optimizer.update(at, params), optimizer.update(zeros, params)
        tree = optree.tree_map(lambda x, y, p: ((x + y) / 2).to(p.dtype), *ends, params)
        move = flatten_like(tree, leaves, spec, "the optimizer's changes")
    out: dict[str, PyTree] = {}
    for name, val in val_sets.items():
        prove_plain(program, val)
        if order == 2:
            u, product = grad_and_hvp(program, val, move, hvp)
            u = [wide(x) + wide(y) for x, y in zip(u, product, strict=True)]
        else:
            m = samples_of_all(model_fn, batch_size(val, name))
            u = definition.val_gradient(program, val, 1 / m)
        out[name] = optimizer.pull_back(at, params, spec.unflatten(u))
    return out


def _one_pass(
    program: Program,
    train: PyTree,
    val_sets: Mapping[str, PyTree],
    optimizer: Optimizer,
    check: Check,
) -> tuple[list[Quantity], float]:
    """What to read in the training step's own pass, and a factor on it."""
    if optimizer.gain is None or in_step(program.model_fn) is not None:
        params = program.spec.unflatten(program.leaves)
        us = directions(
            program.model_fn, params, val_sets, optimizer=optimizer, randomness=program.randomness
        )
        return [Dot(u) for u in us.values()], 1.0
    _, uses = use_shapes(program, train, exact=False)
    rows = [
        validation_readers(program, uses, val, reduction="mean", grads=True, check=check)
        for val in val_sets.values()
    ]
    return [Prepared(readers, degree=1) for readers in rows], optimizer.gain


def _unscaled(grads: Sequence[Tensor], loss_scale: float) -> list[Tensor]:
    return list(grads) if loss_scale == 1.0 else [g / loss_scale for g in grads]


def _check_asked(model_fn: object, optimizer: object, randomness: object) -> None:
    check_model_fn(model_fn)
    how = "an Optimizer, as gf.shapley.sgd(lr=...) or from_optimizer(...) makes"
    check_type("optimizer", optimizer, Optimizer, how)
    one_of("randomness", randomness, ("error", "different"))


def _check_pieces(model_fn: ModelFn, optimizer: Optimizer, order: int) -> None:
    """Raise for what is not for sharded modules."""
    if order == 2:
        refuse_pieces(model_fn, "order=2 in gf.shapley")
    if not optimizer.elementwise:
        refuse_pieces(
            model_fn,
            "gf.shapley with an optimizer that may mix the gradient's places (clipped, or "
            "Optimizer(...) without elementwise=True)",
        )


def _check_form(form: object, order: object) -> None:
    one_of("form", form, ("exact", "previous_state"))
    _check_order(order)
    if order == 2 and form == "previous_state":
        raise OptionError('order=2 needs the gradient of the step: use form="exact".')


def _check_passes(check: object, hvp: object, keep_factors: object) -> None:
    check_flags(keep_factors=keep_factors)
    one_of("check", check, CHECKS)
    one_of("hvp", hvp, ("forward", "reverse"))


def _check_scales(loss_scale: object, weight: object) -> None:
    check_positive("loss_scale", loss_scale)
    if weight is not None and check_number("weight", weight) == 0:
        raise OptionError("weight=0: such a step trains on nothing, and every value is zero.")


def _check_order(order: object) -> None:
    if isinstance(order, bool) or not isinstance(order, int) or order not in (1, 2):
        raise OptionError(f"order={order!r} is not an option. Use one of: 1, 2.")


def _check_sets(val_sets: object) -> None:
    if not isinstance(val_sets, Mapping) or not val_sets:
        found = "an empty one" if isinstance(val_sets, Mapping) else type(val_sets).__name__
        raise OptionError(
            f'val_sets must be a dict from names to batches, {{"val": batch}}; got {found}.'
        )
