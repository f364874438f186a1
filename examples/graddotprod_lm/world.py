"""The processes of a run: one, or as many as torchrun starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among all; every operation is the identity where it is alone."""

    rank: int
    size: int
    device: torch.device

    def divide(self, n: int, name: str) -> None:
        """See that `n` samples can be dealt out evenly.

        Raises:
            ValueError: they cannot.
        """
        if n % self.size:
            raise ValueError(
                f"--{name} {n} cannot be divided among {self.size} processes: means over "
                f"processes would not be means over samples. Use a multiple of {self.size}."
            )

    def mean(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean over processes, in one exchange."""
        if self.size == 1:
            return tensors
        flat = torch.cat([x.flatten() for x in tensors.values()])
        dist.all_reduce(flat)
        parts = (flat / self.size).split([x.numel() for x in tensors.values()])
        pairs = zip(tensors.items(), parts, strict=True)
        return {name: part.view_as(x) for (name, x), part in pairs}

    def sum(self, x: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all processes, in their order."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def connected() -> Iterator[World]:
    """The world that torchrun's environment describes; alone without it."""
    cuda = torch.cuda.is_available()
    if "WORLD_SIZE" not in os.environ:
        yield World(0, 1, torch.device("cuda" if cuda else "cpu"))
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
