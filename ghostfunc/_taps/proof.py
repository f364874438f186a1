"""Proof that a run's numbers are those of plain autograd.

A trace is made of a few samples. What it says of other batches (where samples lie, whose row is
whose, that samples do not talk to each other) is held against an oracle that knows no rule, no
layout and no tap, whenever something is new: the way through the program, the numbers among the
arguments of its ops, the values that Python reads, or the shapes.

    taps:             s_ip = <g_i^p, v^p>               for every sample i and parameter p
    plain autograd:   t_p  = <sum_i c_i g_i^p, v^p>     one backward pass, with random weights c
    proved:           sum_i c_i s_ip = t_p              for every parameter p

`v` is a random direction. The weights `c_i` are random too, and as large as `1 / |s_i|`, so that a
sample with a large gradient hides no other. Plain autograd runs the samples in two random halves:
their losses are compared in another company at the same time.

One direction cannot see everything:

- Gradients that are themselves rounding noise: below 16 units in the last place of their loss.
- What is wrong by less than the tolerance, relative to the parameter's own numbers or to a fiftieth
  of the largest parameter's. The tolerance follows the coarsest dtype of the run: 1e-8 in float64,
  2e-3 in float32, 0.1 in half precision, where errors of single samples in large batches pass.
- What this batch does not show: an op whose rows are exchanged while their values are equal; a
  branch that is not taken, or that reads values behind torch's back (through a pointer). Values
  that torch hands to Python are part of what is proved.
- Coupling that is the same in both halves as in the whole.
- Readers other than `Dot`. Norms, Gram matrices and projections read the same factors; their own
  mistakes (a transpose forgotten) are for the tests: every quantity is in every problem there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ghostfunc._base.definition import weighted_gradient
from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import CoupledSamplesError
from ghostfunc._base.purity import (
    check_finite,
    close,
    coupled_samples,
    distinct,
    prove_independent,
    were_compared,
)
from ghostfunc._base.remembered import memory
from ghostfunc._base.torch_private import any_symbolic, unrounded
from ghostfunc._base.trees import take, tensors_of
from ghostfunc._base.types import Check, Randomness
from ghostfunc._trace.find import Disproved, TracedModel
from ghostfunc._trace.trace import WayTaken

REMEMBERED = 4096
"""Proofs that are remembered of a model function. The oldest are forgotten, and made again."""

SEEDS = (0, 1)
"""A mismatch is looked at with other numbers before it counts: half a unit in the last place may
decide a comparison in the model, and did so in one of two runs."""

FLOOR = 0.02
"""Share of the largest parameter's numbers below which a parameter's are rounding noise."""


TOLERANCES = {
    torch.float64: 1e-8,
    torch.float32: 2e-3,
    torch.bfloat16: 0.1,
    torch.float16: 0.1,
}
"""Relative errors that are rounding, by the coarsest dtype of a run."""

NOT_THEIRS = "The numbers of ghost mode are not those of plain autograd"


NOISE = 16
"""Units in the last place of a loss, or of one, that a derivative of it may be rounded by."""


class Proofs:
    """What has been proved and disproved of one model function."""

    def __init__(self) -> None:
        self._found: dict[Hashable, bool] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> bool | None:
        """Whether it holds; None if nobody has looked."""
        with self._lock:
            if key not in self._found:
                return None
            self._found[key] = self._found.pop(key)  # the latest last
            return self._found[key]

    def put(self, key: Hashable, holds: bool) -> None:
        with self._lock:
            self._found[key] = holds
            while len(self._found) > REMEMBERED:
                del self._found[next(iter(self._found))]


@dataclass(frozen=True)
class Claim:
    """A run, and what is claimed of it.

    Attributes:
        way: what tells its way through the program from others.
        losses: `[n]`.
        dots: makes `<g_i^p, v^p>` with the run's trace, `[n]` for every parameter.
    """

    model: TracedModel
    way: WayTaken
    losses: Tensor
    dots: Callable[[Sequence[Tensor]], Sequence[Tensor]]

    @property
    def key(self) -> Hashable:
        return self.model.trace, self.way, self.model.shapes


def prove(claim: Claim, check: Check, randomness: Randomness) -> None:
    """Raise `Disproved` or `CoupledSamplesError` unless the claim holds, or was proved before.

    Programs that make numbers of several samples, or that may reorder them by their values, are
    proved in every run: other values make another program of them at the same shapes. So is a way
    through the program that no trace went, of which nobody has seen whether it does.
    """
    model = claim.model
    if any_symbolic(tensors_of(model.batch)):
        return
    if check == "never":
        _prove_independent(model, randomness)
        return
    proofs: Proofs = memory(model.model_fn).setdefault("proofs", Proofs())
    known = proofs.get(claim.key)
    if known is False:
        raise Disproved(f"{NOT_THEIRS} (found before)")
    by_values = model.trace.statistics or (model.trace.reorders and model.n > 1)
    by_values |= not claim.way.same_ops and model.n > 1
    if known and check == "new" and not by_values:
        return
    check_finite(claim.losses)
    error = _mismatch(claim, randomness)
    if isinstance(error, CoupledSamplesError):
        raise error
    if error is not None or model.n == 1 or distinct(model.batch):  # equal samples prove nothing
        proofs.put(claim.key, error is None)
        if error is None:
            were_compared(model.model_fn, model.leaves, model.spec, model.batch, randomness)
    if error is not None:
        raise error


def _prove_independent(model: TracedModel, randomness: Randomness) -> None:
    """By losses alone, where nothing else compares those of the whole batch."""
    prove_independent(model.model_fn, model.leaves, model.spec, model.batch, randomness)


def _mismatch(claim: Claim, randomness: Randomness) -> CoupledSamplesError | Disproved | None:
    error = None
    for seed in SEEDS:
        with _draws(randomness, seed):
            error = _compare(claim, np.random.default_rng([seed, claim.model.n]), randomness)
        if error is None:
            return None
    return error


def _compare(
    claim: Claim, generator: np.random.Generator, randomness: Randomness
) -> CoupledSamplesError | Disproved | None:
    """What is wrong with the claim, seen along one direction."""
    model = claim.model
    # numpy's numbers: torch draws none inside vmap.
    v = [torch.from_numpy(generator.standard_normal(x.shape)).to(x) for x in model.leaves]
    states = torch.get_rng_state()
    table = torch.stack([wide(x).detach().double().cpu() for x in claim.dots(v)])
    index = table.isfinite().all(0).nonzero().flatten().tolist()
    if not index:
        _prove_independent(model, randomness)
        return None
    weights = _weights(table[:, index], generator)
    torch.set_rng_state(states)  # where the model draws, it draws the same
    totals = [torch.zeros((), dtype=torch.float64) for _ in v]
    sizes = list(totals)
    for part in _parts(len(index), generator, whole=randomness == "different"):
        rows = [index[i] for i in part.rows]
        batch = model.batch if rows == list(range(model.n)) else take(model.batch, rows)
        c = torch.where(torch.tensor(part.own), weights[part.rows], 0)
        losses, grads = weighted_gradient(model.model_fn, model.leaves, model.spec, batch, c)
        expected = claim.losses[rows].detach()
        own = torch.tensor(part.own, device=losses.device)
        if randomness == "error" and not close(losses[own], expected[own], _coarsest(model)):
            return coupled_samples(
                f"in the batch, some samples have losses {expected[own][:8].tolist()}; beside "
                f"other samples, they have {losses[own][:8].tolist()}"
            )
        with unrounded(losses):
            for i, (g, u) in enumerate(zip(grads, v, strict=True)):
                g = wide(g).flatten()
                totals[i] = totals[i] + (g @ wide(u).flatten()).detach().double().cpu()
                sizes[i] = sizes[i] + g.norm().detach().double().cpu()
    size = claim.losses[index].detach().abs().clamp_min(1).double().cpu()
    noise = NOISE * torch.finfo(_coarsest(model)).eps * float((weights * size).norm())
    return _judge(claim, weights * table[:, index], torch.stack(totals), torch.stack(sizes), noise)


def _judge(
    claim: Claim, terms: Tensor, totals: Tensor, sizes: Tensor, noise: float
) -> Disproved | None:
    """Whether `sum_i c_i s_ip` and `t_p` agree. `terms` are `c_i s_ip`, `[P, n]`."""
    names, tolerance = claim.model.spec.names, TOLERANCES[_coarsest(claim.model)]
    scales = terms.square().sum(1).sqrt() + sizes
    limits = (tolerance * torch.maximum(scales, FLOOR * scales.max())).clamp_min(noise)
    errors = (terms.sum(1) - totals).abs()
    bad = (~(errors <= limits)).nonzero().flatten().tolist()
    if not bad:
        return None
    listed = ", ".join(repr(names[p]) for p in bad[:5])
    worst = max(float(errors[p] / scales[p].clamp_min(1e-300)) for p in bad)
    return Disproved(f"{NOT_THEIRS} at parameter {listed} (off by {worst:.1e})")


def _weights(table: Tensor, generator: np.random.Generator) -> Tensor:
    """Random weights that make the samples' numbers equally large."""
    size = table.square().sum(0).sqrt()
    seen = size[size > 0]
    typical = seen.log().mean().exp() if len(seen) else size.new_ones(())
    least = typical * torch.finfo(torch.float32).eps ** 0.5
    signs = torch.from_numpy(generator.choice([-1.0, 1.0], len(size)))
    return (
        signs
        * torch.from_numpy(generator.uniform(0.5, 1.5, len(size)))
        * (typical / size.clamp_min(least))
    )


class _Part(NamedTuple):
    """Samples that are run together, and which of them count."""

    rows: list[int]
    own: list[bool]


def _parts(n: int, generator: np.random.Generator, *, whole: bool) -> list[_Part]:
    """Every sample once, in two random halves of two samples at least: code may treat a batch of
    one in its own way."""
    if whole or n == 1:
        return [_Part(list(range(n)), [True] * n)]
    if n == 2:
        return [_Part([i, i], [True, False]) for i in range(n)]
    order = generator.permutation(n).tolist()
    parts = []
    for own in (order[: n // 2], order[n // 2 :]):
        others = [i for i in order if i not in own][: max(0, 2 - len(own))]
        rows = sorted([*own, *others])
        parts.append(_Part(rows, [i in own for i in rows]))
    return parts


def _coarsest(model: TracedModel) -> torch.dtype:
    """The dtype of the run with the fewest digits."""
    dtypes = {x.dtype for x in model.leaves} | model.trace.dtypes
    return max(dtypes & TOLERANCES.keys(), key=lambda x: torch.finfo(x).eps)


@contextlib.contextmanager
def _draws(randomness: Randomness, seed: int) -> Iterator[None]:
    """For models that draw random numbers, a state of the generators of their own."""
    if randomness == "error":
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
