"""Table look-ups: `F.embedding`, `F.embedding_bag`, indexing and gathering by samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._base.errors import UnsupportedOpError
from ghostfunc._base.refusals import refuse
from ghostfunc._factors.factor import OneHot
from ghostfunc._rules.registry import FactorMakers, coupled, register_rule, unsupported

# --- F.embedding ----------------------------------------------------------------------------------


def _check_pure(op: str, max_norm: float | None, scale_grad_by_freq: bool) -> None:
    if max_norm is not None:
        raise UnsupportedOpError(
            f"{op} with max_norm rewrites its weight in the forward pass, so the function is not "
            "pure. Renormalise the weight outside model_fn and drop max_norm."
        )
    if scale_grad_by_freq:
        raise coupled(
            f"{op} with scale_grad_by_freq=True counts ids over the whole batch",
            "Set scale_grad_by_freq=False.",
        )


@refuse(F.embedding)
def check_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> None:
    _check_pure("F.embedding", max_norm, scale_grad_by_freq)


@register_rule(F.embedding, multilinear=True)
def embedding(
    b: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> FactorMakers:
    def of_weight() -> OneHot:
        cotangent = b
        if padding_idx is not None:
            padded = input == padding_idx % weight.shape[1]
            cotangent = b.masked_fill(padded[..., None], 0)
        return _look_up(cotangent, input, weight.shape[1])

    return {"weight": of_weight}


def _look_up(b: Tensor, ids: Tensor, rows: int) -> OneHot:
    """`table[ids]`: one row of `b` per id, whatever the table's other axes."""
    width = math.prod(b.shape[ids.ndim :])
    ids = ids[:, None].flatten(1)
    return OneHot(ids, b.reshape(*ids.shape, width), rows)


# --- F.embedding_bag ------------------------------------------------------------------------------


@refuse(F.embedding_bag)
def check_embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> None:
    _check_pure("F.embedding_bag", max_norm, scale_grad_by_freq)


def _check_bags(input: Tensor, weight: Tensor, offsets: Tensor | None = None, **_: Any) -> None:
    if offsets is not None:
        raise unsupported(
            "F.embedding_bag with offsets: bags of unequal size lie one after the other on one "
            "axis, so ids cannot be told apart by sample",
            "Pad the bags to one length, [n, t], with padding_idx.",
        )


@register_rule(F.embedding_bag, check=_check_bags)
def embedding_bag(
    b: Tensor,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> FactorMakers:
    rows = weight.shape[1]
    ids = input  # [n, bags, t]
    kept = torch.ones_like(ids, dtype=torch.bool)
    if padding_idx is not None:
        kept = ids != padding_idx % rows

    def of_weight() -> OneHot:
        share = kept.to(b.dtype)
        if per_sample_weights is not None:
            share = share * per_sample_weights
        if mode == "mean":
            share = share / kept.sum(-1, keepdim=True).clamp(min=1)
        each = b[:, :, None, :] * share[..., None]  # [n, bags, t, d]
        if mode == "max":
            each = each * _chosen()
        return _look_up(each, ids, rows)

    def _chosen() -> Tensor:
        """Which id of a bag, the first if several, gave the maximum of each feature."""
        x = F.embedding(ids, weight[0]).masked_fill(~kept[..., None], -torch.inf)
        return F.one_hot(x.argmax(2), ids.shape[2]).movedim(-1, 2)

    return {"weight": of_weight}


# --- choosing elements ----------------------------------------------------------------------------


def _selection(b: Tensor, table: Tensor, op: Callable[..., Tensor], *ids: Tensor) -> OneHot:
    """Any op whose output elements are elements of `table[0]`, chosen by `ids`, `[n, ...]` each."""
    shape = table.shape[1:]
    places = torch.arange(shape.numel(), device=table.device).view(shape)
    chosen = torch.vmap(lambda *one: op(places, *one))(*ids)
    if chosen.shape != b.shape:
        raise unsupported(f"Choosing elements of a parameter to make shape {tuple(b.shape[1:])}")
    return OneHot(chosen.flatten(1), b[:, None].flatten(1)[..., None], shape.numel())


@register_rule(Tensor.__getitem__, multilinear=True)
def getitem(b: Tensor, input: Tensor, index: Any) -> FactorMakers:
    def of_input() -> OneHot:
        entries = index if isinstance(index, tuple) else (index,)
        ids = [x for x in entries if isinstance(x, Tensor)]
        if not ids or any(x.dtype not in (torch.int64, torch.int32) for x in ids):
            raise unsupported(
                "Indexing a parameter by samples needs integer tensors, w[ids]",
                "Use torch.where for masks.",
            )
        if isinstance(entries[0], Tensor) and all(
            x is Ellipsis or x == slice(None) for x in entries[1:]
        ):
            return _look_up(b, ids[0] % input.shape[1], input.shape[1])

        def op(table: Tensor, *ids: Tensor) -> Tensor:
            rest = iter(ids)
            chosen = tuple(next(rest) if isinstance(x, Tensor) else x for x in entries)
            return table[chosen]

        return _selection(b, input, op, *ids)

    return {"input": of_input}


@register_rule(torch.index_select, Tensor.index_select, multilinear=True)
def index_select(b: Tensor, input: Tensor, dim: int, index: Tensor) -> FactorMakers:
    def of_input() -> OneHot:
        if dim % (input.ndim - 1) == 0:
            return _look_up(b, index, input.shape[1])
        return _selection(b, input, lambda table, ids: table.index_select(dim, ids), index)

    return {"input": of_input}


@register_rule(torch.gather, Tensor.gather, multilinear=True)
def gather(
    b: Tensor, input: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False
) -> FactorMakers:
    return {"input": lambda: _selection(b, input, lambda x, ids: x.gather(dim, ids), index)}


@register_rule(torch.take_along_dim, Tensor.take_along_dim, multilinear=True)
def take_along_dim(
    b: Tensor, input: Tensor, indices: Tensor, dim: int | None = None
) -> FactorMakers:
    def op(table: Tensor, ids: Tensor) -> Tensor:
        return torch.take_along_dim(table, ids, dim)

    return {"input": lambda: _selection(b, input, op, indices)}


@register_rule(torch.take, Tensor.take, multilinear=True)
def take(b: Tensor, input: Tensor, index: Tensor) -> FactorMakers:
    def of_input() -> OneHot:
        flat = index[:, None].flatten(1)
        size = input[0].numel()
        return OneHot(flat % size, b.reshape(*flat.shape, 1), size)

    return {"input": of_input}
