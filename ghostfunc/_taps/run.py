"""One run of a model under taps: taps go in, and the backward pass returns the quantities."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ghostfunc._base.definition import unwrapped_memory
from ghostfunc._base.documents import DocumentsAlike
from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import TransformError
from ghostfunc._base.losses import FiniteLosses, check_finite, check_losses, refuse_unseen
from ghostfunc._base.processes.pieces import in_step, whole_likes
from ghostfunc._base.program import Program
from ghostfunc._base.torch_private import (
    address,
    any_symbolic,
    differentiated,
    divide_all,
    in_transform,
    innermost,
    symbolic,
    unrounded,
)
from ghostfunc._base.trees import ParamSpec, tensors_of
from ghostfunc._base.types import Check, PyTree
from ghostfunc._factors import bundles, contract
from ghostfunc._factors.beside_total import RunningTotal
from ghostfunc._factors.factor import Dense, Factor
from ghostfunc._quantities.quantity import Dot, Quantity, kind_of
from ghostfunc._quantities.readers import DeferredGradients, ValueReader, read_parts, takes_parts
from ghostfunc._taps.claim import Claim, Dots
from ghostfunc._taps.mode import TapMode
from ghostfunc._taps.on_ranks import Together
from ghostfunc._taps.positions import recut_of
from ghostfunc._taps.proof import prove
from ghostfunc._taps.readings import KeptPart, Read, what_was_read
from ghostfunc._taps.sinks import Ready, as_cotangent, run_into_sinks
from ghostfunc._taps.tap import SinkUse
from ghostfunc._taps.use import StaleOutputs, Use
from ghostfunc._taps.use_shapes import collecting_outputs
from ghostfunc._trace.fitting import TracedModel, plain, with_trace
from ghostfunc._trace.trace import Trace, WayTaken
from ghostfunc._trace.tracked import ReaderKey, Tracked, at_leaves, constants, gradient_at
from ghostfunc._trace.watch import gradients


@dataclass(frozen=True)
class RunResult:
    """What one run returns, parameter by parameter; None for what was not asked for.

    Attributes:
        losses: `[n]`.
        values: per quantity, what was read.
        grads: the gradient of `scale * sum_i losses[i]`.
        factors: the factors of `scale * g_i`, one per use; none where `parts` have them.
        parts: the factors of documents, by their lengths.
        deferred: the same of the parameters `defer`, not yet pulled back to them.
        trace: what the run followed.
        way: what tells the way through the program from others.
        readers: per quantity, what the values were read by.
    """

    losses: Tensor
    values: list[list[Any]]
    grads: list[Any]
    factors: list[list[Factor]]
    parts: list[KeptPart]
    deferred: list[DeferredGradients | None]
    trace: Trace
    way: WayTaken
    readers: list[list[Any]]


def run(
    program: Program,
    batch: PyTree,
    quantities: Sequence[Quantity],
    *,
    grads: Collection[int] = (),
    collect: Collection[int] = (),
    defer: Collection[int] = (),
    scale: float | Tensor = 1.0,
    outlives: bool = False,
    check: Check = "new",
    summed: Collection[int] = (),
    finite: FiniteLosses | None = None,
    ready: Ready | None = None,
    by_autograd: bool = False,
    by_length: bool = False,
) -> RunResult:
    """Run `model_fn` under taps, tracing it first where needed.

    `grads` and `collect` are the parameters whose gradient, or whose factors, are wanted; those of
    `defer`, some of `collect`, are not pulled back through derived tensors yet. With a `scale`
    for every sample, `[n]`, values are those of `scale_i * g_i`, too. Factors that `outlive` the
    call have memory of their own. The values of quantities that are `summed` over parameters are
    one in all. Whoever gives `finite` has it `look` at the losses when everything is queued.
    Outside transforms, `ready` gets most gradients while the backward pass goes on; `by_autograd`,
    gradients there are autograd's own, bit for bit, with its products beside those of readers.
    `by_length`, factors of packed documents may be kept in `parts`, little filled up.
    """
    own = FiniteLosses() if finite is None else finite
    asked = partial(
        _run,
        quantities=quantities,
        grads=grads,
        collect=collect,
        scale=scale,
        defer=defer,
        outlives=outlives,
        summed=summed,
        finite=own,
        ready=ready,
        by_autograd=by_autograd,
        by_length=by_length,
    )
    read = partial(what_was_read, quantities, summed, scale, program.leaves)
    options = *(tuple(sorted(x)) for x in (grads, collect, defer, summed)), type(scale)

    ranks = in_step(program.model_fn)
    if ranks is not None:

        def look(whole: Program) -> RunResult:
            return run(whole, batch, [], check=check)

        together = Together(ranks, plain(program), batch, look, check)
        return together.run(partial(_of_all, asked, own))[1]

    def use(model: TracedModel) -> RunResult:
        taken = _on_fresh_outputs(asked, model)
        followed = in_transform()

        def what() -> Hashable:
            return kind_of(taken.readers), *options, followed

        def again(anew: bool) -> Read:
            return read(asked(model) if anew else taken, partial(asked, model))

        if check != "new" or not model.is_proved(taken.way, what()):
            claim = Claim(model, taken.way, taken.losses, dots, again, what)
            prove(claim, check, program.randomness)
        return taken

    model, taken = with_trace(use, program, batch)
    if finite is None:
        _doubt(own, quantities, program.leaves, program.spec, taken.values)
        own.look()
    if any_symbolic(tensors_of(batch)):
        refuse_unproved(model)
    return taken


def _of_all(
    asked: Callable[[TracedModel], RunResult], finite: FiniteLosses, model: TracedModel
) -> RunResult:
    """A rank's share of a run of all ranks."""
    taken = asked(model)
    if finite.wanted:
        check_finite(taken.losses)  # while the others still listen
    return taken


