"""Optimizers as pure updates: from a gradient to the change of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optree
import torch
from torch import Tensor

from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import (
    check_betas,
    check_flags,
    check_not_negative,
    check_number,
    check_positive,
    check_type,
    check_whole,
)
from ghostfunc._base.trees import flatten_like, flatten_params
from ghostfunc._base.types import PyTree

Update = Callable[[PyTree, PyTree], PyTree]


@dataclass(frozen=True)
class Optimizer:
    """One step of an optimizer, as a pure function of the gradient.

    Attributes:
        update: `update(grads, params) -> changes`: what the step adds to the parameters, new minus
            old; pytrees like `params`. Written with torch operations; it must write to nothing. The
            state before the step (moments, step numbers) is closed over.
        linear: whether `changes` is linear in `grads`, up to a constant. Then its derivative `J` is
            the same at every gradient, and scores need no gradient before they are read.
        gain: the number c if `J` is c times the identity (plain SGD: `-lr`), else None.
        elementwise: whether a change depends on the gradient at its own place alone, so that a
            rank can compute it of its pieces of sharded parameters.
    """

    update: Update
    linear: bool = False
    gain: float | None = None
    elementwise: bool = False

    def pull_back(self, grads: PyTree, params: PyTree, direction: PyTree) -> PyTree:
        """`J^T u`, with J the derivative of the update at `grads`."""
        if self.gain is not None:
            return optree.tree_map(lambda u: self.gain * u, direction)
        leaves, spec = flatten_params(params)

        def changes_of(g: PyTree) -> PyTree:
            made = self.update(g, params)
            return spec.unflatten(
                flatten_like(made, leaves, spec, "what optimizer.update returned")
            )

        changes, pullback = torch.func.vjp(changes_of, grads)[:2]
        cotangent = optree.tree_map(lambda u, x: u.to(x.dtype), direction, changes)
        (pulled,) = pullback(cotangent)
        return pulled


def sgd(
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    momentum_buffer: PyTree | None = None,
) -> Optimizer:
    """`torch.optim.SGD`: linear in the gradient.

        d = g + weight_decay p
        b = momentum b + (1 - dampening) d          (the first step: b = d)
        change = -lr b                              (nesterov: -lr (d + momentum b))

    Args:
        lr, momentum, dampening, nesterov, weight_decay: those of `torch.optim.SGD`.
        momentum_buffer: `b` before the step, a pytree like `params`; None before the first step.

    Returns:
        An `Optimizer`. Without momentum its `gain` is `-lr`: scores are those of plain SGD,
        `-lr <g_i, u>`.

    Raises:
        OptionError: a negative number, Nesterov's momentum without a momentum or with dampening, or
            a buffer without a momentum.
    """

    check_not_negative("lr", lr)
    for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
        check_not_negative(name, value)
    check_number("dampening", dampening)
    check_flags(nesterov=nesterov)
    check_nesterov(nesterov, momentum, dampening)
    _check_state("momentum_buffer", momentum_buffer)
    if momentum_buffer is not None and not momentum:
        raise OptionError("momentum_buffer without a momentum: give the optimizer's momentum, too.")

    def update(grads: PyTree, params: PyTree) -> PyTree:
        if momentum_buffer is not None:
            _check_like(params, momentum_buffer=momentum_buffer)

        def change(g: Tensor, p: Tensor, b: Tensor | None = None) -> Tensor:
            return sgd_change(g, p, b, lr, momentum, dampening, nesterov, weight_decay)

        buffers = () if momentum_buffer is None else (momentum_buffer,)
        return optree.tree_map(change, grads, params, *buffers)

    gain = sgd_gain(lr, momentum, dampening, nesterov, first=momentum_buffer is None)
    return Optimizer(update, linear=True, gain=gain, elementwise=True)


def sgd_change(
    g: Tensor,
    p: Tensor,
    b: Tensor | None,
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
) -> Tensor:
    """What SGD adds to one parameter."""
    if weight_decay:
        g = g + weight_decay * p
    if not momentum:
        return -lr * g
    b = g if b is None else momentum * b + (1 - dampening) * g
    return -lr * (g + momentum * b if nesterov else b)


def sgd_gain(lr: float, momentum: float, dampening: float, nesterov: bool, *, first: bool) -> float:
    """The derivative of `sgd_change`, a number."""
    enters = 1.0 if first or not momentum else 1 - dampening
    return -lr * (1 + momentum * enters if nesterov and momentum else enters)


def adam(
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    exp_avg: PyTree,
    exp_avg_sq: PyTree,
    step: int,
) -> Optimizer:
    """`torch.optim.Adam`, with t = step + 1:

        d = g + weight_decay p
        m = b1 m + (1 - b1) d,   v = b2 v + (1 - b2) d^2
        change = -lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        lr, betas, eps, weight_decay: those of `torch.optim.Adam`.
        exp_avg, exp_avg_sq: `m` and `v` before the step, pytrees like `params`.
        step: number of steps taken so far.

    Returns:
        An `Optimizer`. Where `v` after the step is zero, no gradient was ever other than zero: such
        an entry counts as not moved by the gradient, where the formula itself has no derivative.
    """
    return _adam(lr, betas, eps, weight_decay, exp_avg, exp_avg_sq, step, decoupled=False)


def adamw(
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    exp_avg: PyTree,
    exp_avg_sq: PyTree,
    step: int,
) -> Optimizer:
    """`torch.optim.AdamW`: as `adam`, except that weight decay does not pass through the moments.

        change = -lr weight_decay p - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

    Arguments and result are those of `adam`.
    """
    return _adam(lr, betas, eps, weight_decay, exp_avg, exp_avg_sq, step, decoupled=True)


def _adam(
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    exp_avg: PyTree,
    exp_avg_sq: PyTree,
    step: int,
    *,
    decoupled: bool,
) -> Optimizer:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        check_not_negative(name, value)
    check_betas(betas)
    check_whole("step", step, 0)
    _check_state("exp_avg", exp_avg)
    _check_state("exp_avg_sq", exp_avg_sq)

    def update(grads: PyTree, params: PyTree) -> PyTree:
        _check_like(params, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)

        def change(g: Tensor, p: Tensor, m: Tensor, v: Tensor) -> Tensor:
            return adam_change(g, p, m, v, step + 1, lr, betas, eps, weight_decay, decoupled)

        return optree.tree_map(change, grads, params, exp_avg, exp_avg_sq)

    return Optimizer(update, elementwise=True)


def _check_state(name: str, state: PyTree) -> None:
    """Raise `OptionError` unless it is a pytree of tensors."""
    for x in optree.tree_leaves(state):
        check_type(name, x, Tensor, "a pytree of tensors, like params")


def _check_like(params: PyTree, **states: PyTree) -> None:
    """Raise `ParamsError` unless the states are pytrees like `params`."""
    leaves, spec = flatten_params(params)
    for name, state in states.items():
        flatten_like(state, leaves, spec, name)


def check_nesterov(nesterov: bool, momentum: float, dampening: float) -> None:
    """Raise `OptionError` for Nesterov's momentum where torch has none."""
    if nesterov and (not momentum or dampening):
        raise OptionError("nesterov=True needs a momentum and no dampening.")


