"""Optimizers as pure functions of a gradient and a state, both of which are differentiated."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TypeAlias

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
)
from ghostfunc.shapley._optimizers import adam_change, check_nesterov, clip_factor, sgd_change

Leaves: TypeAlias = list[Tensor]
Schedule: TypeAlias = float | Callable[[int], float]
"""A learning rate, or a function of the number of steps taken so far."""


class Optimizer(ABC):
    """One step of an optimizer, written with torch operations that write to nothing.

    Parameters, gradients and states are lists of tensors; a state has `slots` tensors per
    parameter, one parameter after the other.
    """

    slots: int

    @abstractmethod
    def init(self, params: Sequence[Tensor]) -> Leaves:
        """The state before the first step."""

    @abstractmethod
    def update(
        self, grads: Sequence[Tensor], state: Sequence[Tensor], params: Sequence[Tensor], step: int
    ) -> tuple[Leaves, Leaves]:
        """`(params, state)` after the step; `step` steps were taken before it."""

    @abstractmethod
    def settings(self, steps: int) -> str:
        """All that tells it from others in a run of so many steps."""


@dataclass(frozen=True)
class SGD(Optimizer):
    """Made by `sgd`."""

    lr: Schedule
    momentum: float
    dampening: float
    nesterov: bool
    weight_decay: float

    @property
    def slots(self) -> int:  # type: ignore[override]
        return 1 if self.momentum else 0

    def init(self, params: Sequence[Tensor]) -> Leaves:
        return [torch.zeros_like(p) for p in params] if self.momentum else []

    def update(
        self, grads: Sequence[Tensor], state: Sequence[Tensor], params: Sequence[Tensor], step: int
    ) -> tuple[Leaves, Leaves]:
        lr = rate(self.lr, step)
        out, buffers = [], []
        for i, (g, p) in enumerate(zip(grads, params, strict=True)):
            b = state[i] if self.momentum and step > 0 else None
            change = sgd_change(
                g, p, b, lr, self.momentum, self.dampening, self.nesterov, self.weight_decay
            )
            out.append(p + change)
            if self.momentum:
                d = g + self.weight_decay * p if self.weight_decay else g
                # The first step takes the gradient as it is. It adds a zero, so that a derivative
                # by the state exists.
                buffers.append(
                    d + 0 * state[i] if b is None else self.momentum * b + (1 - self.dampening) * d
                )
        return out, buffers

    def settings(self, steps: int) -> str:
        rest = self.momentum, self.dampening, self.nesterov, self.weight_decay
        return f"sgd {rest} {rates(self.lr, steps)}"


@dataclass(frozen=True)
class Adam(Optimizer):
    """Made by `adam` and `adamw`."""

    lr: Schedule
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    slots = 2

    def init(self, params: Sequence[Tensor]) -> Leaves:
        return [torch.zeros_like(p) for p in params for _ in range(2)]

    def update(
        self, grads: Sequence[Tensor], state: Sequence[Tensor], params: Sequence[Tensor], step: int
    ) -> tuple[Leaves, Leaves]:
        lr = rate(self.lr, step)
        b1, b2 = self.betas
        out, moments = [], []
        for i, (g, p) in enumerate(zip(grads, params, strict=True)):
            m, v = state[2 * i], state[2 * i + 1]
            change = adam_change(
                g, p, m, v, step + 1, lr, self.betas, self.eps, self.weight_decay, self.decoupled
            )
            d = g + self.weight_decay * p if self.weight_decay and not self.decoupled else g
            out.append(p + change)
            moments += [b1 * m + (1 - b1) * d, b2 * v + (1 - b2) * d.square()]
        return out, moments

    def settings(self, steps: int) -> str:
        rest = self.betas, self.eps, self.weight_decay, self.decoupled
        return f"adam {rest} {rates(self.lr, steps)}"


@dataclass(frozen=True)
class Clipped(Optimizer):
    """Made by `clipped`."""

    inner: Optimizer
    max_norm: float

    @property
    def slots(self) -> int:  # type: ignore[override]
        return self.inner.slots

    def init(self, params: Sequence[Tensor]) -> Leaves:
        return self.inner.init(params)

    def update(
        self, grads: Sequence[Tensor], state: Sequence[Tensor], params: Sequence[Tensor], step: int
    ) -> tuple[Leaves, Leaves]:
        factor = clip_factor(grads, self.max_norm)
        return self.inner.update([factor * g for g in grads], state, params, step)

    def settings(self, steps: int) -> str:
        return f"clipped {self.max_norm} {self.inner.settings(steps)}"


def sgd(
    *,
    lr: Schedule,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Optimizer:
    """`torch.optim.SGD`, with the learning rate a number or a function of the steps taken."""
    _check_schedule(lr)
    check_not_negative("momentum", momentum)
    check_number("dampening", dampening)
    check_flags(nesterov=nesterov)
    check_not_negative("weight_decay", weight_decay)
    check_nesterov(nesterov, momentum, dampening)
    return SGD(lr, momentum, dampening, nesterov, weight_decay)


def adam(
    *,
    lr: Schedule,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """`torch.optim.Adam`, with the learning rate a number or a function of the steps taken.

    An entry whose gradients were all zero so far counts as not moved by its gradient: there the
    formula has no derivative.
    """
    return _adam(lr, betas, eps, weight_decay, decoupled=False)


def adamw(
    *,
    lr: Schedule,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Optimizer:
    """`torch.optim.AdamW`; otherwise as `adam`."""
    return _adam(lr, betas, eps, weight_decay, decoupled=True)


def _adam(
    lr: Schedule, betas: tuple[float, float], eps: float, weight_decay: float, *, decoupled: bool
) -> Optimizer:
    _check_schedule(lr)
    check_betas(betas)
    check_not_negative("eps", eps)
    check_not_negative("weight_decay", weight_decay)
    return Adam(lr, betas, eps, weight_decay, decoupled)


def clipped(optimizer: Optimizer, *, max_norm: float) -> Optimizer:
    """The optimizer after `torch.nn.utils.clip_grad_norm_`.

    update(g * min(1, max_norm / (||g|| + 1e-6)), state, params)
    """
    check_type("optimizer", optimizer, Optimizer, "one such as gf.unrolled.adam(lr=...)")
    check_positive("max_norm", max_norm, infinite=True)
    return Clipped(optimizer, max_norm)


def rate(lr: Schedule, step: int) -> float:
    """The learning rate of a step."""
    found: object = lr(step) if callable(lr) else lr
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()
    if not isinstance(found, Real) or not math.isfinite(found) or found < 0:
        raise OptionError(
            f"the learning rate of step {step} is {found!r}; it must be a finite number that is "
            "not negative."
        )
    return float(found)


def rates(lr: Schedule, steps: int) -> list[float]:
    return [rate(lr, t) for t in range(steps)]


def _check_schedule(lr: object) -> None:
    """Raise `OptionError` unless it is a learning rate, or a function of the steps taken."""
    if not callable(lr):
        check_not_negative("lr", lr)
