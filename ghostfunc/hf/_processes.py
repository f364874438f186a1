"""A run of several processes: what they average, and what they tell each other.

Every process is given other samples, and the same score samples. It adds the gradients of its own
micro-batches up; at the last of a step they are averaged, as DistributedDataParallel does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from ghostfunc._base.processes.ranks import Exchange, Phase, Ranks
from ghostfunc.distributed._ddp import gather
from ghostfunc.hf._micro_batch import Values


def ranks_of(trainer: Trainer) -> Ranks | None:
    """The processes of a run; None where there is one."""
    if trainer.args.world_size == 1:
        return None
    return Ranks(dist.group.WORLD, type(trainer).__name__)


def inside(model: nn.Module) -> nn.Module:
    """The module that DistributedDataParallel wraps."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return cast(nn.Module, model.module)
    return model


def averaging(phase: Phase, module: nn.Module, processes: int) -> Exchange:
    """The exchange of a step's gradient."""
    leaves = [p.detach() for p in module.parameters() if p.requires_grad]
    return phase.exchange(leaves, range(len(leaves))[::-1], 1 / processes)


def average(exchange: Exchange, module: nn.Module) -> None:
    """Put the mean over the processes in place of `.grad`."""
    grads = [cast(Tensor, p.grad) for p in module.parameters() if p.requires_grad]
    exchange.give_rest(grads)
    for grad, mean in zip(grads, exchange.sums(), strict=True):
        grad.copy_(mean)


def of_all(ranks: Ranks, pending: Sequence[Values]) -> Values:
    """The values of all processes' samples, in the order of ranks."""
    columns: dict[str, list[Tensor | None]] = {
        "ids": [x.ids for x in pending],
        "columns": [x.columns for x in pending],
        "norms": [x.norms for x in pending],
    }
    tree = {
        name: torch.cat(cast(list[Tensor], parts)).to(ranks.device)
        for name, parts in columns.items()
        if parts[0] is not None
    }
    found = gather(tree, ranks.group)
    return Values(found["ids"].cpu(), found["columns"], found.get("norms"))
