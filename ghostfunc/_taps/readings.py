"""Readings: what a run read, beside the same numbers made of whole gradients.

The proof along one direction covers gradients. What else is read off the same factors (norms, Gram
matrices, projections, scores that stay factored, kept factors) is held against its definition, for
two samples drawn at random:

    plain autograd:   g_i                          one backward pass with all weight on sample i
    definition:       what the reader of the parameter itself reads off `Dense(g_i)`
    proved:           the run's own number is that

`Dense(g_i)` takes no way through derived tensors, has one use, no positions and no fold, so it
shares no shortcut with the run; scores, norms and Gram matrices are plain products of it. How far
rounding may move a number is seen, not guessed: where one is off by more than the tolerance, its
definition is asked again for gradients that are off by that much, in a few directions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghostfunc._base.dtypes import lengths, squared_norms, wide
from ghostfunc._base.torch_private import batched_within
from ghostfunc._base.trees import tensors_of
from ghostfunc._base.types import ContractDtype
from ghostfunc._factors import bundles, contract, matmul
from ghostfunc._factors.factor import Dense, Factor
from ghostfunc._factors.parts import Part, in_order
from ghostfunc._quantities.quantity import Gram, Quantity, SqNorm
from ghostfunc._quantities.readers import (
    DeferredGradients,
    DeferredReader,
    DotReader,
    MomentReader,
    OneRunReader,
    PairReader,
    PositionsReader,
    TotalReader,
    ValueReader,
)

Define = Callable[[Tensor, Tensor | None], Tensor]
"""A parameter's numbers, from some samples' gradients `[s, *shape]` and the others' sum."""

Pick = Callable[[Tensor], Tensor]
"""The run's own numbers of the samples that are asked for, `[s, ...]`."""

Again = Callable[..., Any]
"""Another run of the same batch, with another `scale`."""


class Numbers(NamedTuple):
    """One parameter's numbers: by definition, and as the run has them."""

    define: Define
    pick: Pick


class Reading(NamedTuple):
    """What a run read of one quantity.

    Attributes:
        what: its name.
        degree: 1 if it is linear in the gradient.
        numbers: by parameter.
        total: picks the sum over parameters, where the run has nothing else.
        pairs: whether it relates samples to each other, `[s, s]`.
        samples: how many of the batch's samples it is of: dots with the sum of the others. None for
            all.
        scale: of the gradients that it is of, one number or one per sample.
        contract_dtype: what its products are rounded to.
    """

    what: str
    degree: int
    numbers: dict[int, Numbers]
    total: Pick | None = None
    pairs: bool = False
    samples: int | None = None
    scale: float | Tensor = 1.0
    contract_dtype: ContractDtype = None


class Sum(NamedTuple):
    """`sum_i scale_i g_i` of one parameter, as the run has it."""

    param: int
    value: Tensor
    scale: float | Tensor
    contract_dtype: ContractDtype = None


@dataclass(frozen=True)
class Read:
    """All that a run read.

    Attributes:
        losses: `[n]`.
        readings: numbers of single samples or of pairs, and moments, which are sums over samples of
            functions of their gradients.
        sums: sums of the gradients themselves, over all samples.
    """

    losses: Tensor
    readings: list[Reading]
    sums: list[Sum]


