"""Ops that reorder samples by their values, after which rows belong to samples no layout knows.

The products of routed experts are explained; whoever else reorders is noted by the trace, which has
the owners of rows checked in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._base.torch_private import GROUPED_MM, PACK_PADDED_SEQUENCE
from ghostfunc._rules.registry import no_rule_because

no_rule_because(
    "its rows are sorted by expert, so they cannot be told apart by sample. gf.from_module and "
    "gf.hf leave rows in order in models of transformers; elsewhere, "
    'model.set_experts_implementation("batched_mm") does, with memory for one expert per routed '
    "token",
    *(op for op in (vars(F).get("grouped_mm"), GROUPED_MM) if op is not None),
)

_ROWS_BY_VALUE: set[Callable[..., Any]] = {
    torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere,
    torch.masked_select, Tensor.masked_select,
    torch.unique, Tensor.unique, torch.unique_consecutive, Tensor.unique_consecutive,
    PACK_PADDED_SEQUENCE, Tensor.tolist, Tensor.numpy,
}  # fmt: skip
_SORTS: set[Callable[..., Any]] = {
    torch.sort, Tensor.sort, torch.argsort, Tensor.argsort, torch.msort, Tensor.msort,
    torch.topk, Tensor.topk,
}  # fmt: skip


_OTHERS: set[Callable[..., Any]] = {torch.where, Tensor.where, Tensor.__getitem__}
MAY_REORDER = _ROWS_BY_VALUE | _SORTS | _OTHERS


SCANS: set[Callable[..., Any]] = {
    torch.cumsum, Tensor.cumsum, torch.cumprod, Tensor.cumprod, torch.cummax, Tensor.cummax,
    torch.cummin, Tensor.cummin, torch.logcumsumexp, Tensor.logcumsumexp,
    torch.softmax, Tensor.softmax, F.softmax, torch.log_softmax, Tensor.log_softmax, F.log_softmax,
}  # fmt: skip
"""Ops that make each number along an axis of others along it."""


NORMS_OF_SLICES: set[Callable[..., Any]] = {torch.renorm, Tensor.renorm, Tensor.renorm_}
"""Ops that make each number of all others in its slice of an axis."""


def mixes_slices(args: tuple[Any, ...], kwargs: dict[str, Any], axes: Sequence[int]) -> bool:
    """Whether a call of one of `NORMS_OF_SLICES` makes numbers of others along one of `axes`."""
    dim = kwargs["dim"] if "dim" in kwargs else args[2]
    return any(axis != dim for axis in axes)


def reorders(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], axis: int, ndim: int
) -> bool:
    """Whether a call of one of `MAY_REORDER`, on a tensor with samples on `axis`, does."""
    if func in (torch.where, Tensor.where):
        return len(args) + len(kwargs) == 1
    if func is Tensor.__getitem__:
        entries = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in entries)
    if func in _SORTS:
        return sorted_dim(func, args, kwargs) % ndim == axis
    return True


def sorted_dim(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The axis along which one of `_SORTS` or `SCANS` works."""
    if func in (torch.msort, Tensor.msort):
        return 0
    position = 2 if func in (torch.topk, Tensor.topk) else 1
    dim = kwargs["dim"] if "dim" in kwargs else args[position] if len(args) > position else -1
    return -1 if dim is None or isinstance(dim, bool) else int(dim)
