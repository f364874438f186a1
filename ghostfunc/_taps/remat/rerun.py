"""Functions of tensors whose activations are computed again in their backward pass, for use inside
transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ghostfunc._taps.remat.stand_ins import hidden_tensor

Pure: TypeAlias = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
"""A function of all that it depends on."""


def attach(outs: Sequence[Tensor], again: Pure, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`outs`, the values of `again(inputs)`, as differentiable functions of `inputs`."""
    attached: tuple[Tensor, ...] = _Rerun.apply(again, len(outs), *outs, *inputs)
    return attached


class _Rerun(torch.autograd.Function):
    """The identity on a function's outputs; its backward runs the function again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(again: Pure, n_out: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in tensors[:n_out])  # the tensors themselves would be views

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        again, n_out, *tensors = inputs
        ctx.again, ctx.n_out = again, n_out
        ctx.save_for_backward(*tensors[n_out:])

    @staticmethod
    def backward(ctx: Any, *b: Tensor) -> tuple[Tensor | None, ...]:
        first = 2 + ctx.n_out
        wanted = [i for i, x in enumerate(ctx.needs_input_grad[first:]) if x]
        inputs = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * (first + len(inputs))
        for i, g in zip(wanted, _pull_back(ctx.again, inputs, wanted, b), strict=True):
            grads[first + i] = g
        return tuple(grads)


def _pull_back(
    again: Pure, inputs: Sequence[Tensor], wanted: Sequence[int], b: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The cotangents of the inputs `wanted`, given those of the outputs."""
    further = torch.is_grad_enabled()
    with torch.no_grad():
        grads = _cotangents(again, inputs, wanted, b, further=False)
    if not further:
        return grads
    # `torch.func.grad` lets every backward pass be differentiated, which would keep what has just
    # been computed again. So the same is done for this function as for the one it belongs to.
    n = len(inputs)
    return attach(
        grads,
        lambda given: _cotangents(again, given[:n], wanted, given[n:], further=True),
        [*inputs, *b],
    )


def _cotangents(
    again: Pure, inputs: Sequence[Tensor], wanted: Sequence[int], b: Sequence[Tensor], *,
    further: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    if not further:
        inputs = [x.detach() for x in inputs]

    def of_wanted(*primals: Tensor) -> tuple[Tensor, ...]:
        given = list(inputs)
        for i, x in zip(wanted, primals, strict=True):
            given[i] = x
        return again(given)

    with torch.enable_grad():
        outs, pullback = torch.func.vjp(of_wanted, *(inputs[i] for i in wanted))[:2]
    # Of constant inputs, outputs are constants, unless something else goes in.
    if not further and any(x.requires_grad for x in outs):
        raise hidden_tensor()
    grads: tuple[Tensor, ...] = pullback(tuple(b), retain_graph=further, create_graph=further)
    return grads
