"""Tensors of every rank's samples, brought together."""

from __future__ import annotations

from typing import Any

import torch

from ghostfunc._base.processes.ranks import Ranks
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
    of_all = [ranks.samples(x, phase.numbers, "bringing rows together") for x in leaves]
    return unflatten(treedef, [torch.cat(rows) for rows in of_all])
