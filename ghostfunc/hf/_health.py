"""The health of a Trainer's gradients, as a callback."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback

from ghostfunc._base.errors import OptionError
from ghostfunc._transforms.health import Health, by_layer, underflows
from ghostfunc.hf._micro_batch import Values


class HealthCallback(TrainerCallback):
    """Logs the noise scale of the gradients, conflicts between samples, and norms.

        health = gf.hf.HealthCallback()
        trainer = gf.hf.GhostTrainer(..., callbacks=[health])
        trainer.train()
        trainer.state.log_history       # health/noise_scale, health/conflicting, health/norm_q50
        health.last.largest()           # of the last step: the ids of the largest gradients

    It reads `||g_i||^2` and `<g_i, sum_j g_j>` in the pass that trains (`gf.Spread`): the products
    are those of the training gradient and no more. With g_i the gradient of a sample's share of the
    step's loss, times the number N of samples of the step, so that their mean is the step's G:

        noise         `N / (N - 1) (mean_i ||g_i||^2 - ||G||^2)`, unbiased for tr(Sigma)
        signal        `(N ||G||^2 - mean_i ||g_i||^2) / (N - 1)`, unbiased for |G|^2
        noise_scale   of both, averaged over the steps since the last log: tr(Sigma) / |G|^2
        conflicting   the share of samples with `<g_i, sum_{j != i} g_j> < 0`, j among the samples
                      of the same micro-batch; not logged where micro-batches have one sample
        norm_...      quantiles of `||g_i||`, and the largest
        largest_id    the id of that sample, where ids are integers

    A step of a single sample has norms and no noise. A step whose squares underflow (losses times
    1e-20 in float32) has neither.

    Args:
        layers: log the same of every module with parameters of its own,
            `health/<name>/noise_scale`.

    Attributes:
        last: the `gf.Health` of the last step; None before it.

    Raises:
        OptionError: at the start of a training with another trainer than `gf.hf.GhostTrainer` or
            one with `gf.hf.GhostMixin`: a plain Trainer's step has no gradients of samples.

    Reference:
        McCandlish et al., "An Empirical Model of Large-Batch Training", 2018.
    """

    def __init__(self, *, layers: bool = False) -> None:
        self.last: Health | None = None
        self._layers = layers
        self._steps: list[Health] = []
        self._read = False

    def begin(self) -> None:
        """A trainer that reads what this logs begins a run."""
        self.last, self._steps, self._read = None, [], True

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Refuse trainers whose steps have no gradients of samples."""
        if not self._read:
            raise OptionError(
                "HealthCallback reads gradients of samples, which a plain Trainer's step does not "
                "have: use it with gf.hf.GhostTrainer, or put gf.hf.GhostMixin before your "
                "trainer's class. In a loop of your own, use gf.ghost_health and gf.health."
            )

    def add(self, values: Sequence[Values], squares: Mapping[str, Tensor]) -> None:
        """One optimizer step: its micro-batches, and `||G||^2` of every parameter."""
        given = [x.spread for x in values if x.spread is not None]
        tables, dtype = [x.double().cpu() for x in given], given[0].dtype
        ids = tuple(i for x in values for i in x.ids.tolist())
        whole = torch.stack([x.double().cpu() for x in squares.values()])
        groups = by_layer(list(squares))
        layers = {
            k: _of_step(ids, [t[:, i] for t in tables], whole[i], dtype) for k, i in groups.items()
        }
        self.last = _of_step(ids, tables, whole, dtype, layers)
        self._steps.append(self.last)

    def taken(self) -> dict[str, float]:
        """The numbers of the steps since they were last taken."""
        if not self._steps:
            return {}
        pooled, self._steps = _pooled(self._steps), []
        out = pooled.as_dict(layers=self._layers)
        ((largest, _),) = pooled.largest(1)
        if isinstance(largest, int):
            out["health/largest_id"] = largest
        return {k: x for k, x in out.items() if not math.isnan(x)}


def _of_step(
    ids: tuple[int | str, ...],
    tables: Sequence[Float[Tensor, "n params 2"]],
    whole: Float[Tensor, " params"],
    dtype: torch.dtype,
    layers: dict[str, Health] | None = None,
) -> Health:
    n = len(ids)
    summed = [t.sum(1) for t in tables]
    squares = torch.cat([t[:, 0] for t in summed]) * n**2
    against = [(t[:, 1] < t[:, 0]).double() for t in summed if len(t) > 1]
    mean, total = float(squares.mean()), float(whole.sum())
    if underflows(squares, dtype) and max(mean, total) > 0:
        squares, mean = squares * math.nan, math.nan
    return Health(
        noise=n / (n - 1) * (mean - total) if n > 1 else math.nan,
        signal=(n * total - mean) / (n - 1) if n > 1 else math.nan,
        conflicting=float(torch.cat(against).mean()) if against else math.nan,
        norms=squares.clamp(min=0).sqrt(),
        ids=ids,
        layers=layers or {},
    )


def _pooled(steps: Sequence[Health]) -> Health:
    """Several steps as one: means of noise, signal and conflicts, and all samples."""

    def mean(numbers: Sequence[float]) -> float:
        known = [x for x in numbers if not math.isnan(x)]
        return sum(known) / len(known) if known else math.nan

    return Health(
        noise=mean([x.noise for x in steps]),
        signal=mean([x.signal for x in steps]),
        conflicting=mean([x.conflicting for x in steps]),
        norms=torch.cat([x.norms for x in steps]),
        ids=tuple(i for x in steps for i in x.ids),
        layers={k: _pooled([x.layers[k] for x in steps]) for k in steps[0].layers},
    )