def reading_of(
    quantity: Quantity,
    readers: Sequence[Any],
    values: Sequence[Tensor | None],
    *,
    scale: float | Tensor = 1.0,
    summed: bool = False,
) -> Reading | None:
    """The reading of a quantity that is to be proved, or None in these cases.

    Sums over samples, positions, and relations between samples other than Gram matrices are no
    functions of single gradients. Vmap may have several values in one. Squares of rounded products
    may cancel. No parameter may add to the sum over parameters.
    """
    if isinstance(scale, float):
        scale = 1.0  # values are not scaled by a single number
    if any(batched_within(x) for x in (*values, scale) if isinstance(x, Tensor)):
        return None
    numbers: dict[int, Numbers] = {}
    samples, pairs, contract_dtype = None, False, quantity.contract_dtype
    for i, reader in enumerate(readers):
        match reader:
            case None | TotalReader() | PositionsReader():
                continue
            case ValueReader(quantity=of) if of.pairs_samples and not isinstance(of, Gram):
                continue
            case ValueReader(quantity=of):
                pairs = of.pairs_samples
                contract_dtype = contract_dtype or of.contract_dtype
            case _:
                contract_dtype = contract_dtype or reader.contract_dtype
        if isinstance(reader, OneRunReader):
            samples = reader.n
        numbers[i] = Numbers(_defined(reader), _picked(None if summed else values[i], pairs=pairs))
    if not numbers or (contract_dtype is not None and quantity.degree > 1 and samples is None):
        return None  # no parameter has a number, or rounded squares have them, which may cancel
    degree = 1 if samples is not None else quantity.degree
    if summed and not values:
        return None
    total = _picked(values[0], pairs=pairs) if summed else None
    name = type(next(x for x in readers if x is not None)).__name__
    what = {"ValueReader": type(quantity).__name__}.get(name, name.removesuffix("Reader"))
    return Reading(what, degree, numbers, total, pairs, samples, scale, contract_dtype)


def reading_of_moments(
    number: int, readers: Sequence[Any], scale: float | Tensor, n: int, again: Again
) -> Reading:
    """Sums over samples of one quantity, each of a function of its gradient: those of a run in
    which all samples but those that are asked for weigh nothing."""
    runs: dict[tuple[int, ...], Any] = {}

    def picked(i: int) -> Pick:
        def pick(index: Tensor) -> Tensor:
            chosen = tuple(index.tolist())
            if chosen not in runs:
                weights = torch.zeros(n, device=index.device)
                weights[index] = 1.0
                weights = scale * weights if isinstance(scale, Tensor) else weights
                runs[chosen] = again(scale=weights).values[number]
            value: Tensor = runs[chosen][i]
            return value

        return pick

    numbers = {
        i: Numbers(_defined(reader), picked(i))
        for i, reader in enumerate(readers)
        if isinstance(reader, MomentReader)
    }
    return Reading("moments", 2, numbers, scale=scale if isinstance(scale, Tensor) else 1.0)


class KeptPart(NamedTuple):
    """The factors of some of a run's samples.

    Attributes:
        samples: which they are; None for all.
        factors: of every parameter, one per use.
    """

    samples: Tensor | None
    factors: list[list[Factor]]

    def of(self, i: int) -> Part:
        """Parameter i's."""
        return Part(self.samples, self.factors[i])


def _formed_of_parts(parts: Sequence[KeptPart], i: int, shape: tuple[int, ...]) -> Pick:
    def pick(index: Tensor) -> Tensor:
        pieces = []
        for samples, factors in parts:
            assert samples is not None
            place, own = (index[:, None] == samples).nonzero().unbind(1)
            if len(own):
                pieces.append((place, _materialized(factors[i], shape)(own)))
        return in_order(pieces)

    return pick


def reading_of_factors(
    bundles_of: Sequence[Sequence[Factor]],
    deferred: Sequence[DeferredGradients | None],
    shapes: Sequence[tuple[int, ...]],
    scale: float | Tensor,
    parts: Sequence[KeptPart] = (),
) -> Reading:
    """The factors that a run kept, of `scale * g_i`, of all samples or in parts."""
    numbers: dict[int, Numbers] = {}
    for i, later in enumerate(deferred):
        if later is not None:
            numbers[i] = Numbers(_itself, _formed(later, shapes[i]))
        elif bundles_of[i]:
            numbers[i] = Numbers(_itself, _materialized(bundles_of[i], shapes[i]))
        elif parts and parts[0].factors[i]:
            numbers[i] = Numbers(_itself, _formed_of_parts(parts, i, shapes[i]))
    return Reading("the factors", 1, numbers, scale=scale)


def _itself(g: Tensor, company: Tensor | None) -> Tensor:
    return g


