"""What the transforms of `torch.func`, and others that look on, do not say in public."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def in_transform() -> bool:
    """Whether a `torch.func` transform is at work around us."""
    active: bool = torch._C._functorch.peek_interpreter_stack() is not None
    return active


def watched() -> bool:
    """Whether what is computed now is derived or recorded by more than plain autograd."""
    return (
        in_transform()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None  # torch.jit
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None  # make_fx
    )


def depth() -> int:
    """How many `torch.func` transforms are at work around us."""
    interpreter: Any = torch._C._functorch.peek_interpreter_stack()
    return 0 if interpreter is None else int(interpreter.level())


def address(x: Tensor) -> int:
    """Where the memory of a tensor begins; tensors with a common one are views of each other."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.untyped_storage().data_ptr()
