"""Which derivatives an op has: what autograd can do with what is made of parameters by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ghostfunc._base.torch_private import in_transform
from ghostfunc._base.trees import tensors_of
from ghostfunc._trace.tracked import CallArgs


def has_derivative(func: Callable[..., Any], call: CallArgs) -> bool:
    """Whether autograd connects what an op returns with what it is given. Inside transforms, which
    do not say whether it does, the answer is yes."""
    if in_transform():
        return True
    with torch.random.fork_rng():
        out = call.run(func, [x.detach().requires_grad_() for x in call.consts()])
    nodes = [x.grad_fn for x in tensors_of(out) if x.requires_grad]
    return any(node is None or type(node).__name__ != "NotImplemented" for node in nodes)


def has_second_derivative(func: Callable[..., Any], call: CallArgs) -> bool:
    """Whether autograd also knows how the gradient of an op depends on the cotangent of its output.
    Some ops have no such derivative and raise. Others make their gradient where autograd does not
    see it, and autograd takes that gradient for a constant."""
    if in_transform():
        return True
    if any(x.layout != torch.strided for x in call.consts()):
        return False
    inputs = [x.detach().requires_grad_() for x in call.consts()]
    with torch.random.fork_rng():
        outs = [x for x in tensors_of(call.run(func, inputs)) if x.requires_grad]
    if any(x.layout != torch.strided for x in outs):
        return False
    b = [torch.ones_like(x, requires_grad=True) for x in outs]
    try:
        pulled: tuple[Tensor | None, ...] = torch.autograd.grad(
            outs, inputs, b, create_graph=True, allow_unused=True
        )
        met: list[Tensor] = [g for g in pulled if g is not None]
        moving = [g for g in met if g.requires_grad]
        torch.autograd.grad(moving, b, list(map(torch.zeros_like, moving)), allow_unused=True)
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        return False
    return all(g.requires_grad or not bool(g.any()) for g in met)
