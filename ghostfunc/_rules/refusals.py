"""What a model may not do to its own gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ghostfunc._base.errors import TransformError
from ghostfunc._base.refusals import refuse


@refuse(Tensor.register_hook)
def check_hook(input: Tensor, hook: Any) -> None:
    raise TransformError(
        "model_fn registers a hook on a tensor, which may change gradients where no transform sees "
        "it. Register no hook in model_fn; write a change of gradients as a function, such as "
        "x * c + (x * (1 - c)).detach()."
    )
