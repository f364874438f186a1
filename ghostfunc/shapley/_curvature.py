"""Gradient and Hessian-vector product of a mean validation loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ghostfunc._base.definition import ReverseModeConstants
from ghostfunc._base.dense_gradients import DenseGradients
from ghostfunc._base.errors import TransformError
from ghostfunc._base.locks import FORWARD_MODE
from ghostfunc._base.losses import check_losses
from ghostfunc._base.options import one_of
from ghostfunc._base.program import Program
from ghostfunc._base.torch_private import in_transform, unrounded
from ghostfunc._base.trees import batch_size
from ghostfunc._base.types import PyTree

Hvp: TypeAlias = Literal["forward", "reverse"]


def grad_and_hvp(
    program: Program, val: PyTree, along: Sequence[Tensor], how: Hvp
) -> tuple[list[Tensor], list[Tensor]]:
    """`(u, H p)` of the mean loss over `val`, with p = `along`.

    "forward": `jvp` over `grad`, which has both from one pass. "reverse": `grad` of `<grad, p>`,
    for models with an op that has no forward-mode AD, and under `torch.autocast`. Both need the
    plain attention kernel: the fused ones have no second derivative.
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
            if not in_transform():
                return _by_autograd(mean_loss, [x.requires_grad_() for x in primals], tangents)
            return _reverse(slope, primals, tangents)
        try:
            with FORWARD_MODE, ReverseModeConstants():
                out: Any = torch.func.jvp(slope, (primals,), (tangents,))
        except (NotImplementedError, RuntimeError) as error:
            if not any(words in str(error) for words in _SAID):
                raise
            raise TransformError(
                'hvp="forward" needs forward-mode AD for every op, and one dtype, not '
                f'torch.autocast; use hvp="reverse". torch said: {str(error).splitlines()[0]}'
            ) from error
    return out[0], out[1]


_SAID = ("forward AD", "forward mode AD", "same dtype", "scalar type")
"""Words of torch where an op has no forward mode, or autocast and transforms do not go together."""


def _reverse(
    slope: Callable[[list[Tensor]], list[Tensor]], primals: list[Tensor], along: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    def dot(p: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        grads = slope(p)
        dots = [(g * x).sum() for g, x in zip(grads, along, strict=True)]
        return torch.stack(dots).sum(), grads

    made: Any = torch.func.vjp(dot, primals, has_aux=True)
    value, pull, grads = made
    with unrounded(value):
        products: list[Tensor] = pull(torch.ones_like(value))[0]
    return grads, products


def _by_autograd(
    mean_loss: Callable[[list[Tensor]], Tensor], primals: list[Tensor], along: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Plain autograd twice, which runs what transforms do not: autocast, checkpoints."""
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    with DenseGradients():
        loss = mean_loss(primals)
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in primals], [torch.zeros_like(x) for x in primals]
    with unrounded(loss):
        grads = torch.autograd.grad(loss, primals, create_graph=True, **options)
        curved = [(g, x) for g, x in zip(grads, along, strict=True) if g.requires_grad]
        out = [g.detach() for g in grads]
        if not curved:
            return out, [torch.zeros_like(x) for x in primals]
        slopes, tangents = zip(*curved, strict=True)
        products = torch.autograd.grad(slopes, primals, tangents, **options)
    return out, list(products)
