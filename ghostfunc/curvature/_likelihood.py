"""Likelihoods: the last step of a loss, from a model's outputs to losses.

    losses[i] = sum_t w_it l(z_it; y_it),        z = outputs(params, batch)

A likelihood knows the Hessian H of that sum with respect to `z`. The generalised Gauss-Newton
matrix (GGN) of the losses is `J^T H J`, with J the derivative of the outputs. A *cotangent* `c` of
`z` with `E[c c^T] = H` turns it into a second moment of gradients: `E[(J^T c)(J^T c)^T]`.

For both likelihoods here, `c` is the gradient of the loss of a label drawn from the model itself,
`sqrt(w_it)` instead of `w_it` times: their GGN is the Fisher information matrix where `w = 1`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import BatchError, OptionError
from ghostfunc._base.options import check_callable, check_number, one_of
from ghostfunc._base.types import PyTree

Outputs: TypeAlias = Callable[[PyTree, PyTree], Tensor]
"""`outputs(params, batch) -> z [n, ...]`, pure."""

Sums: TypeAlias = Literal["mean", "sum"]


class Likelihood(ABC):
    """From outputs to losses; made by `softmax` or `gaussian`, or a class of your own.

    Attributes:
        outputs: `outputs(params, batch) -> z [n, ...]`, pure.
    """

    def __init__(self, outputs: Outputs) -> None:
        if not callable(outputs):
            raise OptionError(
                f"outputs must be a function outputs(params, batch) -> z [n, ...]; got "
                f"{type(outputs).__name__}."
            )
        self.outputs = outputs

    @abstractmethod
    def losses(self, z: Float[Tensor, "n ..."], batch: PyTree) -> Float[Tensor, " n"]:
        """The losses that the model function has, given its outputs."""

    @abstractmethod
    def draw(
        self, z: Float[Tensor, "n ..."], batch: PyTree, generator: Generator
    ) -> Float[Tensor, "n ..."]:
        """A random cotangent `c` of `z`, with `E[c c^T] = H` for every sample."""

    @abstractmethod
    def columns(self, z: Float[Tensor, "n ..."], batch: PyTree) -> Iterator[Float[Tensor, "n ..."]]:
        """Cotangents `c_1, c_2, ...` of `z` with `sum_k c_k c_k^T = H` for every sample."""

    @abstractmethod
    def hessian_product(
        self, z: Float[Tensor, "n ..."], batch: PyTree, v: Float[Tensor, "n ..."]
    ) -> Float[Tensor, "n ..."]:
        """`H v` for every sample."""


class _Softmax(Likelihood):
    """Made by `softmax`."""

    def __init__(
        self,
        outputs: Outputs,
        labels: Callable[[PyTree], Tensor],
        reduction: Sums,
        ignore_index: int,
    ) -> None:
        super().__init__(outputs)
        self._labels, self._reduction, self._ignored = labels, reduction, ignore_index

    def losses(self, z: Tensor, batch: PyTree) -> Tensor:
        y, w = self._targets(z, batch)
        flat = F.cross_entropy(
            wide(z).flatten(0, -2), y.flatten(), reduction="none", ignore_index=self._ignored
        )
        return (flat.view(y.shape) * w).reshape(len(z), -1).sum(1)

    def draw(self, z: Tensor, batch: PyTree, generator: Generator) -> Tensor:
        w = self._targets(z, batch)[1]
        p = wide(z).softmax(-1)
        drawn = torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(w.shape)
        return w.sqrt()[..., None] * (p - F.one_hot(drawn, z.shape[-1]))

    def columns(self, z: Tensor, batch: PyTree) -> Iterator[Tensor]:
        w = self._targets(z, batch)[1].reshape(len(z), -1)
        p = wide(z).softmax(-1).view(*w.shape, -1)
        for t in range(w.shape[1]):
            for k in range(p.shape[-1]):
                c = torch.zeros_like(p)
                c[:, t] = p[:, t]
                c[:, t, k] -= 1
                c[:, t] *= (w[:, t] * p[:, t, k]).sqrt()[:, None]
                yield c.view(z.shape)

    def hessian_product(self, z: Tensor, batch: PyTree, v: Tensor) -> Tensor:
        w = self._targets(z, batch)[1]
        p, v = wide(z).softmax(-1), wide(v)
        return w[..., None] * p * (v - (p * v).sum(-1, keepdim=True))

    def _targets(self, z: Tensor, batch: PyTree) -> tuple[Int[Tensor, "n ..."], Tensor]:
        """Labels, and the weight `w` of each."""
        y = self._labels(batch)
        if y.is_floating_point() or y.shape != z.shape[:-1]:
            raise BatchError(
                f"softmax needs integer labels of shape {tuple(z.shape[:-1])}, one per "
                f"distribution of the outputs {tuple(z.shape)}; labels(batch) gave "
                f"{tuple(y.shape)} of "
                f"{y.dtype}."
            )
        counted = (y != self._ignored).to(wide(z).dtype)
        if self._reduction == "mean":
            n = len(y)
            share = counted.reshape(n, -1).sum(1)
            # A sample without any that counts has no loss, and no part in the curvature.
            counted = counted / share.clamp(min=1).view(n, *[1] * (y.ndim - 1))
        return y, counted


class _Gaussian(Likelihood):
    """Made by `gaussian`."""

    def __init__(
        self, outputs: Outputs, targets: Callable[[PyTree], Tensor], reduction: Sums
    ) -> None:
        super().__init__(outputs)
        self._targets, self._reduction = targets, reduction

    def losses(self, z: Tensor, batch: PyTree) -> Tensor:
        y = self._targets(batch)
        if y.shape != z.shape:
            raise BatchError(
                f"gaussian needs targets of the shape of the outputs, {tuple(z.shape)}; "
                f"targets(batch) gave {tuple(y.shape)}."
            )
        return (wide(z) - y).square().reshape(len(z), -1).sum(1) * self._weight(z)

    def draw(self, z: Tensor, batch: PyTree, generator: Generator) -> Tensor:
        noise = torch.randn(z.shape, generator=generator, dtype=wide(z).dtype, device=z.device)
        return (2 * self._weight(z)) ** 0.5 * noise

    def columns(self, z: Tensor, batch: PyTree) -> Iterator[Tensor]:
        for k in range(z[0].numel()):
            c = torch.zeros_like(wide(z)).reshape(len(z), -1)
            c[:, k] = (2 * self._weight(z)) ** 0.5
            yield c.view(z.shape)

    def hessian_product(self, z: Tensor, batch: PyTree, v: Tensor) -> Tensor:
        return 2 * self._weight(z) * wide(v)

    def _weight(self, z: Tensor) -> float:
        return 1.0 if self._reduction == "sum" else 1 / z[0].numel()


def softmax(
    outputs: Outputs,
    labels: Callable[[PyTree], Int[Tensor, "n ..."]],
    *,
    reduction: Sums = "mean",
    ignore_index: int = -100,
) -> Likelihood:
    """Cross-entropy of one class per position.

        losses[i] = sum_t w_it CE(z_it, y_it),    w_it = 1 / (positions that count), or 1 for "sum"

    Args:
        outputs: `outputs(params, batch) -> logits [n, ..., V]`, pure.
        labels: `labels(batch) -> [n, ...]`, integer classes.
        reduction: over the positions of a sample: "mean" (of those that count) or "sum".
        ignore_index: the label of positions that do not count.

    Returns:
        A `Likelihood`. Its labels are drawn from `softmax(logits)`.

    Example:
        `softmax(lambda p, b: functional_call(net, p, b["x"]), lambda b: b["y"])`
    """
    one_of("reduction", reduction, ("mean", "sum"))
    check_callable("labels", labels, "labels(batch) -> integer classes")
    check_number("ignore_index", ignore_index)
    return _Softmax(outputs, labels, reduction, ignore_index)


def gaussian(
    outputs: Outputs,
    targets: Callable[[PyTree], Float[Tensor, "n ..."]],
    *,
    reduction: Sums = "sum",
) -> Likelihood:
    """Squared error.

        losses[i] = w sum_k (z_ik - y_ik)^2,    w = 1, or 1 / (outputs per sample) for "mean"

    Args:
        outputs: `outputs(params, batch) -> z [n, ...]`, pure.
        targets: `targets(batch) -> [n, ...]`, of the shape of the outputs.
        reduction: over the outputs of a sample: "sum" or "mean".

    Returns:
        A `Likelihood`: a normal distribution of variance `1 / (2 w)` about every output. Its
        Hessian is `2 w I`.
    """
    one_of("reduction", reduction, ("mean", "sum"))
    check_callable("targets", targets, "targets(batch), of the shape of the outputs")
    return _Gaussian(outputs, targets, reduction)
