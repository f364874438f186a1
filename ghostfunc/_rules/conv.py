"""Convolutions: a matrix product of the kernel with patches.

A convolution gathers: `g_i = sum_t b_it patch(x)_it^T` over output positions t. A transposed
convolution scatters: `g_i = sum_t x_it patch(b)_it^T` over input positions. Groups of channels are
groups of products. A kernel's gradient that is smaller than its factors is formed at once, sample
by sample, with torch's own kernel, unless its positions are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._factors.factor import Dense, Factor, Grouped, Outer
from ghostfunc._rules.registry import FactorMakers, TwoForms, register_rule


def _kernel_factor(
    rows: Tensor,
    columns: Tensor,
    groups: int,
    patches: Callable[[Tensor], Tensor],
    dense: Callable[[], Tensor],
    by_position: bool,
) -> Factor:
    """The factor of a kernel `[rows, columns / groups, *kernel]`, in whichever form is smallest.

    Args:
        rows: `[n, batch, rows, *positions]`.
        columns: `[n, batch, columns, *spatial]`, of which `patches` makes
            `[n, batch, columns, *kernel, *positions]`.
        dense: makes the gradient itself, `[n, *shape]`.
        by_position: never form the gradient.
    """
    dims = rows.ndim - 3
    left = _grouped(rows, groups, 0, dims)
    kernel = patches(columns[:1]).shape[3 : 3 + dims].numel()
    t, p, d = left.shape[2], left.shape[3], columns.shape[2] // groups * kernel
    if not by_position and p * d <= t * (p + d):
        return Dense(dense())
    right = _grouped(patches(columns), groups, dims, dims)
    return Outer(left[:, 0], right[:, 0]) if groups == 1 else Grouped(left, right)


def _grouped(x: Tensor, groups: int, inner: int, dims: int) -> Tensor:
    """`[n, batch, channels, *inner, *positions]` as `[n, groups, t, channels * inner / groups]`."""
    n, batch = x.shape[:2]
    x = x.unflatten(2, (groups, -1)).transpose(1, 2)  # [n, groups, batch, channels, ...]
    width = x.shape[3 : 4 + inner].numel()
    if batch == 1:  # the positions stay last in memory: a view, or one copy
        return x.reshape(n, groups, width, -1).mT
    return x.reshape(n, groups, batch, width, -1).mT.reshape(n, groups, -1, width)


def _patches(
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[tuple[int, int]],
    positions: Sequence[int],
) -> Callable[[Tensor], Tensor]:
    """From `[..., *spatial]` to `[..., *kernel, *positions]`, a padded view."""
    pad = [x for pair in reversed(padding) for x in pair]
    dims = len(kernel)

    def patches(x: Tensor) -> Tensor:
        x = F.pad(x, pad) if any(pad) else x
        first = x.ndim - dims
        for i, (k, s, d, t) in enumerate(zip(kernel, stride, dilation, positions, strict=True)):
            x = x.unfold(first + i, d * (k - 1) + 1, s)[..., ::d].narrow(first + i, 0, t)
        return x.movedim(tuple(range(-dims, 0)), tuple(range(first, first + dims)))

    return patches


def _sample_by_sample(
    b: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int] | None,
    groups: int,
) -> Tensor:
    """The kernel's gradient, `[n, *shape]`; of a transposed convolution with `output_padding`."""
    transposed = output_padding is not None
    only_weight = [False, True, False]
    return torch.stack(
        [
            torch.ops.aten.convolution_backward(
                cotangent,
                x,
                w,
                None,
                stride,
                padding,
                dilation,
                transposed,
                output_padding or [0] * len(stride),
                groups,
                only_weight,
            )[1]
            for cotangent, x, w in zip(wide(b), wide(input), wide(weight), strict=True)
        ]
    )


def _each(x: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """One number per spatial axis; torch takes one for all."""
    numbers = (x,) if isinstance(x, int) else tuple(x)
    return numbers * dims if len(numbers) == 1 else numbers


def _factors(dims: int, b: Tensor, of_weight: Callable[..., Factor]) -> FactorMakers:
    def of_bias() -> Dense:
        return Dense(wide(_batched(b, dims)).flatten(3).sum((1, 3)))

    of_kernel = TwoForms(of_weight, partial(of_weight, by_position=True))
    return {"weight": of_kernel, "bias": of_bias}


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
) -> FactorMakers:
    kernel = weight.shape[3:]
    dims = len(kernel)

    def of_weight(by_position: bool = False) -> Factor:
        rows, x = _batched(b, dims), _batched(input, dims)
        step, spread = _each(stride, dims), _each(dilation, dims)
        sides = _sides(padding, kernel, spread)

        def dense() -> Tensor:
            even = all(before == after for before, after in sides)
            padded = x if even else F.pad(x, [n for pair in reversed(sides) for n in pair])
            pad = [before if even else 0 for before, _ in sides]
            return _sample_by_sample(rows, padded, weight, step, pad, spread, None, groups)

        patches = _patches(kernel, step, spread, sides, rows.shape[3:])
        return _kernel_factor(rows, x, groups, patches, dense, by_position)

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
) -> FactorMakers:
    kernel = weight.shape[3:]
    dims = len(kernel)

    def of_weight(by_position: bool = False) -> Factor:
        rows, columns = _batched(input, dims), _batched(b, dims)
        step, spread, pad = (_each(x, dims) for x in (stride, dilation, padding))

        def dense() -> Tensor:
            extra = _each(output_padding, dims)
            return _sample_by_sample(columns, rows, weight, step, pad, spread, extra, groups)

        patches = _patches(kernel, step, spread, [(x, x) for x in pad], rows.shape[3:])
        return _kernel_factor(rows, columns, groups, patches, dense, by_position)

    return _factors(dims, b, of_weight)
