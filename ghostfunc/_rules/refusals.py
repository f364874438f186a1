"""What a model may not do to its own gradients, and whom it may not ask for samples."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ghostfunc._base.errors import TransformError
from ghostfunc._base.refusals import REFUSED, refuse, refuse_collective


@refuse(Tensor.register_hook)
def check_hook(input: Tensor, hook: Any) -> None:
    raise TransformError(
        "model_fn registers a hook on a tensor, which may change gradients where no transform sees "
        "it. Register no hook in model_fn; write a change of gradients as a function, such as "
        "x * c + (x * (1 - c)).detach()."
    )


def check_collective(name: str, *args: Any, **kwargs: Any) -> None:
    refuse_collective(f"torch.distributed.{name}")


_COLLECTIVES = (
    "all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "gather",
    "scatter", "reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single",
    "send", "recv", "isend", "irecv",
)  # fmt: skip
"""First runs see their ops; later ones, whose way may have changed, see the functions."""

if torch.distributed.is_available():
    REFUSED.update(
        {getattr(torch.distributed, name): partial(check_collective, name) for name in _COLLECTIVES}
    )
