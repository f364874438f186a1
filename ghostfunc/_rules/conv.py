"""Convolutions: a matrix product of the kernel with patches.

A convolution gathers: `g_i = sum_t b_it patch(x)_it^T` over output positions t. A transposed
convolution scatters: `g_i = sum_t x_it patch(b)_it^T` over input positions. Groups of channels are
groups of products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc import _cost
from ghostfunc._factors import Dense, Factor, Grouped, Outer, wide
from ghostfunc._rules._registry import Factors, register_rule

Patches = Callable[[Tensor], Tensor]


def kernel_factor(rows: Tensor, columns: Tensor, groups: int, patches: Patches) -> Factor:
    """The factor of a kernel `[rows, columns / groups, *kernel]`, whichever form is smallest.

    Args:
        rows: `[n, batch, rows, *positions]`.
        columns: `[n, batch, columns, *spatial]`, of which `patches` makes
            `[n, batch, columns, *positions, *kernel]`.
    """
    dims = rows.ndim - 3

    def left(block: slice) -> Tensor:
        """`[n, groups, t, p]`"""
        y = rows[block].flatten(3).unflatten(2, (groups, -1))
        return y.permute(0, 2, 1, 4, 3).flatten(2, 3)

    def right(block: slice) -> Tensor:
        """`[n, groups, t, d]`"""
        y = patches(columns[block]).unflatten(2, (groups, -1)).flatten(4, 3 + dims).flatten(5)
        return y.permute(0, 2, 1, 4, 3, 5).flatten(2, 3).flatten(3)

    one, everything = slice(0, 1), slice(None)
    (_, _, t, p), d = left(one).shape, right(one).shape[-1]
    if p * d > t * (p + d):
        if groups == 1:
            return Outer(left(everything)[:, 0], right(everything)[:, 0])
        return Grouped(left(everything), right(everything))
    # Patches are larger than what they are patches of: never all of them at once.
    step = _cost.samples_per_block(len(rows), groups * t * d)
    blocks = [slice(i, i + step) for i in range(0, len(rows), step)]
    return Dense(torch.cat([wide(left(s)).mT @ wide(right(s)) for s in blocks]))


def _patches(
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[tuple[int, int]],
    positions: Sequence[int],
) -> Patches:
    """`[..., *spatial]` to `[..., *positions, *kernel]`: a padded view."""
    pad = [x for pair in reversed(padding) for x in pair]

    def patches(x: Tensor) -> Tensor:
        x = F.pad(x, pad) if any(pad) else x
        first = x.ndim - len(kernel)
        for i, (k, s, d, t) in enumerate(zip(kernel, stride, dilation, positions, strict=True)):
            x = x.unfold(first + i, d * (k - 1) + 1, s)[..., ::d].narrow(first + i, 0, t)
        return x

    return patches


def _each(x: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """One number per spatial axis; torch takes one for all."""
    numbers = (x,) if isinstance(x, int) else tuple(x)
    return numbers * dims if len(numbers) == 1 else numbers


def _factors(dims: int, b: Tensor, of_weight: Callable[[], Factor]) -> Factors:
    def of_bias() -> Dense:
        return Dense(wide(_batched(b, dims)).flatten(3).sum((1, 3)))

    return {"weight": of_weight, "bias": of_bias}


def _batched(x: Tensor, dims: int) -> Tensor:
    """`[n, batch, channels, *spatial]`; a call without a batch is a batch of one."""
    return x if x.ndim == dims + 3 else x[:, None]


def _sides(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """What is added before and after each spatial axis."""
    if padding == "valid":
        return [(0, 0) for _ in kernel]
    if padding == "same":  # the odd one of an odd number goes to the end
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(x // 2, x - x // 2) for x in total]
    return [(x, x) for x in _each(padding, len(kernel))]


@register_rule(F.conv1d, F.conv2d, F.conv3d)
def conv(
    b: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Factors:
    kernel = weight.shape[3:]
    dims = len(kernel)

    def of_weight() -> Factor:
        rows = _batched(b, dims)
        spread = _each(dilation, dims)
        patches = _patches(
            kernel, _each(stride, dims), spread, _sides(padding, kernel, spread), rows.shape[3:]
        )
        return kernel_factor(rows, _batched(input, dims), groups, patches)

    return _factors(dims, b, of_weight)


@register_rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def conv_transpose(
    b: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Factors:
    kernel = weight.shape[3:]
    dims = len(kernel)

    def of_weight() -> Factor:
        rows = _batched(input, dims)
        sides = _sides(padding, kernel, ())
        patches = _patches(
            kernel, _each(stride, dims), _each(dilation, dims), sides, rows.shape[3:]
        )
        return kernel_factor(rows, _batched(b, dims), groups, patches)

    return _factors(dims, b, of_weight)
