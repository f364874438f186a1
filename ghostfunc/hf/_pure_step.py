"""The step that a trainer's optimizer takes, as a pure update."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import Trainer

from ghostfunc._base.errors import OptionError, ParamsError
from ghostfunc._base.types import PyTree
from ghostfunc.hf._micro_batch import Form
from ghostfunc.shapley import Optimizer, clipped, from_optimizer, sgd


def pure_step(trainer: Trainer, module: nn.Module, form: Form) -> Optimizer:
    """The update that scores go through: SGD's with the present learning rates, or the
    optimizer's own from its present state ("exact": after the clipping)."""
    held: Any = cast(Any, trainer.optimizer).optimizer  # accelerate wraps it
    if form == "sgd":
        return _sgd(held, module)
    own = _own(held, module, form)
    clips = form == "exact" and trainer.args.max_grad_norm > 0
    return clipped(own, max_norm=trainer.args.max_grad_norm) if clips else own


def _own(held: Any, module: nn.Module, form: Form) -> Optimizer:
    try:
        return from_optimizer(held, module)
    except OptionError as error:
        raise OptionError(
            f"score_form={form!r} scores by the step that the optimizer takes. {error} That is for "
            'gf.shapley.step in a loop of your own; here score_form="sgd" takes the learning rates '
            "of any optimizer."
        ) from error


def _rate(group: dict[str, Any]) -> float:
    rate = group["lr"]
    if rate is None:
        raise OptionError(
            "The optimizer has no learning rate of its own (lr=None, as of an Adafactor with "
            'relative steps): score_form="sgd" has none to weigh by. Give it one.'
        )
    return -float(rate) if group.get("maximize") else float(rate)


def _sgd(held: Any, module: nn.Module) -> Optimizer:
    """`-lr g`, with the learning rate of each parameter's own group; zero for those of none, which
    stay where they are."""
    rate_of = {id(p): _rate(group) for group in held.param_groups for p in group["params"]}
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if trained and not any(id(p) in rate_of for p in trained.values()):
        raise ParamsError(
            f"None of the {len(trained)} trainable parameters of {type(module).__name__} is in the "
            "optimizer: it moves none of them. create_optimizer has to take them from the model "
            "that is trained (self.model)."
        )
    named = {name: rate_of.get(id(p), 0.0) for name, p in trained.items()}
    rates = set(named.values())
    if len(rates) == 1 and min(rates) >= 0:
        return sgd(lr=rates.pop())

    def change(grads: PyTree, params: PyTree) -> PyTree:
        return {name: -named[name] * g for name, g in grads.items()}

    return Optimizer(change, linear=True)
