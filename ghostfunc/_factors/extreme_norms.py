"""Norms where squares overflow or underflow.

In float32 a gradient of norm 1e20 is an ordinary finite tensor whose squared norm is infinite. The
usual way squares; what follows is for the samples where that failed.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ghostfunc._factors import pairs
from ghostfunc._factors.bundles import Bundle
from ghostfunc._factors.factor import Dense, Factor, Grouped, OneHot, Outer


def extremes(
    squares: Float[Tensor, " n"], losses: Float[Tensor, " n"] | None = None
) -> Bool[Tensor, " n"]:
    """Which squared norms cannot be trusted: not finite, or so small that digits are lost.

    Zero is what is left of norms up to 1e-22 in float32, 1e-161 in float64. It is trusted where the
    loss is zero, too, or is not given: samples without labels have many of them.
    """
    limits = torch.finfo(squares.dtype)
    small = squares < limits.tiny / limits.eps
    zero = squares == 0
    known = zero if losses is None else zero & (losses.detach() == 0).to(zero.device)
    return ~squares.isfinite() | (small & ~known)


def root(squares: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Square roots; rounding may leave a square that should be zero a little below it."""
    return squares.clamp(min=0).sqrt()


def trusted_roots(squares: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
    """Square roots, NaN where the squares cannot be trusted: for compiled programs, which cannot
    look at them and go another way."""
    return root(squares).masked_fill(extremes(squares.sum(0)), math.nan)


def joint(norms: Float[Tensor, "k n"]) -> Float[Tensor, " n"]:
    """`sqrt(sum_k norms_k^2)` without overflow or underflow on the way."""
    largest = norms.amax(0)
    safe = torch.where((largest > 0) & largest.isfinite(), largest, 1)
    return torch.where(safe == largest, largest * (norms / safe).square().sum(0).sqrt(), largest)


def length(x: Tensor) -> Float[Tensor, ""]:
    """`||x||` in float64, whose squares may be beyond it."""
    if x.dtype != torch.float64:
        return torch.linalg.vector_norm(x, dtype=torch.float64)
    if x.numel() == 0:
        return x.new_zeros(())
    largest = x.abs().max()
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1)
    return scale * (x / scale).norm()


def cosine(
    dots: Float[Tensor, "n ..."], norms: Float[Tensor, " n"], lengths: Float[Tensor, " k"]
) -> Float[Tensor, "n ..."]:
    """`dots / (norms * lengths)`: zero where a length is zero, NaN where the product underflows,
    and the dot product with it."""
    norms = norms.view(-1, *[1] * (dots.ndim - 1))
    product = norms.double() * lengths.double()
    lost = (product < torch.finfo(dots.dtype).tiny) & (norms != 0) & (lengths != 0)
    cosines = dots / torch.where(norms == 0, 1, norms) / torch.where(lengths == 0, 1, lengths)
    cosines = torch.where((norms == 0) | (lengths == 0), 0, cosines.clamp(-1, 1))
    return cosines.masked_fill(lost, math.nan).to(dots.dtype)


def norms(bundle: Bundle) -> Float[Tensor, " n"]:
    """`||g_i||` in float64, at a scale where the largest entry of every factor is 1."""
    sizes = torch.stack([_size(f) for f in bundle])
    largest = sizes.amax(0)
    shares = torch.where(sizes > 0, sizes / largest, 0)
    unit = [_unit(f, share) for f, share in zip(bundle, shares, strict=True)]
    return torch.where(largest > 0, largest * root(pairs.sqnorms(unit)), largest)


def _size(factor: Factor) -> Float[Tensor, " n"]:
    """A bound on the entries that one position adds to the gradient."""
    match factor:
        case Outer(left, right) | Grouped(left, right):
            return _largest(left) * _largest(right)
        case OneHot(_, b, _):
            return _largest(b)
        case Dense(g):
            return _largest(g)


def _unit(factor: Factor, share: Float[Tensor, " n"]) -> Factor:
    """The factor with entries of at most `share`."""
    match factor:
        case Outer(left, right) | Grouped(left, right):
            return type(factor)(_divided(left, share), _divided(right, torch.ones_like(share)))
        case OneHot(ids, b, rows):
            return OneHot(ids, _divided(b, share), rows)
        case Dense(g):
            return Dense(_divided(g, share))


def _largest(x: Tensor) -> Float[Tensor, " n"]:
    if x.numel() == 0:
        return x.new_zeros(len(x), dtype=torch.float64)
    return x.double().abs().reshape(len(x), -1).amax(1)


def _divided(x: Tensor, share: Float[Tensor, " n"]) -> Tensor:
    largest = _largest(x)
    scale = share / torch.where(largest > 0, largest, 1)
    return x.double() * scale.view(-1, *[1] * (x.ndim - 1))
