"""How the gradients of a training step agree: noise scale, norms, conflicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base.compilable import compilable
from ghostfunc._base.errors import BatchError, NonFiniteLossError, OptionError
from ghostfunc._base.options import CHECKS, check_contract_dtype, check_number, check_whole, one_of
from ghostfunc._base.processes.pieces import refuse_pieces
from ghostfunc._base.program import Program
from ghostfunc._base.reprs import brief
from ghostfunc._base.trees import batch_size, flatten_params
from ghostfunc._base.types import Check, ContractDtype, ModelFn, PyTree, Randomness
from ghostfunc._factors.spread import spread
from ghostfunc._quantities.quantity import Spread
from ghostfunc._taps.run import run
from ghostfunc._transforms.factored import FactoredGrads

QUANTILES = (0.1, 0.5, 0.9)


class HealthStep(NamedTuple):
    """What `ghost_health` returns.

    Attributes:
        losses: per-sample losses, `[n]`.
        grads: gradient of the mean loss, a pytree like `params`.
        spread: `||g_i||^2` and `<g_i, sum_j g_j>`, `[n, 2]` per parameter, a pytree like `params`:
            what `gf.Spread` reads.
    """

    losses: Float[Tensor, " n"]
    grads: PyTree
    spread: PyTree

    def __repr__(self) -> str:
        return brief("HealthStep", **self._asdict())


@compilable(HealthStep)
def ghost_health(
    model_fn: ModelFn,
    params: PyTree,
    batch: PyTree,
    *,
    contract_dtype: ContractDtype = None,
    check: Check = "new",
    randomness: Randomness = "error",
) -> HealthStep:
    """A training step whose gradients `gf.health` can be asked about, in one backward pass.

        step = gf.ghost_health(model_fn, params, batch)
        gf.accumulate_grads(module, step.grads)
        logger.log(gf.health(step).as_dict())

    **Cost.** For every parameter, the products that its training gradient takes anyway are made
    block by block; each block is contracted with itself and with the sum while it is at hand.
    Where Gram matrices of positions are cheaper (`n^2 T^2 (d + p) < n T d p`), those are taken. On
    top of a plain step come a few passes over `n d p` numbers, and no second pass of the model.
    Parameters that samples meet at several places are read when the backward pass is over; so are
    biases and norms, those of one size together. At T = 256 and 6 x 384 a step takes at most about
    1.13 of a plain one on one core: products of n times T positions instead of one of n T (2.5 %),
    the sum and the inner products of formed gradients (3.4 %), calls (3 %), normalised inputs once
    more (1.6 %).

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses [n]`.
        params: pytree of floating-point tensors.
        batch: pytree of tensors `[n, ...]`. All samples run at one time: dot products with the sum
            relate them to each other.
        contract_dtype: torch.bfloat16 or torch.float16 rounds the operands of the products that
            `spread` is made of, as in `ghost_dot_prod`; they are then no longer shared with the
            training gradient, which is never rounded.
        check: when numbers are held against plain autograd, in two more passes: "new", where the
            way through the program or the shapes are new; "always"; or "never".
        randomness: "error" or "different".

    Returns:
        `HealthStep(losses, grads, spread)`; `grads` is the gradient of the mean loss.

    Raises:
        GhostError: one of its children, as for `ghost_vjp`.

    Reference:
        McCandlish et al., "An Empirical Model of Large-Batch Training", 2018.
    """
    one_of("randomness", randomness, ("error", "different"))
    one_of("check", check, CHECKS)
    check_contract_dtype(contract_dtype)
    refuse_pieces(model_fn, "gf.ghost_health, whose noise is that of all ranks' samples,")
    program = Program.of(model_fn, params, randomness)
    taken = run(
        program,
        batch,
        [Spread().contracting(contract_dtype)],
        grads=range(len(program.leaves)),
        scale=1 / batch_size(batch),
        check=check,
    )
    grads, table = map(program.spec.unflatten, (taken.grads, taken.values[0]))
    return HealthStep(taken.losses, grads, table)


@dataclass(frozen=True, repr=False)
class Health:
    """How the gradients of n samples agree; made by `gf.health`.

    With `G = mean_i g_i`, `S = mean_i ||g_i||^2`:

    Attributes:
        noise: `n / (n - 1) (S - ||G||^2)`, unbiased for tr(Sigma), the variance of a sample's
            gradient, summed over its entries.
        signal: `(n ||G||^2 - S) / (n - 1)`, unbiased for the squared norm of the true gradient:
            the mean of `<g_i, g_j>` over pairs of different samples. It may be negative.
        conflicting: the share of samples with `<g_i, sum_{j != i} g_j> < 0`: what helps the others
            of the batch hurts them.
        norms: `||g_i||`, `[n]`, in float64 on the CPU.
        ids: of the samples; their places in the batch where none were given.
        layers: the same of every module's own parameters, by its name; empty for a layer.
    """

    noise: float
    signal: float
    conflicting: float
    norms: Float[Tensor, " n"]
    ids: tuple[int | str, ...]
    layers: Mapping[str, Health] = field(default_factory=dict)

    @property
    def noise_scale(self) -> float:
        """`tr(Sigma) / |G|^2`, the simple noise scale: about the batch size up to which a larger
        batch saves steps. Infinite where `signal` is not positive: this batch is too small to say.
        Of several steps, divide the mean of `noise` by the mean of `signal`."""
        if math.isnan(self.signal):  # of a step of one sample
            return math.nan
        return self.noise / self.signal if self.signal > 0 else math.inf

    def quantile(self, q: float) -> float:
        """A quantile of `||g_i||`, for `q` from 0 to 1."""
        if not 0 <= check_number("q", q) <= 1:
            raise OptionError(f"q={q!r} must be between 0 and 1.")
        return float(self.norms.quantile(q))

    def largest(self, k: int = 5) -> list[tuple[int | str, float]]:
        """The k samples of the largest gradients, `(id, norm)`, the largest first."""
        check_whole("k", k)
        values, index = self.norms.topk(min(k, len(self.norms)))
        return [(self.ids[i], x) for i, x in zip(index.tolist(), values.tolist(), strict=True)]

    def as_dict(self, prefix: str = "health/", *, layers: bool = False) -> dict[str, float]:
        """Plain numbers for a logger; with `layers`, those of every layer, too."""
        out = {
            f"{prefix}noise_scale": self.noise_scale,
            f"{prefix}noise": self.noise,
            f"{prefix}signal": self.signal,
            f"{prefix}conflicting": self.conflicting,
            **{f"{prefix}norm_q{round(100 * q)}": self.quantile(q) for q in QUANTILES},
            f"{prefix}norm_max": float(self.norms.max()),
        }
        if layers:
            for name, layer in self.layers.items():
                out |= layer.as_dict(f"{prefix}{name}/")
        return out

    def __repr__(self) -> str:
        ((who, largest),) = self.largest(1)
        return (
            f"Health(samples={len(self.norms)}, noise_scale={self.noise_scale:.4g}, "
            f"conflicting={self.conflicting:.3g}, norm_median={self.quantile(0.5):.4g}, "
            f"norm_max={largest:.4g} (sample {who}), layers={len(self.layers)})"
        )


def health(
    step: HealthStep | FactoredGrads, *, ids: Sequence[int | str] | Tensor | None = None
) -> Health:
    """How the gradients of a step's samples agree: exact numbers of all of them.

        noise scale   B = tr(Sigma) / |G|^2, both estimated without bias from the n samples
        conflicting   the share of samples with `<g_i, sum_{j != i} g_j> < 0`
        norms         `||g_i||`: quantiles, and the ids of the largest

    All of it is made of `||g_i||^2` and `<g_i, sum_j g_j>`, parameter by parameter: both add up to
    those of layers and of the model. Reading them waits for the device once.

    Args:
        step: what `gf.ghost_health` returns; or the kept gradients of `gf.factored_grads`, which
            takes another round of contractions. From a `gf.ghost_vjp` of several quantities,
            `gf.Spread()` among them, make `gf.HealthStep(out.losses, out.grads, out.values[name])`.
        ids: of the samples, n of them; by default their places in the batch.

    Returns:
        A `Health`: `noise_scale`, `conflicting`, `norms`, `largest()`, `layers`, `as_dict()`.
        Multiplying all losses by a number multiplies norms by it and leaves the others alone.

    Raises:
        OptionError: another kind of step; another number of ids.
        BatchError: fewer than two samples, of which no variance can be estimated.
        NonFiniteLossError: a gradient that is NaN or infinite, or whose square is beyond its dtype;
            gradients so small that their squares underflow (in float32, norms below `3e-16 n`
            where none is above `3e-9 n`). A layer of which that holds has NaN for its numbers.

    Reference:
        McCandlish et al., "An Empirical Model of Large-Batch Training", 2018: the simple noise
        scale, and its estimates with batches of one and of n samples (appendix A.1).
    """
    names, table, totals = _table_of(step)
    samples = _checked_ids(ids, len(table))
    return _health_of(names, table, totals, samples)


def _health_of(
    names: Sequence[str],
    given: Float[Tensor, "n params 2"],
    totals: Sequence[Tensor],
    ids: tuple[int | str, ...],
) -> Health:
    """`health` of named parameters' `||g_i||^2` and `<g_i, sum_j g_j>`, and of their gradients,
    up to a factor."""
    n, table = len(given), given.double().cpu()
    if n < 2:
        raise BatchError(
            f"gf.health got a step of {n} sample: how gradients differ takes two at least."
        )
    bad = [ids[i] for i in (~table.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()]
    if bad:
        raise NonFiniteLossError(
            f"The gradients of samples {bad[:5]} ({len(bad)} in all) are NaN or infinite, or their "
            "squares are beyond the dtype of the parameters. gf.ghost_norm says which norms are "
            "finite; multiply the losses by a small number if they all are."
        )

    def lost(index: Sequence[int]) -> bool:
        squares = table[:, index, 0].sum(1)
        return underflows(squares, given.dtype) and any(bool(totals[i].any()) for i in index)

    if lost(range(len(names))):
        raise NonFiniteLossError(
            f"The squares of the gradients underflow in {str(given.dtype)[6:]}: the largest norm "
            f"is about {float(table[..., 0].sum(1).max().clamp(min=0).sqrt()):.1g}, and norms "
            f"below {n * least_norm(given.dtype):.1g} lose their digits. Multiply the losses by a "
            "large number before gf.ghost_health: norms are multiplied by it, and the noise scale "
            "stays."
        )
    layers = {
        layer: _of(table[:, index].sum(1) * (math.nan if lost(index) else 1), ids, {})
        for layer, index in by_layer(names).items()
    }
    return _of(table.sum(1), ids, layers)


def least_norm(dtype: torch.dtype) -> float:
    """The norm below which squares lose digits."""
    limits = torch.finfo(dtype)
    return math.sqrt(limits.tiny / limits.eps)


def underflows(squares: Float[Tensor, " n"], dtype: torch.dtype) -> bool:
    """Whether samples' squared norms, made in a dtype of gradients over n, lost digits that count
    beside the largest one's."""
    least = len(squares) * least_norm(dtype)
    largest = float(squares.max().clamp(min=0).sqrt())
    return largest * torch.finfo(dtype).eps < least and bool((squares < least**2).any())


def by_layer(names: Sequence[str]) -> dict[str, list[int]]:
    """The parameters of every module, by its name."""
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        groups.setdefault(name.rpartition(".")[0] or name, []).append(i)
    return groups


def _of(
    table: Float[Tensor, "n 2"], ids: tuple[int | str, ...], layers: Mapping[str, Health]
) -> Health:
    n = len(table)
    squares, dots = table.unbind(1)
    others = dots - squares
    return Health(
        noise=float(squares.mean() - others.sum() / (n * (n - 1))),
        signal=float(others.sum() / (n * (n - 1))),
        conflicting=float((others < 0).double().where(others.isfinite(), math.nan).mean()),
        norms=squares.clamp(min=0).sqrt(),
        ids=ids,
        layers=layers,
    )


def _table_of(
    step: object,
) -> tuple[Sequence[str], Float[Tensor, "n params 2"], Sequence[Tensor]]:
    """The names of the parameters, what is read of them, side by side, and their gradients."""
    if isinstance(step, FactoredGrads):
        tables, totals = zip(*map(spread, step.bundles), strict=True)
        return step.names, torch.stack(tables, dim=1), totals
    if not isinstance(step, HealthStep):
        raise OptionError(
            f"gf.health got a {type(step).__name__}; expected what gf.ghost_health(model_fn, "
            "params, batch) or gf.factored_grads returns. Of gf.ghost_vjp with gf.Spread() among "
            "its quantities, pass gf.HealthStep(out.losses, out.grads, out.values[name])."
        )
    leaves, spec = flatten_params(step.spread)
    n = len(step.losses)
    for name, x in zip(spec.names, leaves, strict=True):
        if x.shape != (n, 2):
            raise OptionError(
                f"HealthStep.spread has shape {tuple(x.shape)} for parameter {name!r}; expected "
                f"[{n}, 2], the values of gf.Spread()."
            )
    grads, given = flatten_params(step.grads)
    if given.names != spec.names:
        raise OptionError(
            f"HealthStep.grads are of {len(given.names)} parameters and HealthStep.spread of "
            f"{len(spec.names)}, or their names differ: both are pytrees like params."
        )
    return spec.names, torch.stack([x.detach() for x in leaves], dim=1), grads


def _checked_ids(ids: object, n: int) -> tuple[int | str, ...]:
    if ids is None:
        return tuple(range(n))
    found: Any = ids.tolist() if isinstance(ids, Tensor) else ids
    listed = isinstance(found, Sequence) and not isinstance(found, (str, bytes))
    if listed and len(found) == n and all(isinstance(x, (int, str)) for x in found):
        return tuple(found)
    raise OptionError(f"ids must be {n} whole numbers or names, one per sample; got {ids!r:.80}.")
