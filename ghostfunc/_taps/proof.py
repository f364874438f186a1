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
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ghostfunc._base.definition import weighted_gradient
from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import CoupledSamplesError
from ghostfunc._base.purity import check_finite, close, coupled_samples, distinct
from ghostfunc._base.remembered import memory, shapes_key
from ghostfunc._base.torch_private import symbolic, unrounded
from ghostfunc._base.trees import take, tensors_of
from ghostfunc._base.types import Check, ContractDtype, Randomness
from ghostfunc._taps.readings import Read, Reading, off_by
from ghostfunc._trace.find import Disproved, TracedModel
from ghostfunc._trace.trace import WayTaken

REMEMBERED = 4096
"""Proofs that are remembered of a model function. The oldest are forgotten, and made again."""

SEEDS = (0, 1)
"""A mismatch is looked at with other numbers before it counts: half a unit in the last place may
decide a comparison in the model, and did so in one of two runs."""

FLOOR = 0.02
"""Share of the largest parameter's numbers below which a parameter's are rounding noise."""

FEW = 2
"""Samples whose numbers are held against their definition."""

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
        self._turns = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> bool | None:
        """Whether it holds; None if nobody has looked."""
        with self._lock:
            if key not in self._found:
                return None
            self._found[key] = self._found.pop(key)  # the latest last
            return self._found[key]

    def turn(self) -> int:
        """A number that nobody was given before."""
        with self._lock:
            self._turns += 1
            return self._turns

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
        read: what the run read; asked for it `again`, what another run of this batch reads.
        asked: what tells what was read from other questions.
    """

    model: TracedModel
    way: WayTaken
    losses: Tensor
    dots: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    read: Callable[[bool], Read]
    asked: Callable[[], Hashable]

    @property
    def key(self) -> Hashable:
        return self.model.trace, self.way, shapes_key((self.model.batch, self.model.leaves))


def prove(claim: Claim, check: Check, randomness: Randomness) -> None:
    """Raise `Disproved` or `CoupledSamplesError` unless the claim holds, or was proved before.

    Programs that make numbers of several samples, or that may reorder them by their values, are
    proved in every run: other values make another program of them at the same shapes. So is a way
    through the program that no trace went, of which nobody has seen whether it does.

    What is known already is proved again with one sample, drawn at random, if that is to be done
    `"always"`: the numbers that were read of it, and its loss beside another sample.
    """
    model = claim.model
    if check == "never" or any(map(symbolic, tensors_of(model.batch))):
        return
    proofs: Proofs = memory(model.model_fn).setdefault("proofs", Proofs())
    keys = claim.key, (claim.key, claim.asked())
    gradients, numbers = map(proofs.get, keys)
    if gradients is False or numbers is False:
        raise Disproved(f"{NOT_THEIRS} (found before)")
    by_values = model.trace.statistics or (model.trace.reorders and model.n > 1)
    by_values |= not claim.way.same_ops and model.n > 1
    if gradients and numbers and check == "new" and not by_values:
        return
    check_finite(claim.losses)
    read = claim.read(False)
    few = FEW if numbers is None else int(check == "always")
    whole = gradients is None or by_values or (numbers is None and bool(read.sums))
    whole |= check == "always" and not read.readings
    turn = proofs.turn() if check == "always" else 0
    differ = model.n == 1 or distinct(model.batch)  # equal samples prove nothing
    questions = [(keys[0], _compare)] if whole else []
    questions += [(keys[1], partial(_compare_few, few=few, turn=turn))] if few else []
    for key, compare in questions:
        error = _mismatch(claim, compare, randomness)
        if isinstance(error, CoupledSamplesError):
            raise error
        if error is not None or differ:
            proofs.put(key, error is None)
        if error is not None:
            raise error


Compare: TypeAlias = Callable[[Claim, int, Randomness], CoupledSamplesError | Disproved | None]
"""Holds a claim against plain autograd, with random numbers of a seed."""


def _mismatch(
    claim: Claim, compare: Compare, randomness: Randomness
) -> CoupledSamplesError | Disproved | None:
    error = None
    for seed in SEEDS:
        with _draws(randomness, seed):
            error = compare(claim, seed, randomness)
        if error is None:
            return None
    return error


def _compare(
    claim: Claim, seed: int, randomness: Randomness
) -> CoupledSamplesError | Disproved | None:
    """What is wrong with the claim, seen along one direction."""
    model = claim.model
    generator = np.random.default_rng([seed, model.n])
    # numpy's numbers: torch draws none inside vmap.
    v = [torch.from_numpy(generator.standard_normal(x.shape)).to(x) for x in model.leaves]
    table = torch.stack([wide(x).detach().double().cpu() for x in claim.dots(v)])
    index = table.isfinite().all(0).nonzero().flatten().tolist()
    if not index:
        return None
    weights = _weights(table[:, index], generator)
    totals = [torch.zeros((), dtype=torch.float64) for _ in v]
    sizes = list(totals)
    for part in _parts(len(index), generator, whole=randomness == "different"):
        rows = [index[i] for i in part.rows]
        c = torch.where(torch.tensor(part.own), weights[part.rows], 0)
        grads = _alone(claim, rows, c, part.own, seed, randomness)
        if isinstance(grads, CoupledSamplesError):
            return grads
        with unrounded(claim.losses):
            for i, (g, u) in enumerate(zip(grads, v, strict=True)):
                g = wide(g).flatten()
                totals[i] = totals[i] + (g @ wide(u).flatten()).detach().double().cpu()
                sizes[i] = sizes[i] + g.norm().detach().double().cpu()
    terms, size = weights * table[:, index], _loss_sizes(claim.losses[index])
    noise = NOISE * torch.finfo(_coarsest(model)).eps * float((weights * size).norm())
    wrong = _judge(
        claim, range(len(v)), terms, torch.stack(totals), torch.stack(sizes), noise, None
    )
    return wrong or _compare_sums(claim, v, table, seed, randomness)


def _alone(
    claim: Claim,
    rows: list[int],
    weights: Tensor,
    own: list[bool],
    seed: int,
    randomness: Randomness,
) -> list[Tensor] | CoupledSamplesError:
    """`sum_i w_i g_i` of some rows by plain autograd, and whether the losses of those that are
    their `own` are the run's."""
    model = claim.model
    if randomness == "different":
        torch.manual_seed(seed)  # where the model draws, it draws the same
    batch = model.batch if rows == list(range(model.n)) else take(model.batch, rows)
    losses, grads = weighted_gradient(model.model_fn, model.leaves, model.spec, batch, weights)
    expected = claim.losses[rows].detach()
    mask = torch.tensor(own, device=losses.device)
    if randomness == "error" and not close(losses[mask], expected[mask], _coarsest(model)):
        return coupled_samples(
            f"in the batch, some samples have losses {expected[mask][:8].tolist()}; beside "
            f"other samples, they have {losses[mask][:8].tolist()}"
        )
    return grads


