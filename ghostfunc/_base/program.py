"""A model function at its parameters: what every run of it needs besides a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ghostfunc._base.trees import ParamSpec, flatten_params
from ghostfunc._base.types import ModelFn, PyTree, Randomness


@dataclass(frozen=True, eq=False)
class Program:
    """A model function, its parameters, and whether it may draw random numbers. The public
    functions make it, once.

    Attributes:
        leaves: the parameters, as `spec` flattens and names them.
        randomness: "different" where every sample may draw numbers of its own.
    """

    model_fn: ModelFn
    leaves: Sequence[Tensor]
    spec: ParamSpec
    randomness: Randomness

    @staticmethod
    def of(model_fn: ModelFn, params: PyTree, randomness: Randomness = "error") -> Program:
        """The program at `params`, a pytree; `ParamsError` if a leaf of it is no float tensor."""
        return Program(model_fn, *flatten_params(params), randomness)

    def losses(self, leaves: Sequence[Tensor], batch: PyTree) -> Tensor:
        """What the model function returns for a batch at other values of the parameters."""
        return self.model_fn(self.spec.unflatten(leaves), batch)
