"""A run's gradients, held against plain autograd along one random direction.

Parameters that are all zeros hide what they multiply: while the second matrix of an adapter is
zero, so is the gradient of the first. Where a parameter has no gradient, the proof is made with
small positive numbers in place of such zeros, unless the program then goes another way.

A parameter with small numbers may have nothing but rounding noise in them: a bias that a softmax
takes no notice of. How large that noise is is seen where it matters: plain autograd takes the
gradients of a few samples again, with parameters moved by units in their last place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ghostfunc._base.company import Part
from ghostfunc._base.dtypes import lengths, normal_like, wide
from ghostfunc._base.torch_private import unrounded
from ghostfunc._base.types import ContractDtype, Randomness
from ghostfunc._factors.matmul import dots
from ghostfunc._taps import rounding
from ghostfunc._taps.claim import (
    FLOOR,
    NOT_THEIRS,
    Alone,
    Claim,
    Coupling,
    Dots,
    coarsest,
    tolerance_of,
)
from ghostfunc._taps.readings import Read
from ghostfunc._trace.fitting import Disproved, TracedModel
from ghostfunc._trace.layout import StaleLayout

ZEROS = 0.02
"""The typical size of what stands in for parameters that are all zeros."""

NOISY = 4
"""Samples that rounding noise is looked at with."""

POWERS, POWERS_OF_HALVES = range(-8, 8), range(-1, 3)
"""Of two, that samples' losses are multiplied by; fewer where float16 would over- or underflow."""

BETWEEN = 1.4
"""They are multiplied by a random number up to this one besides: gradients may be multiples of each
other, by a power of two, too."""


@dataclass
class AlongOneDirection:
    """A run's gradients along one random direction, and what plain autograd has of them as parts
    of the batch come up.

    Attributes:
        alone: plain autograd on samples of the run, or of one with numbers in place of zeros.
        v: the direction.
        given: what the run's trace reads along it; found: the same with numbers in place of zeros.
        weights: the samples' weights, `[n]`; those whose numbers are not finite have none.
    """

    claim: Claim
    alone: Alone
    v: list[Tensor]
    given: Dots
    found: Dots
    weights: Tensor
    _totals: Tensor
    _sizes: Tensor

    @staticmethod
    def of(claim: Claim, seed: int, randomness: Randomness) -> AlongOneDirection | None:
        """None if nothing is finite."""
        model = claim.model
        generator = np.random.default_rng([seed, model.n])
        v, factors = [normal_like(generator, x) for x in model.leaves], _factors(generator, model)
        given = claim.dots_by(model, v, factors, seed, randomness)
        other, found = _with_numbers_for_zeros(claim, given, v, factors, seed, randomness)
        table = found.table
        index = table.isfinite().all(0).nonzero().flatten()
        if not len(index):
            return None
        weights = table.new_zeros(model.n)
        weights = weights.index_copy(0, index, _weights(table[:, index], generator))
        alone = Alone(other, found.losses, randomness, seed)
        zeros = table.new_zeros(len(v)), table.new_zeros(len(v))
        return AlongOneDirection(claim, alone, v, given, found, weights, *zeros)

    @property
    def filled(self) -> bool:
        """Whether it is of a model with numbers in place of zeros."""
        return self.alone.model is not self.claim.model

    @property
    def finite(self) -> list[int]:
        """The samples that are compared."""
        return self.found.table.isfinite().all(0).nonzero().flatten().tolist()

    def add(self, grads: Sequence[Tensor], weight: float = 1.0) -> None:
        """Take a part's gradient, of losses that were weighted already but for this `weight`."""
        with unrounded(self.found.losses):
            pairs = [_dot_and_length(g, u) for g, u in zip(grads, self.v, strict=True)]
        dots, norms = zip(*pairs, strict=True)
        self._totals = self._totals + weight * torch.stack(dots)
        self._sizes = self._sizes + abs(weight) * torch.stack(norms)

    def wrong(self) -> Coupling | Disproved | None:
        """What is wrong, when all parts are there."""
        model, index = self.alone.model, self.finite
        weights = self.weights[index]
        terms = weights * self.found.table[:, index]
        params = list(range(len(self.v)))
        noise = _noise(model, self.found.losses[index], weights)
        compared = _Compared(params, terms, self._totals, self._sizes, *noise)
        return _wrong(compared, self.alone, index, weights, None)

    def wrong_sums(self, read: Read, alone: Alone) -> Coupling | Disproved | None:
        """What is wrong with sums over all samples, training gradients above all: their products
        with the direction are sums of those that were proved."""
        table, losses = self.given.table, self.claim.losses
        if not bool(table.isfinite().all()):
            return None
        for one in read.sums:
            weights = (
                torch.as_tensor(one.scale, dtype=torch.float64, device="cpu")
                .detach()
                .cpu()
                .expand(len(losses))
            )
            with unrounded(one.value):
                total, size = _dot_and_length(one.value, self.v[one.param])
            if not bool(total.isfinite()):
                continue
            terms, noise = table[one.param] * weights, _noise(alone.model, losses, weights)
            compared = _Compared([one.param], terms[None], total[None], size[None], *noise)
            wrong = _wrong(compared, alone, list(range(len(losses))), weights, one.contract_dtype)
            if wrong is not None:
                return wrong
        return None


def _factors(generator: np.random.Generator, model: TracedModel) -> Tensor:
    """Random factors, `[n]`. As few samples as can be have one between the same powers of two."""
    exponents = POWERS_OF_HALVES if coarsest(model) is torch.float16 else POWERS
    chosen = np.asarray(exponents)[generator.permutation(model.n) % len(exponents)]
    factors = generator.uniform(1.0, BETWEEN, model.n) * np.exp2(chosen)
    return torch.from_numpy(factors.astype(np.float32)).to(model.leaves[0].device)


