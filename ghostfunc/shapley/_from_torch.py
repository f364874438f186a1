"""The next step of a `torch.optim` optimizer, as a pure update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ghostfunc._base.errors import OptionError, ParamsError
from ghostfunc._base.module import check_module
from ghostfunc._base.types import PyTree
from ghostfunc.shapley._optimizers import Optimizer, adam_change, sgd_change, sgd_gain

Change = Callable[[Tensor, Tensor], Tensor]


def from_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module) -> Optimizer:
    """What `optimizer.step()` would do next, as a pure function of the gradient.

    Reads learning rates, decay and moments from the optimizer, every parameter with its own group's
    settings; nothing is changed. Call it anew before each step: schedulers and steps change what it
    reads, and the moments it holds are the optimizer's own memory.

    Args:
        optimizer: a `torch.optim.SGD`, `Adam` or `AdamW`.
        module: whose parameters it optimizes; their names are those of `gf.from_module`'s params.

    Returns:
        An `Optimizer` for params as `gf.from_module(module, ...)` gives them.

    Raises:
        OptionError: another optimizer, `amsgrad` or complex parameters. Write the update yourself
            and pass `gf.shapley.Optimizer(update)`.
        ParamsError: a trainable parameter of the module is not in the optimizer.
    """
    check_module(module)
    kind = type(optimizer)
    if kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        raise OptionError(
            "optimizer: from_optimizer knows torch.optim.SGD, Adam and AdamW, not "
            f"{kind.__qualname__}. Write its step as update(grads, params) -> changes and pass "
            "gf.shapley.Optimizer(update)."
        )
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
        group, state = group_of[id(p)], optimizer.state.get(p, {})
        rule = _sgd if kind is torch.optim.SGD else _adam
        changes[name], gain = rule(group, state)
        gains.add(gain)

    def update(grads: PyTree, params: PyTree) -> PyTree:
        return {name: change(grads[name], params[name]) for name, change in changes.items()}

    linear = None not in gains
    return Optimizer(update, linear=linear, gain=gains.pop() if len(gains) == 1 else None)


def _sgd(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[Change, float]:
    buffer = state.get("momentum_buffer")
    lr, sign = float(group["lr"]), -1.0 if group["maximize"] else 1.0
    settings = (group["momentum"], group["dampening"], group["nesterov"])

    def change(g: Tensor, p: Tensor) -> Tensor:
        return sgd_change(sign * g, p, buffer, lr, *settings, group["weight_decay"])

    return change, sign * sgd_gain(lr, *settings, first=buffer is None)


def _adam(group: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[Change, None]:
    if group["amsgrad"]:
        raise OptionError(
            "amsgrad=True is not built in. Write the step as update(grads, params) -> changes and "
            "pass gf.shapley.Optimizer(update)."
        )
    sign = -1.0 if group["maximize"] else 1.0
    b1, b2 = (float(b) for b in group["betas"])
    lr, eps, decay = float(group["lr"]), group["eps"], group["weight_decay"]
    decoupled, t = group["decoupled_weight_decay"], int(state.get("step", 0)) + 1

    def change(g: Tensor, p: Tensor) -> Tensor:
        m, v = (state.get(key, torch.zeros_like(p)) for key in ("exp_avg", "exp_avg_sq"))
        return adam_change(sign * g, p, m, v, t, lr, (b1, b2), eps, decay, decoupled)

    return change, None
