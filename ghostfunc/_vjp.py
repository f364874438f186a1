"""`ghost_vjp`: the transform everything else is written in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ghostfunc import _chunks
from ghostfunc._capture import compilable, symbolic
from ghostfunc._cost import Meeting, known
from ghostfunc._errors import (
    WAYS_OUT,
    ControlFlowError,
    OptionError,
    TransformError,
    check_contract_dtype,
    one_of,
)
from ghostfunc._factors import Factor, wide
from ghostfunc._functorch import in_transform
from ghostfunc._layout import StaleLayout
from ghostfunc._memo import memory, shapes_key, structure
from ghostfunc._owners import check_owners
from ghostfunc._prober import unseen_use
from ghostfunc._purity import ANEW, check_losses, not_captured, prove_independent
from ghostfunc._quantities import Dot, Quantity, Turn
from ghostfunc._several import RunningTotal
from ghostfunc._taps import Site, StaleSites, TapMode, leaf_factors
from ghostfunc._trace import Trace
from ghostfunc._tracing import pairs_to_trace, trace_model
from ghostfunc._tracked import ReaderKey, constants
from ghostfunc._tracking import gradients
from ghostfunc._tree import ParamSpec, batch_size, flatten_params, take, tensors_of
from ghostfunc._types import ContractDtype, ModelFn, PyTree, Randomness, brief

T = TypeVar("T")

MAX_TRACES = 8
"""Ways through one model that are remembered."""


class GhostVjp(NamedTuple):
    """What `ghost_vjp` returns.

    Attributes:
        losses: per-sample losses, `[n]`.
        values: like `quantities`, each a pytree like `params` of what was read per parameter.
        grads: gradient of the summed losses, a pytree like `params`; None unless asked for.
    """

    losses: Tensor
    values: Any
    grads: PyTree | None

    def __repr__(self) -> str:
        return brief("GhostVjp", **self._asdict())


@compilable(GhostVjp)
def ghost_vjp(
    model_fn: ModelFn,
    params: PyTree,
    batch: PyTree,
    quantities: Quantity | dict[str, Quantity],
    *,
    grads: bool = False,
    contract_dtype: ContractDtype = None,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> GhostVjp:
    """Quantities of per-sample gradients `g_i = d losses[i] / d params`, in one backward pass.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses [n]`.
        params: pytree of floating-point tensors.
        batch: pytree of tensors `[n, ...]`.
        quantities: one quantity (`gf.Dot(u)`, `gf.SampleGrad()`, ...) or a dict of them: all are
            read in the same backward pass.
        grads: also return the gradient of `sum_i losses[i]`.
        contract_dtype: torch.bfloat16 or torch.float16, to round the operands of the matrix
            products that make the values to it, as in `ghost_dot_prod`. Not for `SampleGrad`.
        chunk_size: the most samples to run at one time, where all of them do not fit into memory.
            Not for quantities that pair the samples of a batch (`Gram`).
        randomness: "error" refuses a model that draws random numbers; "different" lets every sample
            have its own draws.

    Returns:
        `GhostVjp(losses, values, grads)`. `values` is like `quantities`: a pytree like `params` for
        each. A quantity that is a dot product has `[n]` per parameter; sum them for the whole
        model.

    Raises:
        GhostError: one of its children, which names what was given and what to do.
    """
    one_of("randomness", randomness, ("error", "different"))
    check_contract_dtype(contract_dtype)
    named = quantities if isinstance(quantities, dict) else {"": quantities}
    for name, quantity in named.items():
        if not isinstance(quantity, Quantity):
            raise OptionError(
                f"quantities[{name!r}] is a {type(quantity).__name__}; expected a quantity such as "
                "gf.Dot(direction)."
            )
        if chunk_size is not None and quantity.pairs_samples:
            raise OptionError(
                f"{type(quantity).__name__} pairs the samples of a batch, so it cannot be taken in "
                "chunks. gf.ghost_gram has memory_budget for that."
            )
    rounded = [quantity.contracting(contract_dtype) for quantity in named.values()]
    leaves, spec = flatten_params(params)

    def taken(chunk: PyTree) -> Taken:
        return run(
            model_fn,
            leaves,
            spec,
            chunk,
            rounded,
            grads=range(len(leaves)) if grads else (),
            randomness=randomness,
        )

    losses, found, sums = [], [], _chunks.Sums()
    for part in _chunks.each(taken, batch, chunk_size):
        losses.append(part.losses)
        found.append(part.values)
        if grads:
            sums.add(part.grads)
        del part
    values = {
        name: spec.unflatten([_joined(x) for x in zip(*parts, strict=True)])
        for name, parts in zip(named, zip(*found, strict=True), strict=True)
    }
    return GhostVjp(
        losses[0] if len(losses) == 1 else torch.cat(losses),
        values if isinstance(quantities, dict) else values[""],
        spec.unflatten(sums.result()) if grads else None,
    )


def _joined(parts: Sequence[Any]) -> Any:
    """One parameter's values, chunk after chunk; None where nothing is read."""
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(list(parts))


@dataclass(frozen=True)
class Taken:
    """What one run returns, parameter by parameter; None for what was not asked for.

    Attributes:
        losses: `[n]`.
        values: per quantity, what was read.
        grads: the gradient of `scale * sum_i losses[i]`.
        factors: the factors of `scale * g_i`, one per use.
        turns: the same of the parameters `postpone`, not yet pulled back to them.
        trace: what the run followed.
        route: None if model_fn made the calls of the trace and no others.
    """

    losses: Tensor
    values: list[list[Any]]
    grads: list[Any]
    factors: list[list[Factor]]
    turns: list[list[Turn]]
    trace: Trace
    route: Hashable


@dataclass(frozen=True)
class Traced:
    """A model function with its trace, ready to be run on one batch.

    Made by `on_trace`.
    """

    model_fn: ModelFn
    leaves: list[Tensor]
    spec: ParamSpec
    batch: PyTree
    n: int
    trace: Trace


def run(
    model_fn: ModelFn,
    leaves: Sequence[Tensor],
    spec: ParamSpec,
    batch: PyTree,
    quantities: Sequence[Quantity],
    *,
    grads: Collection[int] = (),
    collect: Collection[int] = (),
    postpone: Collection[int] = (),
    scale: float | Tensor = 1.0,
    randomness: Randomness = "error",
) -> Taken:
    """Run `model_fn` under taps, tracing it first where needed.

    `grads` and `collect` are the parameters whose gradient, or whose factors, are wanted; those of
    `postpone`, some of `collect`, are not pulled back through derived tensors yet. With a `scale`
    for every sample, `[n]`, values are those of `scale_i * g_i`, too.
    """

    def use(model: Traced) -> Taken:
        try:
            return _run(model, quantities, grads, collect, scale, postpone)
        except StaleSites:  # trimmed to its longest sample, say
            return _run(model, quantities, grads, collect, scale, postpone, anew=True)

    model, taken = on_trace(use, model_fn, leaves, spec, batch, randomness)
    compiling = any(map(symbolic, tensors_of(batch)))
    if compiling and (model.trace.statistics or (model.trace.reorders and model.n > 1)):
        raise TransformError(
            "model_fn makes numbers of several samples, or may reorder samples by their values "
            "(sorting, routing to experts), which has to be checked in every run: torch.compile "
            "cannot record that. Call it uncompiled."
        )
    if taken.route is not None or model.trace.statistics:
        prove_independent(
            model_fn,
            model.leaves,
            spec,
            batch,
            randomness,
            route=ANEW if model.trace.statistics else taken.route,
            known=taken.losses,
        )
    if model.trace.reorders and model.n > 1:
        check_owners(partial(_dots, model), model_fn, model.leaves, spec.names, model.n)
    return taken


def _dots(model: Traced, model_fn: ModelFn, directions: Sequence[Tensor]) -> list[Tensor]:
    """`<g_i, u>` per parameter, for another function with the trace of `model`."""
    other = replace(model, model_fn=model_fn)
    return _run(other, [Dot(model.spec.unflatten(directions))], (), (), 1.0).values[0]


def on_trace(
    use: Callable[[Traced], T],
    model_fn: ModelFn,
    leaves: Sequence[Tensor],
    spec: ParamSpec,
    batch: PyTree,
    randomness: Randomness,
) -> tuple[Traced, T]:
    """`use` a trace that fits this batch: one of those remembered, or a new one."""
    leaves = [_plain(x) for x in leaves]
    n = batch_size(batch)
    traces: list[Trace] = memory(model_fn).setdefault(
        structure(model_fn, spec, leaves, batch, randomness), []
    )
    for trace in list(traces):
        model = Traced(model_fn, leaves, spec, batch, n, trace)
        try:
            result = use(model)
        except StaleLayout:
            continue  # control flow went another way: perhaps one that was traced before
        _remember(traces, trace)
        return model, result
    if any(map(symbolic, tensors_of(batch))):
        raise not_captured()
    observed = ""
    for pair in pairs_to_trace(model_fn, leaves, spec, batch):
        trace = trace_model(model_fn, leaves, spec, batch, randomness, pair)
        model = Traced(model_fn, leaves, spec, batch, n, trace)
        try:
            result = use(model)
        except StaleLayout as stale:
            observed = str(stale)
            continue
        _remember(traces, trace)
        return model, result
    raise ControlFlowError(
        "model_fn does not call the same ops each time it runs on this batch "
        f"({observed}): its control flow depends on its data. {WAYS_OUT}"
    )


def _remember(traces: list[Trace], trace: Trace) -> None:
    """Put the trace of the last run first. Other threads may do so at the same time."""
    traces[:] = [trace, *(x for x in list(traces) if x is not trace)][:MAX_TRACES]


def traced(
    model_fn: ModelFn,
    leaves: Sequence[Tensor],
    spec: ParamSpec,
    batch: PyTree,
    *,
    randomness: Randomness,
) -> Trace:
    """A trace of the model, made now if there is none."""
    return on_trace(lambda model: model.trace, model_fn, leaves, spec, batch, randomness)[1]


def _plain(x: Tensor) -> Tensor:
    """A parameter without the caller's autograd history, but inside the caller's transforms."""
    return x if torch._C._functorch.is_functorch_wrapped_tensor(x) else x.detach()


def _run(
    model: Traced,
    quantities: Sequence[Quantity],
    grads: Collection[int],
    collect: Collection[int],
    scale: float | Tensor,
    postpone: Collection[int] = (),
    *,
    anew: bool = False,
) -> Taken:
    """`anew` looks at the uses in a run on this very batch."""
    leaves, spec, n = model.leaves, model.spec, model.n
    readers = [q.readers(leaves, spec) for q in quantities]
    keys: list[ReaderKey] = []
    met: list[ReaderKey] = []
    for q, row in enumerate(readers):
        for i in (i for i, r in enumerate(row) if r is not None):
            # Not linear in the gradient, a quantity needs all uses of a parameter together.
            together = quantities[q].degree > 1 and model.trace.uses[i] > 1
            (met if together else keys).append((q, i))
    taps = [readers[q][i].tap(leaves[i], n) for q, i in keys]
    kept = {*collect, *(i for _, i in met)}
    collected = _collecting_sites(model, kept, anew=anew)
    modes: list[TapMode] = []
    running = {i: RunningTotal() for i in grads if _adds_up(leaves[i])}

    def tapped(
        taps: list[Tensor],
        collect_taps: list[Tensor],
        primals: list[Tensor],
        guards: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[list[Tensor]]]:
        tracked = constants(leaves, spec)
        for i, primal in zip(grads, primals, strict=True):
            tracked[i].grad = tracked[i].shown = primal
        for leaf, guard in zip(tracked, guards, strict=False):
            leaf.shown = guard
        for q, i in keys:
            tracked[i].readers[q, i] = (readers[q][i], False)
        mode = TapMode(
            model.trace,
            tracked,
            n,
            dict(zip(keys, taps, strict=True)),
            dict(zip(collected, collect_taps, strict=True)),
        )
        with mode:
            losses = model.model_fn(spec.unflatten([t.shown for t in tracked]), model.batch)
        mode.finish()
        check_losses(losses, n)
        modes.append(mode)
        for i, total in running.items():  # the model may have pulled something back itself
            tracked[i].running = total
        # An enclosing transform may differentiate what is made of them; without one they would keep
        # the whole graph alive.
        nested = in_transform()
        return losses, [
            [x if nested else x.detach() for x in mode.uses[s].arg_tensors] for s in collected
        ]

    collect_taps = [site.tap(n) for site in collected.values()]
    losses, (tap_cotangents, collected_b, param_grads), saved = pull_back(
        tapped,
        (taps, collect_taps, [leaves[i] for i in grads]),
        scale,
        guarded=model,
        differentiable=_derivative_wanted(leaves, model.batch, readers),
    )

    values: list[list[Any]] = [[None] * len(leaves) for _ in quantities]
    for (q, i), value in zip(keys, filled(tap_cotangents, taps), strict=True):
        values[q][i] = _unscaled(value, scale, quantities[q].degree)
    out_grads: list[Any] = [None] * len(leaves)
    for i, grad in zip(grads, param_grads, strict=True):
        whole = running[i].value if i in running else None
        if whole is not None:
            whole = whole.view_as(leaves[i])
            grad = whole if grad is None else whole.add_(grad)
        out_grads[i] = torch.zeros_like(leaves[i]) if grad is None else grad
    factors: list[list[Factor]] = [[] for _ in leaves]
    turns: list[list[Turn]] = [[] for _ in leaves]
    for site, b, tensors in zip(collected, filled(collected_b, collect_taps), saved, strict=True):
        use = modes[0].uses[site]
        for name, target in use.targets:
            factor = use.factor(name, target, b, tensors)
            if target.leaves().isdisjoint(postpone):
                for i, at_leaf in leaf_factors(target, factor).items():
                    if i in kept:
                        factors[i].append(at_leaf)
            else:
                for i, turn in target.turns(factor):
                    turns[i].append(turn)
    for q, i in met:
        value = readers[q][i].read_all(factors[i])
        values[q][i] = _unscaled(value, scale, quantities[q].degree)
    return Taken(losses, values, out_grads, factors, turns, model.trace, modes[0].route)


def pull_back(
    f: Callable[..., tuple[Tensor, Any]],
    primals: tuple[list[Tensor], ...],
    cotangent: float | Tensor,
    *,
    guarded: Traced,
    differentiable: bool,
) -> tuple[Tensor, Any, Any]:
    """`f`'s output, the cotangents of its primals for its own (None may stand for zeros), and its
    aux output.

    Inside another transform this is `torch.func.vjp`. At the top level plain autograd says the
    same with a tenth of the overhead on every op and tap.
    """
    if in_transform():
        out: Any = torch.func.vjp(f, *primals, has_aux=True)
        losses, pullback, aux = out
        cotangents = pullback(
            _like(losses, cotangent),
            retain_graph=differentiable,
            create_graph=differentiable,
        )
        return losses, cotangents, aux
    inputs = [[x.detach().requires_grad_() for x in group] for group in primals]
    guards = [x.detach().requires_grad_() for x in guarded.leaves]
    with torch.enable_grad():
        losses, aux = f(*inputs, guards)
    flat = [x for group in inputs for x in group]
    found = gradients(losses, [*flat, *guards], _like(losses, cotangent))
    unseen = [
        name
        for name, g in zip(guarded.spec.names, found[len(flat) :], strict=True)
        if g is not None
    ]
    if unseen:
        raise unseen_use(unseen)
    rest = iter(found)
    return losses.detach(), [[next(rest) for _ in group] for group in inputs], aux


def _like(losses: Tensor, cotangent: float | Tensor) -> Tensor:
    if isinstance(cotangent, Tensor):
        return cotangent.to(losses)
    return torch.full_like(losses, cotangent)


def _unscaled(value: Tensor, scale: float | Tensor, degree: int) -> Tensor:
    if isinstance(scale, Tensor) or scale == 1.0:
        return value
    return value / scale**degree


def filled(cotangents: Sequence[Tensor | None], primals: Sequence[Tensor]) -> list[Tensor]:
    """Cotangents of primals, the zeros among them written out."""
    pairs = zip(cotangents, primals, strict=True)
    return [torch.zeros_like(x) if g is None else g for g, x in pairs]


def _adds_up(leaf: Tensor) -> bool:
    """Whether the training gradient of a parameter may be added up in place: outside transforms
    and compiled programs, in its own dtype."""
    plain = not in_transform() and not symbolic(leaf)
    return plain and leaf.is_floating_point() and wide(leaf).dtype == leaf.dtype


def _derivative_wanted(leaves: Sequence[Tensor], batch: PyTree, readers: Any) -> bool:
    """Whether an enclosing transform differentiates what this run returns."""
    return any(
        x.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(x)
        for x in tensors_of((list(leaves), batch, readers))
    )


def meetings(
    model_fn: ModelFn,
    leaves: Sequence[Tensor],
    spec: ParamSpec,
    batch: PyTree,
    *,
    randomness: Randomness,
    exact: bool,
) -> list[list[Meeting]]:
    """The uses of every parameter in a run on `batch`.

    Not `exact`, the positions may be those of a batch of another length, scaled to this one.
    """
    exact = exact or _open(batch)
    remembered = memory(model_fn)
    lengths = sum(x[0].numel() for x in tensors_of(batch))

    def look(model: Traced) -> tuple[list[Site], float]:
        key = ("sites", model.trace, shapes_key(model.leaves))
        if exact:
            return _sites(model), 1.0
        if key not in remembered:
            remembered[key] = (lengths, _sites(model))
        seen_lengths, seen = remembered[key]
        return seen, lengths / seen_lengths

    model, (sites, ratio) = on_trace(look, model_fn, leaves, spec, batch, randomness)
    out: list[list[Meeting]] = [[] for _ in leaves]
    for site in sites:
        for i, kind, shape, positions, direct in site.targets:
            scaled = known(positions) if ratio == 1 else max(1, round(positions * ratio))
            out[i].append(Meeting(kind, shape, model.n, scaled, direct))
    return out


def _sites(model: Traced) -> list[Site]:
    """All uses and what their outputs look like: those of a run on two samples, remembered by
    the exact shapes of the batch, where those are known."""
    few = min(model.n, 2)
    sample = take(model.batch, range(few))
    if _open(sample):
        return _look_at_sites(model, few, sample)
    remembered = memory(model.model_fn)
    key = ("sites", model.trace, shapes_key((model.leaves, sample)))
    if key not in remembered:
        remembered[key] = _look_at_sites(model, few, sample)
    return remembered[key]


def _open(batch: PyTree) -> bool:
    """Whether some sizes are symbols: a compiled program for all lengths is being recorded."""
    return any(isinstance(size, torch.SymInt) for x in tensors_of(batch) for size in x.shape)


def _look_at_sites(model: Traced, few: int, sample: PyTree) -> list[Site]:
    try:
        return _sites_of(model, few, sample)
    except StaleLayout:  # the first few go another way than the batch
        return _sites_of(model, model.n, model.batch)


def _sites_of(model: Traced, few: int, sample: PyTree) -> list[Site]:
    tracked = constants(model.leaves, model.spec)
    mode = TapMode(model.trace, tracked, few, {}, {}, note_sites=True)
    with mode, torch.enable_grad():
        model.model_fn(model.spec.unflatten([t.shown for t in tracked]), sample)
    mode.finish()
    return mode.sites


def _collecting_sites(model: Traced, collect: Collection[int], *, anew: bool) -> dict[int, Site]:
    """The uses of the parameters `collect`, by number."""
    if not collect:
        return {}
    sites = _sites_of(model, model.n, model.batch) if anew else _sites(model)
    return {
        number: site
        for number, site in enumerate(sites)
        if any(target[0] in collect for target in site.targets)
    }
