"""The next step of a `torch.optim` optimizer, as a pure update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ghostfunc._base.errors import OptionError, ParamsError
from ghostfunc._base.module import check_module
from ghostfunc._base.processes.dtensors import local
from ghostfunc._base.types import PyTree
from ghostfunc.shapley._formulas import DECOUPLED, FORMULAS, Change, kept, steps
from ghostfunc.shapley._optimizers import Optimizer, adam_change, sgd_change, sgd_gain

NO_DERIVATIVE = {
    "Rprop": "its step depends on the signs of the gradient alone, so its derivative is zero",
    "LBFGS": "a step of it evaluates the loss several times, and is no function of one gradient",
    "SparseAdam": "it takes sparse gradients, and ghostfunc makes dense ones: use Adam",
}
"""Optimizers of torch that are no differentiable function of a gradient, and why."""


def from_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module) -> Optimizer:
    """What `optimizer.step()` would do next, as a pure function of the gradient.

    Reads learning rates, decay and moments from the optimizer, every parameter with its own group's
    settings; nothing is changed. Call it anew before each step: schedulers and steps change what it
    reads, and the moments it holds are the optimizer's own memory.

    Args:
        optimizer: one of `torch.optim`: SGD, ASGD, Adam (AMSGrad too), AdamW, Adamax, NAdam,
            RAdam, RMSprop, Adagrad, Adadelta, Adafactor, Muon. Of a checkpoint's state
            (`optimizer.pt` of transformers), load it into the optimizer first.
        module: whose parameters it optimizes; their names are those of `gf.from_module`'s params.

    Returns:
        An `Optimizer` for params as `gf.from_module(module, ...)` gives them: of a module that
        `fully_shard` has sharded, for this rank's pieces. Where the running size of the gradient
        after the step is zero, as at a first step in `form="previous_state"`, an entry counts as
        not moved by the gradient.

    Raises:
        OptionError: another optimizer, or one whose step has no derivative (Rprop, LBFGS,
            SparseAdam): the message says why. Write the update yourself and pass
            `gf.shapley.Optimizer(update)`.
        ParamsError: a trainable parameter of the module is not in the optimizer.
    """
    check_module(module)
    kind = type(optimizer)
    _refuse_others(kind)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    changes: dict[str, Change] = {}
    gains: set[float | None] = set()
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) not in group_of:
            raise ParamsError(
                f"Parameter {name!r} of {type(module).__name__} is trainable but not in the "
                "optimizer. Freeze it (requires_grad_(False)) or add it to the optimizer."
            )
        held = optimizer.state.get(p, {}).items()
        # This rank's pieces of a sharded state: inside of a transform they could not be taken.
        state = {key: local(x) if isinstance(x, Tensor) else x for key, x in held}
        changes[name], gain = _RULES[kind](group_of[id(p)], state)
        gains.add(gain)

    def update(grads: PyTree, params: PyTree) -> PyTree:
        if not isinstance(params, Mapping) or any(name not in params for name in changes):
            raise ParamsError(
                f"optimizer is that of the parameters {', '.join(changes)} of a "
                f"{type(module).__name__}, and params are others. Pass those that "
                "gf.from_module(module, ...) gives."
            )
        return {name: change(grads[name], params[name]) for name, change in changes.items()}

    linear = None not in gains
    gain = gains.pop() if len(gains) == 1 else None
    return Optimizer(update, linear=linear, gain=gain, elementwise=kind not in DECOUPLED)


def _refuse_others(kind: type[torch.optim.Optimizer]) -> None:
    """Raise for optimizers whose step is not known."""
    if kind in _RULES:
        return
    name = kind.__qualname__
    own = kind.__module__.startswith("torch.optim")
    if own and name in NO_DERIVATIVE:
        why = f"torch.optim.{name} has no derivative to score by: {NO_DERIVATIVE[name]}."
    elif "8bit" in name or "4bit" in name:
        why = (
            f"{name} keeps its moments in a few bits each, which ghostfunc does not read. Unpack "
            "them into gf.shapley.adamw(exp_avg=..., exp_avg_sq=...), as far as it is that."
        )
    else:
        known = ", ".join(sorted(x.__name__ for x in _RULES))
        why = (
            f"optimizer: from_optimizer knows those of torch.optim ({known}), not "
            f"{kind.__module__}.{name}."
        )
    raise OptionError(
        f"{why} Else write its step as update(grads, params) -> changes and pass "
        "gf.shapley.Optimizer(update)."
    )


def _sgd(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[Change, float]:
    buffer = state.get("momentum_buffer")
    lr, sign = float(group["lr"]), -1.0 if group["maximize"] else 1.0
    settings = (group["momentum"], group["dampening"], group["nesterov"])

    def change(g: Tensor, p: Tensor) -> Tensor:
        return sgd_change(sign * g, p, buffer, lr, *settings, group["weight_decay"])

    return change, sign * sgd_gain(lr, *settings, first=buffer is None)


def _asgd(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[Change, float]:
    eta = float(
        state.get("eta", torch.tensor(float(group["lr"]), device="cpu"))
    )  # torch's own is in float32
    sign = -1.0 if group["maximize"] else 1.0
    decay = group["weight_decay"] + group["lambd"]

    def change(g: Tensor, p: Tensor) -> Tensor:
        return -eta * (sign * g + decay * p)

    return change, -eta * sign


def _adam(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[Change, None]:
    sign = -1.0 if group["maximize"] else 1.0
    b1, b2 = (float(b) for b in group["betas"])
    lr, eps, decay = float(group["lr"]), group["eps"], group["weight_decay"]
    decoupled, t = group["decoupled_weight_decay"], steps(state)

    def change(g: Tensor, p: Tensor) -> Tensor:
        m, v = kept(state, "exp_avg", p), kept(state, "exp_avg_sq", p)
        most = kept(state, "max_exp_avg_sq", p) if group["amsgrad"] else None
        return adam_change(sign * g, p, m, v, t, lr, (b1, b2), eps, decay, decoupled, most)

    return change, None


def _by_formula(
    kind: type[torch.optim.Optimizer], group: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[Change, None]:
    """An optimizer that is a formula, with weight decay and the sign of the gradient."""
    formula = FORMULAS[kind](group, state)
    sign = -1.0 if group.get("maximize", False) else 1.0
    decoupled = kind in DECOUPLED or group.get("decoupled_weight_decay", False)
    decay, lr = group["weight_decay"], float(group["lr"])

    def change(g: Tensor, p: Tensor) -> Tensor:
        if not decay:
            return formula(sign * g, p)
        if not decoupled:
            return formula(sign * g + decay * p, p)
        return formula(sign * g, p) - lr * decay * p

    return change, None


_Rule: TypeAlias = Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[Change, float | None]]
_RULES: dict[type[torch.optim.Optimizer], _Rule] = {
    torch.optim.SGD: _sgd,
    torch.optim.ASGD: _asgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    **{kind: partial(_by_formula, kind) for kind in FORMULAS},
}