def _on_fresh_outputs(asked: Callable[..., RunResult], model: TracedModel) -> RunResult:
    """A run, with the outputs' shapes looked at anew where they are not those of an earlier run of
    the same shapes: where a batch is trimmed to its longest sample, say."""
    try:
        return asked(model)
    except StaleOutputs:
        return asked(model, refresh=True)


def _doubt(
    finite: FiniteLosses,
    quantities: Sequence[Quantity],
    leaves: Sequence[Tensor],
    spec: ParamSpec,
    values: Sequence[Sequence[Tensor | None]],
) -> None:
    """Have quantities looked into if their values are not finite; most cannot be at fault."""
    for quantity, row in zip(quantities, values, strict=True):
        if type(quantity).check_finite is not Quantity.check_finite:
            for x in (x for x in row if x is not None):
                finite.doubt(x, partial(quantity.check_finite, leaves, spec))


def refuse_unproved(model: TracedModel) -> None:
    """Raise `TransformError` for what has to be proved in every run, and is being compiled."""
    if model.trace.statistics or model.trace.guessed or (model.trace.reorders and model.n > 1):
        raise TransformError(
            "model_fn makes numbers of several samples, or may reorder samples by their values "
            "(sorting, routing to experts), which has to be checked in every run: torch.compile "
            "cannot record that. Call it uncompiled."
        )


def dots(model: TracedModel, directions: Sequence[Tensor], scale: Tensor) -> Dots:
    """`<g_i, u>` per parameter, of losses that are multiplied by `scale`, `[n]`, on the way."""
    taken = _run(model, [Dot(model.spec.unflatten(directions))], (), (), scale)
    return Dots(taken.losses, [x / scale.to(x) for x in taken.values[0]], taken.way)


