"""What the transforms of `torch.func` that are at work around us do not say in public."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def in_transform() -> bool:
    """Whether a `torch.func` transform is at work around us."""
    active: bool = torch._C._functorch.peek_interpreter_stack() is not None
    return active


def depth() -> int:
    """How many `torch.func` transforms are at work around us."""
    interpreter: Any = torch._C._functorch.peek_interpreter_stack()
    return 0 if interpreter is None else int(interpreter.level())


def address(x: Tensor) -> int:
    """Where the memory of a tensor begins; tensors with a common one are views of each other."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.untyped_storage().data_ptr()