def _defined(reader: Any) -> Define:
    wider = [x.dtype for x in tensors_of(reader) if x.is_floating_point()]

    def define(g: Tensor, company: Tensor | None) -> Tensor:
        g = g.to(functools.reduce(torch.promote_types, wider, g.dtype))
        flat = g.reshape(len(g), g[0].numel())
        match reader:
            case OneRunReader():
                assert company is not None
                return matmul.dots(flat, company.flatten().to(flat))
            case DotReader(u=u):
                return matmul.dots(flat, u.flatten().to(flat))
            case PairReader(factors=factors, each=each) if factors:
                dots = [contract.add_up([bundles.dot(f, one) for f in factors]) for one in g]
                return torch.stack([x if each else x.sum() for x in dots])
            case DeferredReader(deferred=deferred, m=m):
                columns = [
                    matmul.dots(flat, deferred.gradient(j).flatten().to(flat)) for j in range(m)
                ]
                return torch.stack(columns, dim=1)
            case MomentReader():
                return reader.define(g)
            case ValueReader(quantity=SqNorm()):
                return flat.square().sum(1)
            case ValueReader(quantity=Gram()):
                return matmul.inner_products(flat, flat)
        read: Tensor = reader.read(Dense(g))
        return read

    return define


def _picked(value: Tensor | None, *, pairs: bool) -> Pick:
    def pick(index: Tensor) -> Tensor:
        assert value is not None
        return value[index][:, index] if pairs else value[index]

    return pick


def _formed(deferred: DeferredGradients, shape: tuple[int, ...]) -> Pick:
    return lambda index: torch.stack([deferred.gradient(j).reshape(shape) for j in index.tolist()])


def _materialized(bundle: Sequence[Factor], shape: tuple[int, ...]) -> Pick:
    def pick(index: Tensor) -> Tensor:
        few = [contract.materialize(bundles.take(f, index)) for f in bundle]
        return contract.add_up([x.reshape(len(index), *shape) for x in few])

    return pick


def what_was_read(
    quantities: Sequence[Quantity],
    summed: Collection[int],
    scale: float | Tensor,
    leaves: Sequence[Tensor],
    taken: Any,
    again: Again,
) -> Read:
    """All that a run read, to be proved.

    Args:
        quantities, summed, scale, leaves: what the run was asked for, as `run` has it.
        taken: its `RunResult`.
        again: makes another one, with another scale.
    """
    readings: list[Reading | None] = []
    sums = []
    for i, g in enumerate(taken.grads):
        if g is not None:
            of_param = [readers[i] for readers in taken.readers]
            first = [r.n for r in of_param if isinstance(r, OneRunReader)]
            sums.append(Sum(i, g, _of_the_first(scale, first[0]) if first else scale))
    rows = zip(quantities, taken.readers, taken.values, strict=True)
    for number, (quantity, readers, values) in enumerate(rows):
        of = reading_of(quantity, readers, values, scale=scale, summed=number in summed)
        readings.append(of)
        if any(isinstance(x, MomentReader) for x in readers):
            readings.append(reading_of_moments(number, readers, scale, len(taken.losses), again))
        for i, reader in enumerate(readers):
            if isinstance(reader, TotalReader):
                own = scale if isinstance(scale, Tensor) else 1.0
                sums.append(Sum(i, values[i], own, reader.contract_dtype))
    shapes = [tuple(x.shape) for x in leaves]
    kept = taken.factors, taken.deferred, shapes, scale, taken.parts
    readings.append(reading_of_factors(*kept))
    return Read(taken.losses, [x for x in readings if x is not None and x.numbers], sums)


def _of_the_first(scale: float | Tensor, n: int) -> Tensor:
    """One run of two batches has the training gradient of the first samples alone."""
    assert isinstance(scale, Tensor)
    return torch.cat([scale[:n], torch.zeros_like(scale[n:])])


# --- comparing ------------------------------------------------------------------------------------

DIRECTIONS = 2
"""Directions that gradients are moved along to see how far a number moves."""

PERIOD = 4099
"""Random numbers that repeat: a prime number, so that they fall otherwise in every row of a
matrix."""

MARGIN = 4.0
"""How many times as far as it moved, on the average over `DIRECTIONS`, a number may be off."""


