"""Sums over the samples of all ranks of a process group, for functions that return one tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import optree
from torch import Tensor

from ghostfunc._base.processes.pieces import refuse_group
from ghostfunc._base.processes.ranks import Ranks
from ghostfunc._base.processes.same_weights import count_call, said_of_weights
from ghostfunc._base.trees import batch_size, flatten_params
from ghostfunc._base.types import ModelFn, PyTree

T = TypeVar("T")


def sums_of_all(
    group: Any,
    call: str,
    model_fn: ModelFn,
    params: PyTree,
    batch: PyTree,
    options: dict[str, Any],
    own: Callable[[], T],
    tree_of: Callable[[T], PyTree],
    *,
    mean: bool,
) -> tuple[PyTree, T]:
    """The sum over ranks of one tree of a call, and the call's result on this rank.

    Args:
        group, call: the ranks, and the public function's name.
        model_fn, params, batch: its arguments.
        options: those of its options that have to be alike on all ranks.
        own: the call on this rank's samples.
        tree_of: the tree in its result, like `params`.
        mean: whether that tree is a mean over the rank's samples; then so is what is returned.
    """
    ranks = Ranks(group, call)
    with ranks.phase("reading its arguments") as phase:
        refuse_group(model_fn, call)
        leaves, spec = flatten_params(params)
        phase.number = n = batch_size(batch)
        shapes = [(tuple(x.shape), str(x.dtype)) for x in leaves]
        weights = said_of_weights(model_fn, spec.names, leaves)
        phase.alike = f"{options}, parameters {spec.names} of {shapes}, {weights}"
    count_call(model_fn, leaves)
    weight = n / sum(phase.numbers) if mean else 1.0
    with ranks.phase("exchanging the gradient") as phase:
        exchange = phase.exchange(leaves, range(len(leaves))[::-1], weight)
        result = own()
        found: list[Tensor] = optree.tree_leaves(tree_of(result))
        exchange.give_rest(found)
    sums = exchange.sums()
    return spec.unflatten([x.to(y.dtype) for x, y in zip(sums, found, strict=True)]), result