def adam_change(
    g: Tensor,
    p: Tensor,
    m: Tensor,
    v: Tensor,
    t: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    largest: Tensor | None = None,
) -> Tensor:
    """What Adam's step number t adds to one parameter; of AMSGrad, given the largest `v` so far."""
    b1, b2 = betas
    if weight_decay and not decoupled:
        g = g + weight_decay * p
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g.square()
    v = v if largest is None else torch.maximum(largest, v)
    met = v != 0
    # The square root has no derivative at 0: take it elsewhere, and the entry as constant.
    denominator = torch.where(met, v, 1.0).sqrt() / (1 - b2**t) ** 0.5 + eps
    change = -lr / (1 - b1**t) * torch.where(met, m / denominator, (m / eps).detach())
    return change - lr * weight_decay * p if weight_decay and decoupled else change


def clip_factor(grads: Sequence[Tensor], max_norm: float) -> Tensor:
    """What `torch.nn.utils.clip_grad_norm_` multiplies a gradient by, a scalar."""
    squares = torch.stack([g.square().sum() for g in grads]).sum()
    # No derivative of the norm of a gradient that is short enough, and none at zero.
    long = squares > max_norm**2
    norm = torch.where(long, squares, 1.0).sqrt()
    return torch.where(long, (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)


def clipped(optimizer: Optimizer, *, max_norm: float) -> Optimizer:
    """The optimizer after `torch.nn.utils.clip_grad_norm_`.

        update(g * min(1, max_norm / (||g|| + 1e-6)), params)

    Its derivative at a gradient that is clipped leaves out what only lengthens the gradient. It is
    not linear: use the exact form. At a zero gradient nothing is clipped.

    Args:
        optimizer: what is done with the clipped gradient.
        max_norm: the largest norm of the whole gradient.

    Returns:
        An `Optimizer`.
    """
    check_type("optimizer", optimizer, Optimizer, "an Optimizer, as gf.shapley.adamw(...) makes")
    check_positive("max_norm", max_norm, infinite=True)

    def update(grads: PyTree, params: PyTree) -> PyTree:
        factor = clip_factor(optree.tree_leaves(grads), max_norm)
        return optimizer.update(optree.tree_map(lambda g: factor * g, grads), params)

    return Optimizer(update)