def _run(
    model: TracedModel,
    quantities: Sequence[Quantity],
    grads: Collection[int],
    collect: Collection[int],
    scale: float | Tensor,
    defer: Collection[int] = (),
    *,
    outlives: bool = False,
    summed: Collection[int] = (),
    finite: FiniteLosses | None = None,
    refresh: bool = False,
    ready: Ready | None = None,
    by_autograd: bool = False,
    by_length: bool = False,
) -> RunResult:
    """`refresh` looks at the uses in a run on this very batch."""
    leaves, spec = model.leaves, model.spec
    wholes = whole_likes(model)
    readers = [q.readers(leaves if q.of_directions else wholes, spec) for q in quantities]
    keys, met = _use_by_use(quantities, readers, model.trace)
    kept = {*collect, *(i for _, i in met)}
    foreign = {address(x) for x in (*leaves, *tensors_of(model.batch))} if outlives else set()
    own = {(q, i): readers[q][i] for q, i in keys}
    followed = in_transform() or any_symbolic((*leaves, *tensors_of(model.batch)))
    by_autograd = by_autograd and not followed
    # Read with all uses at hand, a quantity may have the gradient of their sum, too.
    totals = set() if by_autograd else set(grads)
    giving = {i: (q, i) for q, i in met if i in totals and _gives_total(readers[q][i])}
    asked = [i for i in grads if i not in giving]
    look_at = finite or FiniteLosses()
    if followed:
        taken = _by_cotangents(model, own, asked, kept, scale, refresh=refresh)
    else:
        taken = _by_sinks(model, own, asked, kept, scale, summed, look_at, ready, totals)
    losses = taken.losses
    if outlives:  # what no tap comes before may be the caller's memory
        foreign.update(map(address, taken.untapped))
    values = [[taken.values.get((q, i)) for i in range(len(leaves))] for q in range(len(readers))]
    out_grads = _by_leaf(taken.grads, leaves)
    apart = not (followed or defer) and (by_length or not collect)
    alike = _by_length(model, [readers[q][i] for q, i in met]) if apart else [None]
    later: list[tuple[Tracked, Factor]] = []
    with unrounded(losses):
        parts = _kept_parts(taken.kept, alike, defer, kept, later, len(leaves))
        for q, i in met:
            if giving.get(i) == (q, i):
                values[q][i], total = readers[q][i].read_with_total([part.of(i) for part in parts])
                out_grads[i] = total.reshape(leaves[i].shape).to(leaves[i].dtype)
            else:
                values[q][i] = read_parts(readers[q][i], [part.of(i) for part in parts])
    for q, quantity in enumerate(quantities):
        if q in summed:
            values[q] = _added_up(taken.pieces.get(q, ()), values[q])
        values[q] = _unscaled(values[q], scale, quantity.degree)
    whole = parts.pop().factors if alike == [None] else [[] for _ in leaves]
    if outlives:
        whole = [[bundles.owned(f, foreign) for f in bundle] for bundle in whole]
    deferred = [_deferred(i, later) if later else None for i in range(len(leaves))]
    return RunResult(
        losses, values, out_grads, whole, parts, deferred, model.trace, taken.way, readers
    )


def _by_length(model: TracedModel, readers: Sequence[Any]) -> list[DocumentsAlike | None]:
    """The documents of packed rows by their lengths, where they may be read in parts; otherwise
    None alone."""
    packing = model.packing
    if packing is None or len(packing.groups) == 1 or not all(map(takes_parts, readers)):
        return [None]
    return [*packing.groups]


def _kept_parts(
    uses: Sequence[tuple[Use, Tensor, list[Tensor]]],
    alike: Sequence[DocumentsAlike | None],
    defer: Collection[int],
    kept: Collection[int],
    later: list[tuple[Tracked, Factor]],
    count: int,
) -> list[KeptPart]:
    """The factors of the uses that were collected, of all samples or by their lengths. Those of
    parameters to `defer` go to `later`."""
    at_once: list[list[tuple[Tracked, Factor]]] = [[] for _ in alike]
    for use, b, tensors in uses:
        for name, target in use.targets:
            made = use.makers(b, tensors)[name]()
            whole = use.for_target(made, target) if isinstance(made, Dense) else None
            for documents, own in zip(alike, at_once, strict=True):
                pairs = own if target.leaves().isdisjoint(defer) else later
                if whole is None:
                    factor = use.for_target(made, target, documents)
                else:
                    factor = whole if documents is None else bundles.take(whole, documents.samples)
                pairs.append((target, factor))
    parts = []
    for documents, own in zip(alike, at_once, strict=True):
        found = at_leaves(own)
        factors = [found.get(i, []) if i in kept else [] for i in range(count)]
        parts.append(KeptPart(None if documents is None else documents.samples, factors))
    return parts


def _use_by_use(
    quantities: Sequence[Quantity], readers: Sequence[Sequence[Any]], trace: Trace
) -> tuple[list[ReaderKey], list[ReaderKey]]:
    """What is read use by use, and what with all uses of a parameter at hand: a quantity that is
    not linear in the gradient."""
    keys: list[ReaderKey] = []
    met: list[ReaderKey] = []
    for q, row in enumerate(readers):
        for i in (i for i, r in enumerate(row) if r is not None):
            together = quantities[q].degree > 1 and trace.uses[i] > 1
            (met if together else keys).append((q, i))
    return keys, met


