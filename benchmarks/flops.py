"""Floating-point operations of products, by the formulas of `torch.utils.flop_counter`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

aten = torch.ops.aten


class CountFlops(TorchDispatchMode):
    """Counts in `total`. torch's own `FlopCounterMode` calls torch functions in hooks on modules,
    which a run under `TorchFunctionMode` takes for calls of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = _IN_PLACE.get(func.overloadpacket, func.overloadpacket)
        if packet in _OF_CPUS:
            self.total += _OF_CPUS[packet](*args)
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


def _attention(q: Any, k: Any, v: Any, *_: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


def _linear(x: Any, weight: Any, *_: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


_OF_CPUS: dict[Any, Callable[..., int]] = {
    torch.ops.mkldnn._linear_pointwise: _linear,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Kernels of processors that the registry of torch 2.13 leaves out."""

_IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}
"""Products that it knows under another name."""
