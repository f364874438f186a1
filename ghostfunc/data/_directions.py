"""What a run writes down of its directions, and when another direction counts as the same.

A direction that is computed again has other last digits where the number of threads or processes,
or the device, is another. Such a run goes on; one along another direction does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ghostfunc._base.trees import flatten_params
from ghostfunc._base.types import PyTree

SUMS = 61
"""Sums of every so-many-th element that are written down. A prime: sums over rows or columns of a
matrix, which may be zero for every direction, are none of them."""

SAME = 1e-4
"""How far the sums of one direction may be apart, relative to its length."""


def outline(u: PyTree) -> list[float]:
    """The length of a direction, and sums of its elements: float64."""
    sums, square = torch.zeros(SUMS, dtype=torch.float64, device="cpu"), 0.0
    for x in flatten_params(u)[0]:
        own, length = _sums(x.detach())
        sums, square = sums + own, square + length
    return [square**0.5, *sums.tolist()]


def _sums(x: Tensor) -> tuple[Tensor, float]:
    flat = x.reshape(-1)
    sums = torch.zeros(SUMS, dtype=torch.float64, device="cpu")
    square = 0.0
    for part in flat.split(SUMS << 16):  # float64 only of a part at a time
        wide = torch.nn.functional.pad(part.double(), (0, -len(part) % SUMS)).view(-1, SUMS)
        sums += wide.sum(0).cpu()
        square += float(wide.square().sum())
    return sums, square


def as_before(before: Any, now: dict[str, list[float]]) -> dict[str, list[float]]:
    """What a run has written down before, if these are its directions; else what is to be written
    down now."""
    if not isinstance(before, dict) or before.keys() != now.keys():
        return now
    same = all(_same(before[name], own) for name, own in now.items())
    return before if same else now


def _same(before: Any, now: list[float]) -> bool:
    if not isinstance(before, list) or len(before) != len(now):
        return False
    if not all(isinstance(x, float) for x in before):
        return False
    return max(abs(x - y) for x, y in zip(before, now, strict=True)) <= SAME * now[0]
