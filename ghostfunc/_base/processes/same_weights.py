"""Whether the ranks of a group have the same weights.

A mean of gradients at other weights is nobody's gradient. At the first call of a function with a
group all weights are looked at, bit for bit; at later ones a parameter in turn, so that a call
reads one part in as many as there are parameters. What is added up is exact and in no order:
equal bits give equal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ghostfunc._base.remembered import STRUCTURES, Recent, memory
from ghostfunc._base.types import ModelFn

_BLOCK = 1 << 20
"""Elements that are added up at one time."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Calls:
    """How many calls of all ranks there were, by the number of parameters."""

    made: Recent[int, int] = field(default_factory=lambda: Recent(STRUCTURES))


def said_of_weights(model_fn: ModelFn, names: Sequence[str], leaves: Sequence[Tensor]) -> str:
    """What ranks with the same weights say alike; `count_call` says when to go on to the next."""
    call = memory(model_fn, _Calls).made.get(len(leaves))
    if call is None:
        return f"weights {number_of(leaves):x}"
    i = call % len(leaves)
    return f"weights {names[i]!r} {number_of([leaves[i]]):x}"


def count_call(model_fn: ModelFn, leaves: Sequence[Tensor]) -> None:
    """All ranks have compared what they said."""
    made = memory(model_fn, _Calls).made
    call = made.get(len(leaves))
    made.put(len(leaves), 0 if call is None else call + 1)


def number_of(tensors: Sequence[Tensor]) -> int:
    """A number of tensors' bits and of their places, below 2^63."""
    sums = [_sum(x.detach()).cpu() for x in tensors]
    return int(_weighted(torch.stack(sums))) % 2**63 if sums else 0


def _sum(x: Tensor) -> Tensor:
    if x.layout != torch.strided:
        x = x.to_dense()
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    bits = x.contiguous().flatten().view(_BITS[x.element_size()])
    sums = [_weighted(block.to(torch.int64)) for block in bits.split(_BLOCK)]
    return _weighted(torch.stack(sums))


def _weighted(x: Tensor) -> Tensor:
    """`sum_k (2 k + 1) x_k`, modulo 2^64."""
    places = 2 * torch.arange(len(x), device=x.device) + 1
    return (x * places).sum()