@dataclass(frozen=True)
class _Taken:
    """What a forward and a backward pass under taps leave.

    Attributes:
        values: what was read, not unscaled yet.
        pieces: of quantities that are summed over parameters, what is to be added up.
        grads: of the parameters asked for; None stands for zero.
        kept: of every use that is collected the use, its output's cotangent and its arguments.
        untapped: arguments that no tap comes before.
    """

    losses: Tensor
    values: dict[ReaderKey, Tensor]
    pieces: dict[int, list[Tensor]]
    grads: dict[int, Tensor | None]
    kept: Sequence[tuple[Use, Tensor, list[Tensor]]]
    untapped: list[Tensor]
    way: WayTaken


def _by_sinks(
    model: TracedModel,
    readers: dict[ReaderKey, Any],
    grads: Collection[int],
    collect: Collection[int],
    scale: float | Tensor,
    summed: Collection[int],
    finite: FiniteLosses,
    ready: Ready | None,
    totals: Collection[int],
) -> _Taken:
    """A run outside transforms: uses add up their own numbers, gradients of `totals` included."""
    leaves, n = model.leaves, model.n
    running = {i: RunningTotal() for i in grads if i in totals and _in_own_dtype(leaves[i])}
    sunk = run_into_sinks(
        model,
        readers,
        grads=grads,
        running=running,
        collect=collect,
        cotangent=scale,
        summed=summed,
        finite=finite,
        ready=ready,
        by_autograd=not totals,
    )
    values, pieces = sunk.sinks.values, sunk.sinks.pieces
    for key, reader in readers.items():
        if key not in values and key[0] not in pieces:
            values[key] = torch.zeros_like(reader.tap(leaves[key[1]], n))
    uses = [use for use in sunk.mode.uses if isinstance(use, SinkUse) and use.collected]
    kept = [(use, sunk.cotangent(use), [x.detach() for x in use.arg_tensors]) for use in uses]
    untapped = [x for use in uses for x in use.arg_tensors if not x.requires_grad]
    return _Taken(sunk.losses, values, pieces, sunk.grads, kept, untapped, sunk.mode.way)


def _by_cotangents(
    model: TracedModel,
    readers: dict[ReaderKey, Any],
    grads: Collection[int],
    collect: Collection[int],
    scale: float | Tensor,
    *,
    refresh: bool,
) -> _Taken:
    """In transforms and in programs being compiled, which follow the cotangents of zero taps."""
    leaves, spec, n = model.leaves, model.spec, model.n
    taps = [reader.tap(leaves[i], n) for (_, i), reader in readers.items()]
    collected = collecting_outputs(model, collect, refresh=refresh)
    modes: list[TapMode] = []

    def tapped(
        taps: list[Tensor],
        collect_taps: list[Tensor],
        primals: list[Tensor],
        guards: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[list[Tensor]]]:
        tracked = constants(leaves, spec)
        for i, primal in zip(grads, primals, strict=True):
            tracked[i].primal = tracked[i].shown = primal
        for leaf, guard in zip(tracked, guards, strict=False):
            leaf.shown = guard
        for key, reader in readers.items():
            tracked[key[1]].readers[key] = (reader, reader)
        mode = TapMode(
            model.trace,
            tracked,
            n,
            dict(zip(readers, taps, strict=True)),
            dict(zip(collected, collect_taps, strict=True)),
            recut=recut_of(model),
        )
        with mode:
            losses = model.model_fn(spec.unflatten([t.shown for t in tracked]), model.batch)
        mode.finish()
        check_losses(losses, n)
        modes.append(mode)
        # An enclosing transform may differentiate what is made of them; without one they would keep
        # the whole graph alive.
        nested = in_transform()
        args = [mode.uses[number].arg_tensors for number in collected]
        return losses, [[x if nested else x.detach() for x in row] for row in args]

    collect_taps = [output.tap(model.rows) for output in collected.values()]
    losses, (read, cotangents, param_grads), saved = pull_back(
        tapped,
        (taps, collect_taps, [leaves[i] for i in grads]),
        scale,
        guarded=model,
        differentiable=any(map(differentiated, tensors_of(list(readers.values())))),
    )
    uses = [modes[0].uses[number] for number in collected]
    return _Taken(
        losses,
        dict(zip(readers, with_zeros(read, taps), strict=True)),
        {},
        dict(zip(grads, param_grads, strict=True)),
        list(zip(uses, with_zeros(cotangents, collect_taps), saved, strict=True)),
        [x for args in saved for x in args if not x.requires_grad],
        modes[0].way,
    )