def _compare_sums(
    claim: Claim, v: Sequence[Tensor], table: Tensor, seed: int, randomness: Randomness
) -> Disproved | None:
    """What is wrong with sums over all samples, training gradients above all: their products with
    the direction are sums of those that were proved."""
    finite = bool(table.isfinite().all())
    for one in _read_by(claim, seed, randomness).sums if finite else ():
        scale = one.scale
        weights = scale.detach().double().cpu() if isinstance(scale, Tensor) else scale
        terms = (table[one.param] * weights)[None]
        g = wide(one.value).detach().flatten()
        with unrounded(g):
            total = (g @ wide(v[one.param]).flatten()).double().cpu()[None]
        if not bool(total.isfinite()):
            continue
        noise = NOISE * torch.finfo(_coarsest(claim.model)).eps
        noise *= float((_loss_sizes(claim.losses) * weights).norm())
        size = g.norm().double().cpu()[None]
        wrong = _judge(claim, [one.param], terms, total, size, noise, one.contract_dtype)
        if wrong is not None:
            return wrong
    return None


def _compare_few(
    claim: Claim, seed: int, randomness: Randomness, *, few: int, turn: int
) -> CoupledSamplesError | Disproved | None:
    """What is wrong with the numbers that were read of a few samples."""
    model = claim.model
    read = _read_by(claim, seed, randomness)
    if not read.readings:
        return None
    drawn = np.random.default_rng([model.n, turn])
    finite = read.losses[: min(r.samples or model.n for r in read.readings)].isfinite()
    chosen = sorted(drawn.permutation(finite.nonzero().flatten().tolist())[:few].tolist())
    if not chosen:
        return None
    others = [i for i in range(model.n) if i not in chosen]
    beside = np.random.default_rng([seed, turn]).permutation(others)[: max(0, 2 - len(chosen))]
    rows = [*chosen, *beside.tolist()]
    if randomness == "different":
        rows = list(range(model.n))
    found: list[list[Tensor]] = []
    for i in chosen:
        weights = torch.tensor([float(j == i) for j in rows], dtype=torch.float64)
        grads = _alone(claim, rows, weights, [True] * len(rows), seed, randomness)
        if isinstance(grads, CoupledSamplesError):
            return grads
        found.append(grads)
    index = torch.tensor(chosen, device=read.losses.device)
    with unrounded(read.losses):
        grads = [torch.stack(column).detach() for column in zip(*found, strict=True)]
        for reading in read.readings:
            wrong = _judge_reading(claim, reading, grads, index, seed, randomness)
            if wrong is not None:
                return wrong
    return None


