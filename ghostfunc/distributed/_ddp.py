"""Tensors of every rank's samples, brought together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ghostfunc._base.processes.ranks import Ranks, as_bytes
from ghostfunc._base.trees import batch_size, flatten, unflatten
from ghostfunc._base.types import PyTree


def gather(tree: PyTree, group: Any) -> PyTree:
    """The rows of all ranks' tensors, those of rank 0 first: the same on every rank.

        gather(x)[sum_{s<r} n_s + i] = x_i of rank r

    Args:
        tree: a pytree of tensors `[n_r, ...]`, such as the scores of a rank's own samples; also
            with other numbers of rows on other ranks, but for none. Put the samples' ids beside
            the scores, `{"ids": ids, "scores": scores}`: a sampler decides whose they are.
        group: a process group of `torch.distributed`.

    Returns:
        The same tree of tensors `[sum_r n_r, ...]`.

    Raises:
        BatchError: the tensors have unequal numbers of rows, or none.
        RankError: another rank failed, is gone, or was given another tree.

    Example:

        everyone = gf.distributed.gather({"ids": ids, "scores": step.dot_prods}, group)
    """
    ranks = Ranks(group, "gather")
    with ranks.phase("reading its arguments") as phase:
        phase.number = batch_size(tree, "tree")
        leaves, treedef = flatten(tree)
        shapes = [(tuple(x.shape[1:]), str(x.dtype)) for x in leaves]
        phase.alike = f"{treedef} of rows {shapes}"
    return unflatten(treedef, [_rows(ranks, x, phase.numbers) for x in leaves])


def _rows(ranks: Ranks, x: Tensor, numbers: list[int]) -> Tensor:
    """One tensor's rows from all ranks: what is sent has the length of the longest. Bytes travel,
    since backends do not take all dtypes."""
    sent = x.new_zeros(max(numbers), *x.shape[1:])
    sent[: len(x)] = x.detach()
    received = [torch.empty_like(sent) for _ in numbers]
    ranks.gather([as_bytes(r) for r in received], as_bytes(sent), "bringing rows together")
    return torch.cat([rows[:n] for rows, n in zip(received, numbers, strict=True)])
