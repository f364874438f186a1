"""Products of large float32 matrices on processors, by the faster of torch's two libraries.

torch multiplies float32 matrices by MKL. On processors of AMD's, MKL leaves half of the width of
AVX-512 unused; oneDNN, which torch has besides it for convolutions, bfloat16 and compiled programs,
uses all of it and takes half of the time, to the same accuracy. There, products of this package go
to oneDNN; those of the model stay what they are.

`torch.backends.mkldnn.set_flags(False)` has everything multiplied by MKL, and
`torch.set_float32_matmul_precision` means to both what it says.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor, nn

from ghostfunc._functorch import in_transform

SPEED = 2
"""How many times as fast oneDNN is, where it is chosen."""

LEAST = 1 << 25
"""Multiplications of a product that is worth it. For a shape that it has not met lately oneDNN
writes code first, in 0.2 to 0.6 ms: from here on that is no more than what it saves at once."""

NARROW = 32
"""Rows, columns or terms below which oneDNN gains nothing."""

COPIED = 256
"""Columns of a product that is worth a copy of its first factor, where that is not there by rows."""

_PLAIN = (Tensor, nn.Parameter)


def product(x: Tensor, y: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`x @ y`, put into `out` where that is given."""
    if not chosen():
        return torch.matmul(x, y, out=out)
    if x.ndim == 3 and y.ndim == 2 and out is None and x.is_contiguous() and by_onednn(x, y):
        return _onednn(x.flatten(0, 1), y).unflatten(0, x.shape[:2])
    if x.ndim == y.ndim == 3 and len(x) == len(y) and by_onednn(x, y):
        out = x.new_empty(len(x), x.shape[1], y.shape[2]) if out is None else out
        for a, b, place in zip(x, y, out, strict=True):
            place.copy_(_onednn(a, b))
        return out
    if x.ndim == y.ndim == 2 and by_onednn(x, y):
        return _onednn(x, y) if out is None else out.copy_(_onednn(x, y))
    return torch.matmul(x, y, out=out)


def add_product(into: Tensor, x: Tensor, y: Tensor) -> None:
    """`into += x @ y`, of matrices."""
    if by_onednn(x, y):
        into.add_(_onednn(x, y))
    else:
        into.addmm_(x, y)


def by_onednn(x: Tensor, y: Tensor) -> bool:
    """Whether these matrices, or each of a stack of them, are multiplied by oneDNN: they are large,
    plain tensors of float32 values, and nobody wants derivatives of the product."""
    (m, k), n = x.shape[-2:], y.shape[-1]
    return (
        chosen()
        and all(type(t) in _PLAIN and t.dtype is torch.float32 and t.is_cpu for t in (x, y))
        and m * k * n >= LEAST
        and min(m, k, n) >= NARROW
        and (x.stride(-1) == 1 or n >= COPIED)
        and not in_transform()
        and not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))
    )


def _onednn(x: Tensor, y: Tensor) -> Tensor:
    """Rows of x are copied unless they lie one after the other; y is read by rows or columns."""
    if not (y.is_contiguous() or y.mT.is_contiguous()):
        y = y.contiguous()  # with gaps it would take hundreds of times as long
    return torch.ops.mkldnn._linear_pointwise(x, y.mT, None, "none", [], "")


def chosen() -> bool:
    """Whether large products go to oneDNN."""
    return _is_faster() and torch._C._get_mkldnn_enabled()


def speed(x: Tensor) -> int:
    """How many times as fast as by MKL large products of tensors like `x` are, for `_cost`."""
    return SPEED if chosen() and x.is_cpu and x.dtype != torch.float64 else 1


@functools.cache
def _is_faster() -> bool:
    backends = torch.backends
    return (
        backends.mkl.is_available()
        and backends.mkldnn.is_available()
        and torch._C._dispatch_has_kernel("mkldnn::_linear_pointwise")
        and backends.cpu.get_cpu_capability() == "AVX512"
        and _made_by_amd()
    )


def _made_by_amd() -> bool:
    told = platform.processor()  # the maker on Windows; on Linux the architecture, or nothing
    cpuinfo = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (told + cpuinfo.read_text() if cpuinfo.exists() else told)
