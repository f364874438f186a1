"""Products of factors, at the speed of the hardware: the one place where matrices are multiplied.

**On GPUs** factors in half precision are multiplied as they are, by tensor cores, and added up in
float32: `torch.mm(..., out_dtype=torch.float32)`. A product of two such numbers fits into float32,
so nothing is rounded that would not be if both were widened first. Factors in float32 are
multiplied in float32; `torch.set_float32_matmul_precision("high")` allows torch to round them to
TF32 (10 bits, errors of 1e-3) here as in the model.

**On processors** large float32 matrices go to the faster of torch's two libraries.

torch multiplies float32 matrices by MKL. On processors of AMD's, MKL leaves half of the width of
AVX-512 unused; oneDNN, which torch has besides it for convolutions, bfloat16 and compiled programs,
uses all of it and takes half of the time, to about the same accuracy. There, products of factors go
to oneDNN; those of the model stay what they are.

**Inner products of gradients** are cut into pieces. A matrix library adds up the terms of one inner
product nearly one after the other: of two million terms of one sign float32 then keeps four digits,
of sixteen million three. Each piece is a product of its own, and torch adds up their sums in pairs.

`torch.backends.mkldnn.set_flags(False)` has everything multiplied by MKL, and
`torch.set_float32_matmul_precision` means to both what it says.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._base.torch_private import (
    PLAIN,
    has_onednn_linear,
    known,
    onednn_allowed,
    onednn_linear,
    unrounded,
    watched,
)
from ghostfunc._base.types import ContractDtype
from ghostfunc._factors import cost

SPEED = 2
"""How many times as fast oneDNN is, where it is chosen."""

LEAST_OPS = 1 << 25
"""Multiplications of a product that is worth it. For a shape that it has not met lately oneDNN
writes code first, in 0.2 to 0.6 ms: from here on that is no more than what it saves at once."""

LEAST_SIZE = 32
"""Rows, columns or terms below which oneDNN gains nothing."""

OPS_PER_COPIED_ELEMENT = 256
"""Multiplications that are worth it to copy an element to another place in its row or column."""

PIECE = 1 << 9
"""Elements of a piece: its inner product has an error of a few roundings. Roundings of equal terms,
which the gradient of a mean has, all go the same way, so a piece is short."""

LARGE_PIECE = 1 << 17
"""The same where there are many vectors on both sides: matrix libraries cut those products, too."""

FEW_VECTORS = 32
"""Vectors of a side below which matrix libraries add up one product after the other."""

LONG = 1 << 15
"""Elements below which a vector is left whole: errors are not yet worth the calls."""

FEW_PIECES = 4
"""Pieces that are not worth the calls, either."""

TABLE_ELEMENTS = 1 << 20
"""Elements of all pieces' sums together. Where more would be needed there are fewer pieces."""

_HALVES = (torch.bfloat16, torch.float16)


