"""The step that a trainer's optimizer takes, as a pure update."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import Trainer

from ghostfunc._base.types import PyTree
from ghostfunc.hf._scoring import Form
from ghostfunc.shapley import Optimizer, clipped, from_optimizer, sgd


def pure_step(trainer: Trainer, module: nn.Module, form: Form) -> Optimizer:
    """The update that scores go through: SGD's with the present learning rates, or the
    optimizer's own from its present state ("exact": after the clipping)."""
    held: Any = cast(Any, trainer.optimizer).optimizer  # accelerate wraps it
    if form == "sgd":
        return _sgd(held, module)
    own = from_optimizer(held, module)
    clips = form == "exact" and trainer.args.max_grad_norm > 0
    return clipped(own, max_norm=trainer.args.max_grad_norm) if clips else own


def _sgd(held: Any, module: nn.Module) -> Optimizer:
    """`-lr g`, with the learning rate of each parameter's own group."""
    rates = {float(group["lr"]) for group in held.param_groups}
    if len(rates) == 1:
        return sgd(lr=rates.pop())
    rate_of = {id(p): float(group["lr"]) for group in held.param_groups for p in group["params"]}
    named = {name: rate_of[id(p)] for name, p in module.named_parameters() if id(p) in rate_of}

    def change(grads: PyTree, params: PyTree) -> PyTree:
        return {name: -named.get(name, 0.0) * g for name, g in grads.items()}

    return Optimizer(change, linear=True)