def _gives_total(reader: Any) -> bool:
    return isinstance(reader, ValueReader) and reader.gives_total


def _deferred(leaf: int, pairs: Sequence[tuple[Tracked, Factor]]) -> DeferredGradients | None:
    """A parameter's gradients, to be formed one sample at a time; None if nothing leads to it."""
    own = [(target, factor) for target, factor in pairs if leaf in target.leaves()]
    if not own:
        return None
    targets, factors = zip(*own, strict=True)
    return DeferredGradients(factors, partial(gradient_at, leaf, targets))


def pull_back(
    f: Callable[..., tuple[Tensor, Any]],
    primals: tuple[list[Tensor], ...],
    cotangent: float | Tensor,
    *,
    guarded: TracedModel,
    differentiable: bool,
) -> tuple[Tensor, Any, Any]:
    """`f`'s output, the cotangents of its primals for its own (None may stand for zeros), and its
    aux output.

    Inside another transform this is `torch.func.vjp`. At the top level plain autograd says the
    same with a tenth of the overhead on every op and tap. An enclosing transform may differentiate
    the cotangents where it differentiates the losses, whatever it does so by: parameters, batch, or
    what the model closes over. By what `f` reads besides, if they are `differentiable`.
    """
    if in_transform():
        guards = [x.view_as(x) for x in guarded.leaves]
        with unwrapped_memory():
            out: Any = torch.func.vjp(f, *primals, guards, has_aux=True)
        losses, pullback, aux = out
        differentiable = differentiable or differentiated(losses)
        with unrounded(losses):
            cotangents = pullback(
                as_cotangent(losses, cotangent),
                retain_graph=differentiable,
                create_graph=differentiable,
            )
        *cotangents, found = cotangents
        if not any(map(symbolic, guarded.leaves)):
            reached = [g if bool(innermost(g).any()) else None for g in found]
            refuse_unseen(guarded.spec, reached)
        return losses, cotangents, aux
    inputs = [[x.detach().requires_grad_() for x in group] for group in primals]
    guards = [x.detach().requires_grad_() for x in guarded.leaves]
    with torch.enable_grad():
        losses, aux = f(*inputs, guards)
    flat = [x for group in inputs for x in group]
    with unrounded(losses):
        found = gradients(losses, [*flat, *guards], as_cotangent(losses, cotangent))
    refuse_unseen(guarded.spec, found[len(flat) :])
    rest = iter(found)
    return losses.detach(), [[next(rest) for _ in group] for group in inputs], aux


def _by_leaf(grads: dict[int, Tensor | None], leaves: Sequence[Tensor]) -> list[Any]:
    """Gradients in the order of the parameters, zeros written out; None where none is wanted."""
    out: list[Any] = [None] * len(leaves)
    for i, grad in grads.items():
        out[i] = torch.zeros_like(leaves[i]) if grad is None else grad
    return out


def _added_up(pieces: Sequence[Tensor], values: Sequence[Tensor | None]) -> list[Any]:
    """The one value of all parameters; none where no parameter is met."""
    found = [*pieces, *(x for x in values if x is not None)]
    return [contract.add_up(found)] if found else []


def _unscaled(values: list[Any], scale: float | Tensor, degree: int) -> list[Any]:
    if isinstance(scale, Tensor) or scale == 1.0:
        return values
    read = [x for x in values if x is not None]
    divided = iter(divide_all(read, scale**degree))
    return [None if x is None else next(divided) for x in values]


def with_zeros(cotangents: Sequence[Tensor | None], primals: Sequence[Tensor]) -> list[Tensor]:
    """Cotangents of primals, the zeros among them written out."""
    pairs = zip(cotangents, primals, strict=True)
    return [torch.zeros_like(x) if g is None else g for g, x in pairs]


def _in_own_dtype(leaf: Tensor) -> bool:
    """Whether the training gradient of a parameter may be added up in place, in its own dtype."""
    return leaf.is_floating_point() and wide(leaf) is leaf
