"""Matrix products with a parameter: `F.linear`, `matmul`, `addmm`, `einsum` and their kin.

`y = a W^T` has `g_i = sum_t b_it a_it^T`; `y = a W` has its transpose; every other product is an
einsum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._factors.factor import Dense, Factor, Outer, flat_positions, over_positions
from ghostfunc._rules.contraction import BATCH_LETTERS, einsum_factors, explicit
from ghostfunc._rules.registry import FactorMakers, register_rule, sum_to


@register_rule(F.linear, multilinear=True)
def linear(b: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> FactorMakers:
    if weight.ndim == 2:  # a single output feature, without an axis of its own
        b, weight = b[..., None], weight[:, None]

    def of_input() -> Factor:
        equation = explicit("...a,Pa->...P", input, weight)
        return einsum_factors(b, equation, {"input": input, "weight": weight})["input"]()

    return {
        "input": of_input,
        "weight": lambda: Outer(flat_positions(b), flat_positions(input)),
        "bias": lambda: Dense(over_positions(b)),
    }


# --- matmul -----------------------------------------------------------------------------------


def _matmul_equation(left: int, right: int) -> str:
    """`torch.matmul` of tensors with so many axes, as an einsum."""
    if left == right == 1:
        return "a,a->"
    batch = BATCH_LETTERS[: max(left, right, 2) - 2]
    of_left = "a" if left == 1 else batch[max(right - left, 0) if left >= 2 else 0 :] + "Pa"
    of_right = "a" if right == 1 else batch[max(left - right, 0) if right >= 2 else 0 :] + "aD"
    return f"{of_left},{of_right}->{batch}{'P' * (left > 1)}{'D' * (right > 1)}"


def _matmul(b: Tensor, left: Tensor, right: Tensor, of_left: str, of_right: str) -> FactorMakers:
    equation = _matmul_equation(left.ndim - 1, right.ndim - 1)
    factors = einsum_factors(b, equation, {of_left: left, of_right: right})
    if left.ndim > 2 and right.ndim == 3:  # [..., a] @ [a, D], by far the most frequent
        return {**factors, of_right: lambda: Outer(flat_positions(left), flat_positions(b))}
    return factors


@register_rule(
    torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.linalg.matmul, multilinear=True
)
def matmul(b: Tensor, input: Tensor, other: Tensor) -> FactorMakers:
    return _matmul(b, input, other, "input", "other")


@register_rule(Tensor.__rmatmul__, multilinear=True)
def rmatmul(b: Tensor, input: Tensor, other: Tensor) -> FactorMakers:
    return _matmul(b, other, input, "other", "input")


@register_rule(torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, multilinear=True)
def mm(b: Tensor, input: Tensor, mat2: Tensor) -> FactorMakers:
    return _matmul(b, input, mat2, "input", "mat2")


@register_rule(torch.mv, Tensor.mv, multilinear=True)
def mv(b: Tensor, input: Tensor, vec: Tensor) -> FactorMakers:
    return einsum_factors(b, "Pa,a->P", {"input": input, "vec": vec})


@register_rule(torch.outer, Tensor.outer, torch.ger, Tensor.ger, multilinear=True)
def outer(b: Tensor, input: Tensor, vec2: Tensor) -> FactorMakers:
    return einsum_factors(b, "P,D->PD", {"input": input, "vec2": vec2})


@register_rule(torch.inner, Tensor.inner, multilinear=True)
def inner(b: Tensor, input: Tensor, other: Tensor) -> FactorMakers:
    if input.ndim == 1 or other.ndim == 1:  # a scalar times a tensor
        return einsum_factors(
            b, explicit("...,...->...", input, other), {"input": input, "other": other}
        )
    left = BATCH_LETTERS[: input.ndim - 2]
    right = BATCH_LETTERS[len(left) :][: other.ndim - 2]
    return einsum_factors(b, f"{left}a,{right}a->{left}{right}", {"input": input, "other": other})


def _scaled(x: Tensor, c: float) -> Tensor:
    return x if c == 1 else c * x


# --- products added to something ----------------------------------------------------------------


def _added(
    b: Tensor, equation: str, input: Tensor, beta: float, alpha: float, **operands: Tensor
) -> FactorMakers:
    return {
        **einsum_factors(b if alpha == 1 else alpha * b, equation, operands),
        "input": lambda: Dense(_scaled(sum_to(b, input.shape[1:]), beta)),
    }


@register_rule(torch.addmm, Tensor.addmm, multilinear=True)
def addmm(
    b: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> FactorMakers:
    factors = _added(b, "Pa,aD->PD", input, beta, alpha, mat1=mat1, mat2=mat2)
    right = b if alpha == 1 else alpha * b
    return {**factors, "mat2": lambda: Outer(flat_positions(mat1), flat_positions(right))}


@register_rule(torch.baddbmm, Tensor.baddbmm, multilinear=True)
def baddbmm(
    b: Tensor, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> FactorMakers:
    return _added(b, "gPa,gaD->gPD", input, beta, alpha, batch1=batch1, batch2=batch2)


@register_rule(torch.addbmm, Tensor.addbmm, multilinear=True)
def addbmm(
    b: Tensor, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> FactorMakers:
    return _added(b, "gPa,gaD->PD", input, beta, alpha, batch1=batch1, batch2=batch2)


@register_rule(torch.addmv, Tensor.addmv, multilinear=True)
def addmv(
    b: Tensor, input: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1
) -> FactorMakers:
    return _added(b, "Pa,a->P", input, beta, alpha, mat=mat, vec=vec)


@register_rule(torch.addr, Tensor.addr, multilinear=True)
def addr(
    b: Tensor, input: Tensor, vec1: Tensor, vec2: Tensor, *, beta: float = 1, alpha: float = 1
) -> FactorMakers:
    return _added(b, "P,D->PD", input, beta, alpha, vec1=vec1, vec2=vec2)


# --- products with an equation --------------------------------------------------------------------


@register_rule(torch.einsum, multilinear=True)
def einsum(b: Tensor, equation: str, *operands: Any) -> FactorMakers:
    tensors = operands[0] if isinstance(operands[0], (list, tuple)) else operands
    named: dict[Any, Tensor] = {("operands", i): x for i, x in enumerate(tensors)}
    return einsum_factors(b, explicit(equation, *tensors), named)


@register_rule(torch.tensordot, multilinear=True)
def tensordot(
    cotangent: Tensor, a: Tensor, b: Tensor, dims: Any = 2, out: None = None
) -> FactorMakers:
    left, right = a.ndim - 1, b.ndim - 1
    if isinstance(dims, int):
        of_a, of_b = list(range(left - dims, left)), list(range(dims))
    else:
        of_a, of_b = ([int(i) for i in axes] for axes in dims)
    letters = iter(BATCH_LETTERS)
    left_axes = [next(letters) for _ in range(left)]
    right_axes = [next(letters) for _ in range(right)]
    for i, j in zip(of_a, of_b, strict=True):
        right_axes[j] = left_axes[i]
    free = [x for x in left_axes if x not in right_axes] + [
        x for x in right_axes if x not in left_axes
    ]
    equation = f"{''.join(left_axes)},{''.join(right_axes)}->{''.join(free)}"
    return einsum_factors(cotangent, equation, {"a": a, "b": b})


@register_rule(F.bilinear, torch.bilinear, multilinear=True)
def bilinear(
    b: Tensor, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> FactorMakers:
    equation = explicit("...a,...d,Pad->...P", input1, input2, weight)
    return {
        **einsum_factors(b, equation, {"input1": input1, "input2": input2, "weight": weight}),
        "bias": lambda: Dense(over_positions(b)),
    }
