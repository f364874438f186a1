"""Numbers that are made of kept factors after the run, held against those of whole gradients.

The run has proved that the factors of two samples are their gradients. What is contracted of them
later (norms, products, sums) is held against plain products of the gradients that they add up to,
once for every kind of factors: no pass through the model, and two gradients in memory. `"always"`
holds the numbers of one sample in every other call.

    norms, products, Gram matrices    of two samples drawn at random
    weighted sums                     <sum_i w_i g_i, v> = sum_i w_i <g_i, v> for a random v
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ghostfunc._base.dtypes import coarsest_of, squared_norms, wide
from ghostfunc._base.errors import VerificationError
from ghostfunc._base.torch_private import in_transform, symbolic, unrounded
from ghostfunc._base.trees import ParamSpec
from ghostfunc._factors import bundles, contract, extreme_norms
from ghostfunc._factors.matmul import dots
from ghostfunc._quantities.quantity import kind_of
from ghostfunc._taps.claim import FLOOR, TOLERANCES
from ghostfunc._taps.proof import FEW
from ghostfunc._taps.readings import PERIOD, Numbers, Reading, off_by
from ghostfunc._taps.rounding import NOISE
from ghostfunc._trace.fitting import Proofs

Plain = Callable[[int, Tensor], Tensor]
"""A parameter's numbers by definition, from some samples' gradients `[s, *shape]`."""


@dataclass(frozen=True)
class KeptProof:
    """What is proved of one model function's kept factors.

    Attributes:
        always: whether it is proved every time.
    """

    proofs: Proofs
    always: bool

    def numbers(
        self,
        what: str,
        kept: Sequence[bundles.Bundle],
        losses: Tensor,
        spec: ParamSpec,
        leaves: Sequence[Tensor],
        values: Sequence[Tensor],
        define: Plain,
        *,
        degree: int,
        pairs: bool = False,
    ) -> None:
        """Raise `VerificationError` unless `values` are those that `define` has of gradients."""
        key = "kept", what, kind_of(kept)
        if not self._asks(key, losses):
            return
        found = losses.detach().isfinite().nonzero().flatten().tolist()
        count = FEW if self.proofs.get(key) is None else 1
        drawn = np.random.default_rng([len(losses), self.proofs.turn()]).permutation(found)
        few = sorted(drawn[:count].astype(int))
        index = torch.tensor([int(i) for i in few], device=losses.device, dtype=torch.long)
        if not few:
            return
        with unrounded(losses):
            grads = [
                _whole(bundle, index, tuple(x.shape)).detach()
                for bundle, x in zip(kept, leaves, strict=True)
            ]
            dtype = _coarsest(kept, leaves)
            norms = torch.stack([torch.stack(list(map(extreme_norms.length, g))) for g in grads])
            reach = TOLERANCES[dtype] * torch.maximum(norms, FLOOR * norms.max(0).values)
            noise = NOISE * torch.finfo(dtype).eps * torch.stack([_terms(x, index) for x in kept])
            reading = Reading(
                what,
                degree,
                {i: _numbers(i, value, define, pairs=pairs) for i, value in enumerate(values)},
                pairs=pairs,
            )
            wrong = off_by(
                reading,
                grads,
                None,
                index,
                torch.maximum(reach, noise.to(reach)),
                TOLERANCES[dtype],
            )
        if wrong:
            raise _disproved(what, spec, wrong)
        self.proofs.put(key, value=True)

    def sums(
        self,
        parts: Sequence[tuple[Sequence[bundles.Bundle], Sequence[Tensor]]],
        losses: Tensor,
        spec: ParamSpec,
        leaves: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> None:
        """Raise `VerificationError` unless `values` are `sum_i w_i g_i` of the samples of all
        parts, which have bundles and weights for every parameter. They are of all samples, so they
        are proved once even where others always are."""
        kept = [bundle for own, _ in parts for bundle in own]
        key = "kept", "weighted sums", kind_of(kept)
        if self.proofs.get(key) is not None or not self._asks(key, losses):
            return
        drawn = np.random.default_rng([len(losses), self.proofs.turn()]).standard_normal(PERIOD)
        numbers = torch.from_numpy(drawn)
        off, limits = [], []
        for i, (x, total) in enumerate(zip(leaves, values, strict=True)):
            v = numbers.repeat(-(-x.numel() // PERIOD))[: x.numel()].view(x.shape).to(wide(x))
            with unrounded(v):
                terms = torch.cat([_shares(own[i], v, weights[i]) for own, weights in parts])
                g = wide(total).flatten()
                off.append((terms.sum() - dots(g[None], v.flatten().to(g))[0].double()).abs())
                limits.append(extreme_norms.length(terms) + extreme_norms.length(g))
        errors, sizes = torch.stack(off), torch.stack(limits)
        if not bool(sizes.isfinite().all()):
            return  # of what is not finite nothing is known
        dtype = _coarsest(kept, leaves)
        allowed = TOLERANCES[dtype] * torch.maximum(sizes, FLOOR * sizes.max())
        bad = (errors > allowed).nonzero().flatten().tolist()
        if bad:
            found = {i: float(errors[i] / sizes[i].clamp_min(1e-300)) for i in bad}
            raise _disproved("weighted sums", spec, found)
        self.proofs.put(key, value=True)

    def _asks(self, key: object, losses: Tensor) -> bool:
        if torch.compiler.is_compiling() or symbolic(losses) or in_transform():
            return False
        return self.always or self.proofs.get(key) is None


def _shares(bundle: bundles.Bundle, v: Tensor, weights: Tensor) -> Tensor:
    """`w_i <g_i, v>`, in float64; zero for samples of weight zero."""
    dots = contract.add_up([bundles.dot(f, v) for f in bundle]).double()
    return torch.where(weights == 0, 0, dots * weights.double())


def _numbers(i: int, value: Tensor, define: Plain, *, pairs: bool) -> Numbers:
    def pick(index: Tensor) -> Tensor:
        return value[index][:, index] if pairs else value[index]

    return Numbers(lambda g, _: define(i, g), pick)


def _terms(bundle: bundles.Bundle, index: Tensor) -> Tensor:
    """How large the terms are, at most, that some samples' gradients are sums of, `[s]`."""
    sizes = torch.zeros(len(index), dtype=torch.float64, device=index.device)
    for factor in (bundles.take(f, index) for f in bundle):
        size = torch.ones_like(sizes)
        for x in (x for x in factor if isinstance(x, Tensor) and x.is_floating_point()):
            size = size * squared_norms(x).sqrt()
        sizes = sizes + size
    return sizes


def _whole(bundle: bundles.Bundle, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    few = [wide(contract.materialize(bundles.take(f, index))) for f in bundle]
    return contract.add_up([x.reshape(len(index), *shape) for x in few])


def _coarsest(kept: Sequence[bundles.Bundle], leaves: Sequence[Tensor]) -> torch.dtype:
    return coarsest_of(
        {x.dtype for x in leaves} | {bundles.values(f).dtype for b in kept for f in b}
    )


def _disproved(what: str, spec: ParamSpec, wrong: dict[int, float]) -> VerificationError:
    listed = ", ".join(repr(spec.names[i]) for i in list(wrong)[:5])
    return VerificationError(
        f"The {what} made of kept factors are not those of the gradients, at parameter {listed} "
        f'(off by {max(wrong.values()):.1e}). Use mode="materialized", which forms the gradients, '
        "and report the model: this is a fault of ghostfunc or of a registered rule."
    )
