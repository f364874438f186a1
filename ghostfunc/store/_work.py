"""The work of `project_dataset`: how a batch of samples becomes rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base.trees import check_samples, flatten_params, map_tensors
from ghostfunc._base.types import ModelFn, PyTree, Randomness
from ghostfunc._transforms.grads import per_sample_grads
from ghostfunc.projection import Projection, ghost_project
from ghostfunc.store._recipe import Recipe


class Dataset(Protocol):
    """A map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Work:
    """The arguments of `project_dataset` that decide about a row."""

    model_fn: ModelFn
    params: PyTree
    dataset: Dataset
    projection: Projection
    collate: Callable[[list[Any]], PyTree]
    batch_size: int
    length: Callable[[Any], int] | None
    transform: Callable[[PyTree], PyTree] | None
    randomness: Randomness

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return flatten_params(self.params)[0][0].device

    @property
    def least_precise(self) -> torch.dtype:
        """The parameters' dtype that rounds most."""
        dtypes = {x.dtype for x in flatten_params(self.params)[0]}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def recipe(self) -> Recipe:
        """Its recipe, to be put on record."""
        return Recipe.of(
            self.model_fn,
            self.params,
            randomness=self.randomness,
            functions={
                "collate": self.collate,
                "transform": self.transform,
                "length": self.length,
            },
        )

    def load(self, ids: Sequence[int]) -> PyTree:
        """A batch of samples, where the parameters are."""
        batch = self.collate([self.dataset[i] for i in ids])
        device = self.device
        check_samples(batch, len(ids), "what collate returned")
        return map_tensors(lambda x: x.to(device), batch)

    def rows_of(self, batch: PyTree) -> Float[Tensor, "n k"]:
        """The projected gradients of a batch, float32 on the CPU."""
        options: dict[str, Any] = {"randomness": self.randomness}
        if self.transform is None:
            rows = ghost_project(self.model_fn, self.params, batch, self.projection, **options)
        else:
            grads = per_sample_grads(self.model_fn, self.params, batch, mode="ghost", **options)
            rows = self.projection.apply(self.transform(grads))
        return rows.detach().float().cpu()

    def batches_of(self, ids: Sequence[int]) -> list[list[int]]:
        """Places in `ids`, batch by batch: the same ones whenever the same ids are missing."""
        order = list(range(len(ids)))
        if self.length is not None:
            lengths = [self.length(self.dataset[i]) for i in ids]
            order.sort(key=lengths.__getitem__)  # stable
        return [
            order[start : start + self.batch_size] for start in range(0, len(ids), self.batch_size)
        ]
