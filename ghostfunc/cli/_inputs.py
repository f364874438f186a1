"""What `ghostfunc score` reads before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ghostfunc._base.types import PyTree
from ghostfunc.cli._model import Loaded
from ghostfunc.data import Encoded, Rows


@dataclass(frozen=True)
class Inputs:
    """What was read before anything is computed."""

    model: Loaded
    rows: Rows
    pool: Encoded
    target: Encoded
    token_budget: int

    def batch(self, samples: Sequence[int]) -> PyTree:
        """A batch of the pool, on the model's device."""
        device = next(iter(self.model.params.values())).device
        batch = self.model.collate([self.pool[i] for i in samples])
        return {name: x.to(device) for name, x in batch.items()}
