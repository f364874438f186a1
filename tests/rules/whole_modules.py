"""Whole modules against autograd, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ghostfunc.testing import Case, check_rule


def check_module(
    module: nn.Module,
    samples: dict[str, Any],
    run: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    op: Callable[..., Any],
) -> None:
    """`run(module, samples)` has its output's samples on the first axis."""
    module.double()
    params = {k: tuple(p.shape) for k, p in module.named_parameters()}

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return run(self.module, x)

    whole = Run()

    def call(p: dict[str, Tensor], x: dict[str, Tensor]) -> Tensor:
        own = {f"module.{k}": v for k, v in p.items()}
        return torch.func.functional_call(whole, own, (x,))

    check_rule(op, [Case(call, params, samples)], samples=(1, 3))