def _dot_and_length(g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """`<g, u>` and `||g||`."""
    g = wide(g).detach().flatten()
    size = lengths(g[None])[0]
    return dots(g[None], u.flatten().to(g))[0].double().cpu(), size.cpu()


def _with_numbers_for_zeros(
    claim: Claim,
    given: Dots,
    v: Sequence[Tensor],
    factors: Tensor,
    seed: int,
    randomness: Randomness,
) -> tuple[TracedModel, Dots]:
    """The model with no parameter that is all zeros, where some hide others, and what it reads."""
    model = claim.model
    if bool(given.table.any(1).all()):
        return model, given
    generator = np.random.default_rng([seed, model.n])
    filled = list(model.leaves)
    for i, x in enumerate(filled):
        if x.numel() > 0 and not bool(x.detach().any()):
            filled[i] = torch.from_numpy(generator.uniform(0.5, 1.5, x.shape) * ZEROS).to(x)
    if all(x is y for x, y in zip(filled, model.leaves, strict=True)):
        return model, given
    other = replace(model, leaves=filled)
    try:
        found = claim.dots_by(other, v, factors, seed, randomness)
    except StaleLayout:  # of parameters that the program looks at
        return model, given
    same = found.way == claim.way and bool(found.losses.isfinite().all())
    return (other, found) if same else (model, given)


@dataclass(frozen=True)
class _Compared:
    """`sum_i c_i s_ip` beside `t_p`.

    Attributes:
        params: which parameters.
        terms: `c_i s_ip`, `[P, n]`; totals: `t_p`; sizes: how large the gradients are.
        noise: what is rounding noise of the losses; what it is at most.
    """

    params: list[int]
    terms: Tensor
    totals: Tensor
    sizes: Tensor
    noise: float
    most: float

    @property
    def scales(self) -> Tensor:
        return lengths(self.terms) + self.sizes

    @property
    def errors(self) -> Tensor:
        return (self.terms.sum(1) - self.totals).abs()

    def wrong(
        self, model: TracedModel, contract_dtype: ContractDtype, floor: float = FLOOR
    ) -> Disproved | None:
        """Where they do not agree. Below the share `floor` of the largest parameter, numbers may be
        rounding noise."""
        names, scales, errors = model.spec.names, self.scales, self.errors
        limits = torch.maximum(scales, floor * scales.max()) * tolerance_of(model, contract_dtype)
        bad = (~(errors <= limits.clamp_min(self.noise))).nonzero().flatten().tolist()
        if not bad:
            return None
        listed = ", ".join(repr(names[self.params[p]]) for p in bad[:5])
        worst = max(float(errors[p] / scales[p].clamp_min(1e-300)) for p in bad)
        return Disproved(f"{NOT_THEIRS} at parameter {listed} (off by {worst:.1e})")

    def doubtful(self, model: TracedModel, contract_dtype: ContractDtype) -> bool:
        """Whether something is off by more than its own scale allows."""
        return self.wrong(model, contract_dtype, floor=0.0) is not None


def _noise(model: TracedModel, losses: Tensor, weights: Tensor) -> list[float]:
    """What is rounding noise of weighted losses; what it is at most."""
    unit = rounding.NOISE * torch.finfo(coarsest(model)).eps
    sizes = [rounding.loss_sizes(losses, at_most=x) for x in (False, True)]
    return [unit * float(lengths((weights * size)[None])) for size in sizes]


def _wrong(
    compared: _Compared,
    alone: Alone,
    index: list[int],
    weights: Tensor,
    contract_dtype: ContractDtype,
) -> Coupling | Disproved | None:
    """What is off by more than rounding noise, which is looked at in case of doubt."""
    wrong = replace(compared, noise=compared.most).wrong(alone.model, contract_dtype)
    if wrong is None and compared.doubtful(alone.model, contract_dtype):
        return _beyond_noise(compared, alone, index, weights, contract_dtype)
    return wrong


def _beyond_noise(
    compared: _Compared,
    alone: Alone,
    index: list[int],
    weights: Tensor,
    contract_dtype: ContractDtype,
) -> Coupling | Disproved | None:
    """What is off by more than rounding noise, which is seen in a few samples: parameters are moved
    by units in their last place."""
    model = alone.model
    few = list(range(min(NOISY, len(index))))
    rows = [index[i] for i in few]
    noise = rounding.seen(alone, Part(rows, [True] * len(rows)), weights[few])
    if isinstance(noise, Coupling):
        return noise
    noise = noise[compared.params] * (len(index) / len(few)) ** 0.5
    scales = torch.maximum(compared.scales, noise / tolerance_of(model, contract_dtype))
    sizes = scales - lengths(compared.terms)
    return replace(compared, sizes=sizes).wrong(model, contract_dtype, floor=0.0)


def _weights(table: Tensor, generator: np.random.Generator) -> Tensor:
    """Random weights that make the samples' numbers equally large."""
    size = lengths(table.T)
    seen = size[size > 0]
    typical = seen.log().mean().exp() if len(seen) else size.new_ones(())
    least = typical * torch.finfo(torch.float32).eps ** 0.5
    signs = torch.from_numpy(generator.choice([-1.0, 1.0], len(size)))
    return (
        signs
        * torch.from_numpy(generator.uniform(0.5, 1.5, len(size)))
        * (typical / size.clamp_min(least))
    )