def product(x: Tensor, y: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`x @ y`, contiguous; put into `out` where that is given."""
    if torch.is_autocast_enabled(x.device.type):
        with unrounded(x):
            return product(x, y, out=out)
    if x.ndim == 3 and y.ndim == 2 and out is None and x.stride(-1) == 1 and by_onednn(x, y):
        return _onednn(x.flatten(0, 1), y).unflatten(0, x.shape[:2])
    if x.ndim not in (2, 3) or x.ndim != y.ndim or not by_onednn(x, y):
        return torch.matmul(x, y, out=out)
    if x.ndim == 2 and out is None:
        return _onednn(x, y)
    out = x.new_empty(*x.shape[:-1], y.shape[-1]) if out is None else out
    for a, b, whole in zip(x, y, out, strict=True) if x.ndim == 3 else [(x, y, out)]:
        for rows in cost.row_blocks(*whole.shape):
            whole[rows].copy_(_onednn(a[rows], b))
    return out


def add_product(into: Tensor, x: Tensor, y: Tensor) -> None:
    """`into += x @ y`, of matrices."""
    if torch.is_autocast_enabled(x.device.type):
        with unrounded(x):
            return add_product(into, x, y)
    if _as_they_are(x, y):
        into.add_(_of_halves(x, y))
        return None
    x, y = wide(x), wide(y)
    if not by_onednn(x, y):
        into.addmm_(x, y)
        return None
    for rows in cost.row_blocks(*into.shape):  # the product by itself is larger than the caches
        into[rows].add_(_onednn(x[rows], y))
    return None


def by_onednn(x: Tensor, y: Tensor) -> bool:
    """Whether these matrices, or each of a stack of them, are multiplied by oneDNN: they are large,
    float32, and nobody wants derivatives of the product."""
    if not (x.dtype is y.dtype is torch.float32 and _can(x, y)):
        return False
    (m, k), n = x.shape[-2:], y.shape[-1]
    return (
        k == y.shape[-2]
        and (y.ndim == 2 or len(x) == len(y))
        and m * k * n >= max(LEAST_OPS, OPS_PER_COPIED_ELEMENT * _copied(x, y))
        and min(m, k, n) >= LEAST_SIZE
        and not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))
    )


def onednn_speed(x: Tensor) -> int:
    """How many times as fast as by MKL large products of tensors like `x` are, for `cost`."""
    return SPEED if _can(x) and x.dtype is not torch.float64 else 1


def chosen() -> bool:
    """Whether large products go to oneDNN."""
    return not torch.compiler.is_dynamo_compiling() and onednn_allowed() and _is_faster()


def _can(*tensors: Tensor) -> bool:
    """Whether tensors are values in the processor's memory, and no more than that."""
    return chosen() and all(type(x) in PLAIN and x.is_cpu for x in tensors) and not watched()


def _copied(x: Tensor, y: Tensor) -> int:
    """Elements that change their places first: oneDNN wants x by rows. Where it is by columns, the
    transposed product may be cheaper, which wants y by columns and comes out by columns."""
    (m, k), n = x.shape[-2:], y.shape[-1]
    return 0 if x.stride(-1) == 1 else min(m * k, n * (m + k))


def _onednn(x: Tensor, y: Tensor) -> Tensor:
    (m, k), n = x.shape, y.shape[1]
    if x.stride(-1) != 1 and n * (m + k) < m * k:
        return _linear(y.mT, x).mT.contiguous()
    return _linear(x, y.mT)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.mT`. The op copies x unless it is contiguous; weights lie by rows or columns."""
    if not (weight.is_contiguous() or weight.mT.is_contiguous()):
        weight = weight.contiguous()  # with gaps it would take hundreds of times as long
    return onednn_linear(x, weight)


@functools.cache
def _is_faster() -> bool:
    backends = torch.backends
    return (
        backends.mkl.is_available()
        and backends.mkldnn.is_available()
        and has_onednn_linear()
        and backends.cpu.get_cpu_capability() == "AVX512"
        and _made_by_amd()
    )


def _made_by_amd() -> bool:
    if platform.system() == "Windows":
        return "AuthenticAMD" in platform.processor()
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False


def matmul(x: Tensor, y: Tensor, contract_dtype: ContractDtype = None) -> Tensor:
    """`x @ y`, float32 or wider.

    With a `contract_dtype` the operands are rounded to it; products are added up in float32, and
    the sums are rounded to it once more (torch has no other such product for processors). float16
    has few exponents: rows of x and columns of y are scaled to length 1 for it, so that no sum
    exceeds 1; those shorter than 1e-19 read as zero.
    """
    if contract_dtype is None:
        return _of_halves(x, y) if _as_they_are(x, y) else product(wide(x), wide(y))
    if contract_dtype is torch.float16:
        x, y = wide(x), wide(y)
        row, column = _lengths(x, -1), _lengths(y, -2)
        rounded = (x / row).to(contract_dtype) @ (y / column).to(contract_dtype)
        return rounded.to(x.dtype) * row * column
    rounded = x.to(contract_dtype) @ y.to(contract_dtype)
    return rounded.to(torch.promote_types(wide(x).dtype, wide(y).dtype))


def _as_they_are(x: Tensor, y: Tensor) -> bool:
    """Whether matrices in half precision are multiplied without being widened: nobody wants
    derivatives of the product, which torch does not have."""
    return (
        x.dtype is y.dtype
        and x.dtype in _HALVES
        and _has_wide_sums(x)
        and x.ndim in (2, 3)
        and y.ndim in (2, x.ndim)
        and not watched()
        and not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))
    )


def _has_wide_sums(x: Tensor) -> bool:
    """Whether torch adds up products of tensors like `x` in float32, and returns the sums."""
    return x.is_cuda and type(x) in PLAIN


def _of_halves(x: Tensor, y: Tensor) -> Tensor:
    """`x @ y` in float32."""
    if x.ndim == 2:
        return _mm(x, y)
    if y.ndim == 2:
        return _mm(x.flatten(0, 1), y).unflatten(0, x.shape[:2])
    return _bmm(x, y)


def _mm(x: Tensor, y: Tensor) -> Tensor:
    return torch.mm(x, y, out_dtype=torch.float32)


def _bmm(x: Tensor, y: Tensor) -> Tensor:
    return torch.bmm(x, y, out_dtype=torch.float32)


def _lengths(x: Tensor, axis: int) -> Tensor:
    lengths = torch.linalg.vector_norm(x, dim=axis, keepdim=True)
    return torch.where(lengths == 0, 1, lengths)


def speed(x: Tensor, contract_dtype: ContractDtype = None) -> int:
    """How many times as fast as by MKL in float32 `matmul` is, of tensors like `x`, for `cost`."""
    if contract_dtype is None:
        return onednn_speed(x)
    return cost.BFLOAT16_SPEED if contract_dtype is torch.bfloat16 else 1


def operand(x: Tensor, contract_dtype: ContractDtype) -> Tensor:
    """`x` as it goes into several calls of `matmul`: what can be done once is."""
    return x.to(contract_dtype) if contract_dtype is torch.bfloat16 else wide(x)


def inner_products(x: Tensor, y: Tensor, contract_dtype: ContractDtype = None) -> Tensor:
    """`<x_i, y_j>` of every pair of rows, `[..., n, m]`, of `[..., n, elements]` and
    `[..., m, elements]`; float32 or wider."""
    if x.shape[-1] < LONG:
        return matmul(x, y.mT, contract_dtype)
    if x.ndim > 2 and len(x):  # pieces of a stack would be copied
        each = zip(x, y, strict=True)
        return torch.stack([inner_products(a, b, contract_dtype) for a, b in each])
    pairs = max(1, known(x.shape[-2]) * known(y.shape[-2]))
    few = min(known(x.shape[-2]), known(y.shape[-2])) < FEW_VECTORS
    piece = PIECE if few else LARGE_PIECE
    pieces = min(x.shape[-1] // piece, TABLE_ELEMENTS // pairs)
    if pieces < FEW_PIECES:
        return matmul(x, y.mT, contract_dtype)
    (x, rest_of_x), (y, rest_of_y) = _cut(x, pieces), _cut(y, pieces)
    out = matmul(x, y.mT, contract_dtype).sum(0)
    if not rest_of_x.shape[-1]:
        return out
    return out + matmul(rest_of_x, rest_of_y.mT, contract_dtype)


def dots(x: Tensor, u: Tensor) -> Tensor:
    """`<x_i, u>` of every row, `[..., n]`, of `[..., n, elements]` and `[..., elements]`."""
    if x.shape[-1] < LONG:
        return product(x, u[..., None])[..., 0] if u.ndim > 1 else product(x, u)
    return inner_products(x, u[..., None, :])[..., 0]


def positions_through(x: Tensor, y: Tensor, contract_dtype: ContractDtype = None) -> Tensor:
    """`x @ y`, `[..., t, m]`, of positions `[..., t, elements]` and a matrix `[elements, m]`, or
    one for every group. The sums of few positions are inner products of long vectors."""
    if y.ndim > 2 or x.shape[-1] < LONG:
        return matmul(x, y, contract_dtype)
    found = inner_products(x.flatten(0, -2), y.mT, contract_dtype)
    return found.unflatten(0, x.shape[:-1])


def squares(x: Tensor) -> Tensor:
    """`||x_i||^2` of every row, `[..., n]`, of `[..., n, elements]`, which are not copied."""
    if x.shape[-1] <= LONG:  # `spread` asks for stretches of this length, which stay whole
        return _squares(x)
    x, rest = _cut(x, x.shape[-1] // PIECE)
    return _squares(x).sum(0) + _squares(rest)


def _squares(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).square()


def _cut(x: Tensor, pieces: int) -> tuple[Tensor, Tensor]:
    """Equal pieces, `[pieces, ..., n, k]`, and fewer than `pieces` elements that are left."""
    k = x.shape[-1] // pieces
    return x[..., : k * pieces].unflatten(-1, (pieces, k)).movedim(-2, 0), x[..., k * pieces :]