def off_by(
    reading: Reading,
    grads: Sequence[Tensor],
    company: Sequence[Tensor] | None,
    index: Tensor,
    reach: Tensor,
    tolerance: float,
) -> dict[int, float]:
    """By parameter (-1 for the sum over them), how far the run's numbers are off, relative to their
    size, where that is more than rounding.

    Args:
        grads: of the samples `index`, `[s, *shape]` per parameter, from plain autograd.
        company: by parameter, the sum of the gradients of the batch's other samples.
        reach: by how much the gradients may be off, `[P, s]`.
        tolerance: relative error that is rounding.
    """

    def defined(i: int, *, moving: bool) -> _Compared:
        sum_of_others = None if company is None else company[i]
        g = wide(grads[i])
        by = [-1, *[1] * (g.ndim - 1)]
        scale = reading.scale
        if isinstance(scale, Tensor):
            scale = scale[index]
            g = g * scale.to(g).view(by)
        elif scale != 1.0:
            g = g * scale
        define = reading.numbers[i].define
        want = define(g, sum_of_others)
        if not moving:
            return _Compared(want, None)
        far = (reach[i] * (scale.abs() if isinstance(scale, Tensor) else abs(scale))).to(g).view(by)
        moved = [
            _squares(
                define(torch.addcmul(g, far, _direction(k, g)), sum_of_others), want, reading.pairs
            )
            for k in range(DIRECTIONS)
        ]
        return _Compared(want, contract.add_up(moved) / DIRECTIONS)

    def errors(asked: Iterable[int], *, moving: bool) -> dict[int, float]:
        found: dict[int, float] = {}
        if reading.total is not None:
            every = [defined(i, moving=moving) for i in reading.numbers]
            want = contract.add_up([x.want.double() for x in every])
            moves = [x.moves for x in every if x.moves is not None]
            whole = _Compared(want, contract.add_up(moves) if moves else None)
            found[-1] = _error(whole, reading.total(index), tolerance * reading.degree, reading)
        else:
            for i in asked:  # one after the other: a number may be as large as its parameter
                compared, got = defined(i, moving=moving), reading.numbers[i].pick(index)
                found[i] = _error(compared, got, tolerance * reading.degree, reading)
        return {i: error for i, error in found.items() if error > 0}

    # Most numbers are right to their own scale: only the others may have cancelled.
    doubtful = errors(reading.numbers, moving=False)
    return errors(doubtful, moving=True) if doubtful else {}


class _Compared(NamedTuple):
    """Numbers by definition, and the squares of how far they moved, by sample or by pair; None
    where nobody looked."""

    want: Tensor
    moves: Tensor | None


def _squares(x: Tensor, y: Tensor, pairs: bool) -> Tensor:
    """`(x - y)^2` of every pair, or added up for every sample."""
    return (x.double() - y.double()).square() if pairs else squared_norms(x, y)


def _error(compared: _Compared, got: Tensor, tolerance: float, reading: Reading) -> float:
    """The worst relative error of a sample's numbers, or of a pair's; 0 where all are right."""
    want, moves = compared
    if got.shape != want.shape:
        return float("inf")
    error = _squares(got, want, reading.pairs).sqrt()
    size = want.double().abs() if reading.pairs else lengths(want)
    limit = tolerance * size + (0 if moves is None else MARGIN * moves.sqrt())
    # What over- or underflowed shows that it did: it is run again, or is infinite.
    bad = (error > limit) & error.isfinite()
    return float((error / size.clamp_min(1e-300))[bad].max()) if bool(bad.any()) else 0.0


def _direction(k: int, g: Tensor) -> Tensor:
    """Directions of length 1, `[s, *shape]`: half in proportion to the gradients' elements, half
    all alike, times numbers as good as random. (Torch draws none inside vmap. Signs alone would be
    at right angles to a gradient of a few equal elements.)"""
    if g.numel() == 0:
        return torch.zeros_like(g)
    flat = g.reshape(len(g), g[0].numel())
    turns = torch.arange(PERIOD, dtype=torch.float64, device=g.device) + 1
    drawn = torch.sin(turns * turns * (0.7548776662 + k * 0.5698402910)).to(g.dtype)
    drawn = drawn.repeat(-(-g.numel() // PERIOD))[: g.numel()].view_as(flat)
    alike = flat.norm(dim=1, keepdim=True) / flat.shape[1] ** 0.5
    r = (flat.abs() + alike).mul_(drawn)
    return r.div_(r.norm(dim=1, keepdim=True).clamp_min(1e-30)).view_as(g)