def _judge_reading(
    claim: Claim,
    reading: Reading,
    grads: Sequence[Tensor],
    index: Tensor,
    seed: int,
    randomness: Randomness,
) -> CoupledSamplesError | Disproved | None:
    model, company = claim.model, None
    if reading.samples is not None:
        rows = list(range(reading.samples, model.n))
        weights = torch.ones(len(rows), dtype=torch.float64)
        if isinstance(reading.scale, Tensor):
            weights = reading.scale[rows].detach().double().cpu()
        total = _alone(claim, rows, weights, [True] * len(rows), seed, randomness)
        if isinstance(total, CoupledSamplesError):
            return total
        company = [wide(x) for x in total]
    tolerance = _tolerance(model, reading.contract_dtype)
    norms = torch.stack([wide(g).flatten(1).norm(dim=1).double() for g in grads])
    reach = tolerance * torch.maximum(norms, FLOOR * norms.max(0).values)
    noise = NOISE * torch.finfo(_coarsest(model)).eps * _loss_sizes(claim.losses[index])
    reach = torch.maximum(reach, noise.to(reach))
    wrong = off_by(reading, grads, company, index, reach, tolerance)
    if not wrong:
        return None
    names = {i: repr(name) for i, name in enumerate(model.spec.names)}
    listed = ", ".join(names.get(i, "all of them") for i in list(wrong)[:5])
    worst = max(wrong.values())
    return Disproved(f"{NOT_THEIRS} at parameter {listed} ({reading.what} off by {worst:.1e})")


def _read_by(claim: Claim, seed: int, randomness: Randomness) -> Read:
    """What the run read; of models that draw random numbers, what another run reads that draws as
    plain autograd will."""
    if randomness == "error":
        return claim.read(False)
    torch.manual_seed(seed)
    return claim.read(True)


def _loss_sizes(losses: Tensor) -> Tensor:
    return losses.detach().abs().clamp_min(1).double().cpu()


def _judge(
    claim: Claim,
    params: Sequence[int],
    terms: Tensor,
    totals: Tensor,
    sizes: Tensor,
    noise: float,
    contract_dtype: ContractDtype,
) -> Disproved | None:
    """Whether `sum_i c_i s_ip` and `t_p` agree. `terms` are `c_i s_ip`, `[P, n]`."""
    names = [claim.model.spec.names[i] for i in params]
    tolerance = _tolerance(claim.model, contract_dtype)
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


def _tolerance(model: TracedModel, contract_dtype: ContractDtype) -> float:
    return max(TOLERANCES[x] for x in {_coarsest(model), contract_dtype} & TOLERANCES.keys())


@contextlib.contextmanager
def _draws(randomness: Randomness, seed: int) -> Iterator[None]:
    """For models that draw random numbers, a state of the generators of their own."""
    if randomness == "error":
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
