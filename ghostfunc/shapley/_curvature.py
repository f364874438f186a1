"""Gradient and Hessian-vector product of a mean validation loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ghostfunc._base.definition import ReverseModeConstants
from ghostfunc._base.errors import TransformError
from ghostfunc._base.locks import FORWARD_MODE
from ghostfunc._base.losses import check_losses
from ghostfunc._base.options import one_of
from ghostfunc._base.program import Program
from ghostfunc._base.torch_private import unrounded
from ghostfunc._base.trees import batch_size
from ghostfunc._base.types import PyTree

Hvp: TypeAlias = Literal["forward", "reverse"]


def grad_and_hvp(
    program: Program, val: PyTree, along: Sequence[Tensor], how: Hvp
) -> tuple[list[Tensor], list[Tensor]]:
    """`(u, H p)` of the mean loss over `val`, with p = `along`.

    "forward": `jvp` over `grad`, which has both from one pass. "reverse": `grad` of `<grad, p>`,
    for models with an op that has no forward-mode AD. Both need the plain attention kernel: the
    fused ones have no second derivative.
    """
    one_of("hvp", how, ("forward", "reverse"))
    m = batch_size(val, "val_sets")

    def mean_loss(p: list[Tensor]) -> Tensor:
        return check_losses(program.losses(p, val), m).mean()

    def slope(p: list[Tensor]) -> list[Tensor]:
        value, pull = torch.func.vjp(mean_loss, p)[:2]
        with unrounded(value):
            grads: list[Tensor] = pull(torch.ones_like(value))[0]
        return grads

    primals, tangents = [x.detach() for x in program.leaves], list(along)
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        if how == "reverse":
            return _reverse(slope, primals, tangents)
        try:
            with FORWARD_MODE, ReverseModeConstants():
                out: Any = torch.func.jvp(slope, (primals,), (tangents,))
        except (NotImplementedError, RuntimeError) as error:
            if "forward AD" not in str(error) and "forward mode AD" not in str(error):
                raise
            raise TransformError(
                'hvp="forward" needs forward-mode AD for every op; use hvp="reverse". torch said: '
                f"{str(error).splitlines()[0]}"
            ) from error
    return out[0], out[1]


def _reverse(
    slope: Callable[[list[Tensor]], list[Tensor]], primals: list[Tensor], along: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    def dot(p: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        grads = slope(p)
        dots = [(g * x).sum() for g, x in zip(grads, along, strict=True)]
        return torch.stack(dots).sum(), grads

    with unrounded(primals[0]):
        products, grads = torch.func.grad(dot, has_aux=True)(primals)
    return grads, products
