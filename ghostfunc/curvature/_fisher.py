"""Which gradients a curvature is the second moment of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import NonFiniteLossError, OptionError
from ghostfunc._base.losses import check_losses, close
from ghostfunc._base.options import one_of
from ghostfunc._base.processes.pieces import refuse_pieces
from ghostfunc._base.text_number import number_of_text
from ghostfunc._base.trees import batch_size
from ghostfunc._base.types import ModelFn, PyTree
from ghostfunc.curvature._errors import check_count
from ghostfunc.curvature._likelihood import Likelihood

Fisher: TypeAlias = Literal["sampled", "empirical", "exact"]


class Scored:
    """`<z_i, c_i>` for given cotangents c of the outputs z: its gradient is `J^T c_i`."""

    def __init__(self, likelihood: Likelihood) -> None:
        self._outputs = likelihood.outputs

    def __call__(self, params: PyTree, batch: PyTree) -> Tensor:
        data, cotangents = batch
        products = wide(self._outputs(params, data)) * cotangents
        return products.reshape(len(products), -1).sum(1)


@dataclass(frozen=True)
class Gradients:
    """The gradients of one data set whose second moment is wanted.

    Attributes:
        model_fn: the losses.
        likelihood: how they are made of outputs; None for the empirical Fisher.
        fisher: "sampled", "empirical" or "exact".
        draws: how many times labels are drawn for every sample.
        seed: of the draws: those for one batch depend on it and on the batch's number alone.
        scored: the function of `runs` where it is not `model_fn`.
    """

    model_fn: ModelFn
    likelihood: Likelihood | None
    fisher: Fisher
    draws: int
    seed: int
    scored: Scored | None

    @staticmethod
    def of(
        model_fn: ModelFn, likelihood: Likelihood | None, fisher: Fisher, draws: int, seed: int
    ) -> Gradients:
        """Validated options."""
        refuse_pieces(model_fn, "gf.curvature")
        one_of("fisher", fisher, ("sampled", "empirical", "exact"))
        if fisher == "empirical" and (likelihood is not None or draws != 1):
            raise OptionError(
                'fisher="empirical" takes the gradients of the losses as they are: it needs '
                "neither a likelihood nor draws."
            )
        if fisher != "empirical" and not isinstance(likelihood, Likelihood):
            raise OptionError(
                f"fisher={fisher!r} needs labels from the model's own distribution, and a loss "
                "alone does not tell it: pass likelihood=gf.curvature.softmax(outputs, labels) or "
                'gf.curvature.gaussian(outputs, targets). Or use fisher="empirical".'
            )
        check_count("draws", draws)
        if fisher == "exact" and draws != 1:
            raise OptionError('fisher="exact" draws nothing: leave draws at 1.')
        if type(seed) is not int:
            raise OptionError(f"seed={seed!r} must be an integer.")
        scored = None if likelihood is None else Scored(likelihood)
        return Gradients(model_fn, likelihood, fisher, draws, seed, scored)

    def runs(
        self, params: PyTree, batch: PyTree, number: int, *, checked: bool = False
    ) -> Iterator[tuple[ModelFn, PyTree]]:
        """Functions and batches, the sum of whose gradients' second moments is wanted, `draws`
        times over. `checked`: this batch has been looked at."""
        if self.likelihood is None or self.scored is None:
            yield self.model_fn, batch
            return
        z = _outputs(self.likelihood, params, batch)
        if not checked:
            self._compare(self.likelihood, z, params, batch)
        if self.fisher == "exact":
            for c in self.likelihood.columns(z, batch):
                yield self.scored, (batch, c)
            return
        for draw in range(self.draws):
            generator = torch.Generator(z.device)
            generator.manual_seed(_stream(self.seed, number, draw))
            yield self.scored, (batch, self.likelihood.draw(z, batch, generator))

    def check(self, params: PyTree, batch: PyTree) -> None:
        """Raise unless the likelihood makes the losses of `model_fn`."""
        if self.likelihood is not None:
            z = _outputs(self.likelihood, params, batch)
            self._compare(self.likelihood, z, params, batch)

    def _compare(self, likelihood: Likelihood, z: Tensor, params: PyTree, batch: PyTree) -> None:
        with torch.no_grad():
            expected = check_losses(self.model_fn(params, batch), batch_size(batch))
            found = likelihood.losses(z, batch)
        if found.shape == expected.shape and close(found.to(expected.dtype), expected):
            return
        first = 0
        if found.shape == expected.shape:
            pairs = zip(found.to(expected.dtype), expected, strict=True)
            first = next((i for i, (x, y) in enumerate(pairs) if not close(x, y)), 0)
        raise OptionError(
            "likelihood is not that of model_fn: samples from number "
            f"{first} of a batch on have losses {expected[first : first + 4].tolist()}, and the "
            f"likelihood {found.flatten()[first : first + 4].tolist()}. Its outputs, labels, "
            "weights and reduction must be those of the loss, or no label can be drawn."
        )


def _outputs(likelihood: Likelihood, params: PyTree, batch: PyTree) -> Tensor:
    with torch.no_grad():
        z: object = likelihood.outputs(params, batch)
    n = batch_size(batch)
    if not isinstance(z, Tensor) or z.ndim == 0 or len(z) != n:
        found = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise OptionError(
            f"likelihood.outputs must return a tensor [{n}, ...], a row per sample; got {found}."
        )
    finite = z.reshape(n, -1).isfinite().all(1)
    if not bool(finite.all()):
        raise NonFiniteLossError(
            f"the outputs of samples {(~finite).nonzero().flatten().tolist()[:5]} are not finite, "
            "so no label can be drawn from them. Check the inputs and the parameters."
        )
    return z


def _stream(seed: int, number: int, draw: int) -> int:
    """The seed of one batch's draw."""
    return number_of_text(f"ghostfunc curvature {seed} {number} {draw}")
