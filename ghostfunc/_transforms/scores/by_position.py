"""Dot products split up by positions: which token carries the score.

Let parameters move along `u` at position t of sample i alone, by `eps_it`. The derivative of
`losses[i]` is that position's share of `<g_i, u>`, and the shares add up to it:

    s_it = sum over uses <b_it, (J u)_it>,   sum_t s_it = <g_i, u>

`(J u)_it` is what the output of the use, `y = op(a, W)`, changes by at position t when W moves
along `u`, and `b_it` the cotangent there. So every use gets a tap `eps`, `[n, T]`:

    y + eps * (J u)

No op rule is asked. Which axis of `y` holds the positions is seen, not guessed: the model is run
once more on samples that are one position shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._base.documents import packing_of
from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import PositionAxisError, SampleAxisError
from ghostfunc._base.losses import check_finite, check_shape
from ghostfunc._base.program import Program
from ghostfunc._base.refusals import op_name
from ghostfunc._base.remembered import STRUCTURES, Recent, memory
from ghostfunc._base.torch_private import in_transform, symbolic
from ghostfunc._base.trees import batch_size, map_leaves, take, tensors_of
from ghostfunc._base.types import Check, PyTree
from ghostfunc._factors.contract import add_up
from ghostfunc._quantities.quantity import Prepared
from ghostfunc._quantities.readers import DotReader, Reader
from ghostfunc._taps.claim import Claim
from ghostfunc._taps.mode import TapMode, mixes_last_axes, unfold_all
from ghostfunc._taps.proof import prove
from ghostfunc._taps.readings import Read, Reading, reading_of
from ghostfunc._taps.run import dots, pull_back, refuse_unproved, with_zeros
from ghostfunc._trace.fitting import TracedModel, with_trace
from ghostfunc._trace.layout import StaleLayout
from ghostfunc._trace.trace import CallTrace, WayTaken
from ghostfunc._trace.tracked import CallArgs, ReaderKey, constants, shaped

WAY_OUT = (
    "Shares of positions add up to the score only if every parameter has some. Leave such "
    "parameters out of params (close over them in model_fn), or ask for per_param=True without "
    "per_position."
)


def position_dots(
    program: Program,
    batch: PyTree,
    directions: Sequence[Sequence[Tensor]],
    *,
    per_param: bool,
    check: Check,
    look: Callable[[Tensor], None] = check_finite,
) -> list[list[Tensor]]:
    """For every direction the shares of all positions: `[n, T]`, one in all or one per
    parameter."""
    if packing_of(batch) is not None:
        raise PositionAxisError(
            "per_position=True does not take packed documents: its shares are numbered by the "
            "positions of samples, and these share rows. Ask for the scores of documents without "
            "per_position, or for shares of documents in rows of their own."
        )

    def use(model: TracedModel) -> list[list[Tensor]]:
        def shares_of(model: TracedModel) -> tuple[list[list[Tensor]], Tensor, WayTaken]:
            return _shares(model, directions=directions, per_param=per_param, look=look)

        shares, losses, way = shares_of(model)

        def read(again: bool) -> Read:
            found, of, _ = shares_of(model) if again else (shares, losses, way)
            made = [_reading(us, x) for us, x in zip(directions, found, strict=True)]
            return Read(of, [reading for reading in made if reading is not None], [])

        asked = "positions", per_param, len(directions), in_transform()
        claim = Claim(model, way, losses, dots, read, lambda: asked)
        prove(claim, check, program.randomness)
        return shares

    model, shares = with_trace(use, program, batch)
    if any(map(symbolic, tensors_of(batch))):
        refuse_unproved(model)
    return shares


def _reading(directions: Sequence[Tensor], shares: Sequence[Tensor]) -> Reading | None:
    """All positions together have `<g_i, u>`."""
    readers = [DotReader(wide(u)) for u in directions]
    values = [x.sum(1) for x in shares]
    return reading_of(
        Prepared(readers, degree=1), readers, values, summed=len(shares) < len(directions)
    )


def _shares(
    model: TracedModel,
    *,
    directions: Sequence[Sequence[Tensor]],
    per_param: bool,
    look: Callable[[Tensor], None],
) -> tuple[list[list[Tensor]], Tensor, WayTaken]:
    """The shares, the losses, and the way through the program."""
    if model.trace.reorders:
        raise SampleAxisError(
            "per_position=True does not take a model that may reorder its samples by their values."
        )
    axes, length = _position_axes(model)
    columns = len(model.leaves) if per_param else 1
    zero = wide(model.leaves[0].new_zeros(()))
    taps = [[zero.expand(model.n, length)] * columns for _ in directions]

    modes: list[_PositionMode] = []

    def tapped(taps: list[Tensor], guards: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        rows = [taps[i : i + columns] for i in range(0, len(taps), columns)]
        mode = _PositionMode(model, directions, axes, rows, guards)
        modes.append(mode)
        with mode:
            losses = model.model_fn(mode.params, model.batch)
        mode.finish()
        return check_shape(losses, model.n), []

    flat = [tap for row in taps for tap in row]
    nested = in_transform()
    losses, (cotangents,), _ = pull_back(tapped, (flat,), 1.0, guarded=model, differentiable=nested)
    look(losses)
    cotangents = with_zeros(cotangents, flat)
    shares = [cotangents[i : i + columns] for i in range(0, len(flat), columns)]
    return shares, losses, modes[0].way


class _PositionMode(TapMode):
    """Runs a traced model with a tap `[n, T]` at every use, for every direction.

    Without taps it only notes, in `seen`, what every use's output looks like, the samples on an
    axis of their own.
    """

    def __init__(
        self,
        model: TracedModel,
        directions: Sequence[Sequence[Tensor]],
        axes: Sequence[int] = (),
        taps: Sequence[Sequence[Tensor]] = (),
        guards: Sequence[Tensor] = (),
    ) -> None:
        tracked = constants(model.leaves, model.spec)
        for leaf, guard in zip(tracked, guards, strict=False):
            leaf.shown = guard
        for k, us in enumerate(directions):
            for i, u in enumerate(us):
                tracked[i].readers[k, i] = (DotReader(u), DotReader(u))
        super().__init__(model.trace, tracked, model.n, {}, {})
        self.params = model.spec.unflatten([t.shown for t in tracked])
        self.seen: list[tuple[str, tuple[int, ...], int]] = []
        self._axes, self._position_taps = axes, taps

    def fork(self, *args: Any, **kwargs: Any) -> TapMode:
        raise PositionAxisError(
            "per_position=True does not look into regions under gf.remat: taps of positions would "
            "be placed twice. Ask a model without remat."
        )

    def _run_with_rule(
        self, func: Callable[..., Any], call: CallArgs, expected: CallTrace
    ) -> Tensor:
        layout = expected.out
        changes = self._changes(func, call)
        y = call.run(func, call.consts())
        self._check_layout(layout, y)
        self.meets(y.shape)
        moved = self._move(
            func,
            call,
            layout.split(y, self._n_rows),
            layout.sample_axis,
            [(tap, layout.split(change, self._n_rows)) for tap, change in changes],
        )
        return layout.merge(moved)

    def _run_broadcast(
        self, func: Callable[..., Any], call: CallArgs, expected: CallTrace
    ) -> Tensor:
        layout = expected.out
        if mixes_last_axes(func) and layout.axis >= expected.ndim - 2:
            raise PositionAxisError(
                f"{op_name(func)} has samples where it has positions. {WAY_OUT}"
            )
        args = unfold_all(call, expected, self._n_rows)
        padded = [layout.pad(t.const, expected.ndim) for t in call.tracked]
        for i, copy in zip(call.hits, padded, strict=True):
            args[i] = copy
        for i, tracked, copy in zip(call.hits, call.tracked, padded, strict=True):
            shape = list(copy.shape)
            shape[layout.sample_axis] = self._n_rows
            self.meets(shape)
            if func is not F.scaled_dot_product_attention:  # of a mask and queries, say
                tensors = [x for x in args if isinstance(x, Tensor)]
                shape = list(torch.broadcast_shapes(*(x.shape for x in tensors)))
            shape[layout.sample_axis] = self._n_rows
            changes = []
            for (k, leaf), (reader, _) in tracked.readers.items():
                u = shaped(_direction(reader), tracked.const)
                changes.append(((k, leaf), layout.pad(u, expected.ndim).expand(shape)))
            args[i] = self._move(
                func, call, copy.expand(shape), layout.sample_axis, self._by_tap(changes)
            )
        call_args, kwargs = call.rebuild(args)
        return layout.merge(func(*call_args, **kwargs)).to(expected.dtype)

    def _changes(
        self, func: Callable[..., Any], call: CallArgs
    ) -> list[tuple[tuple[int, int], Tensor]]:
        """How the output of a call moves with its parameters, by tap."""
        if not self._position_taps:
            return []
        if not in_transform():  # `eps` is zero: nothing flows back through its factor
            leaves = [x.detach() if isinstance(x, Tensor) else x for x in call.leaves]
            call = replace(call, leaves=leaves)
        consts = call.consts()
        y, pullback = torch.func.vjp(lambda *values: call.run(func, values), *consts)[:2]
        # J u is the derivative of the linear map v -> J^T v along u: see `tracked._push`.
        along = torch.func.vjp(pullback, torch.zeros_like(y))[1]
        tangents: dict[tuple[int, int], list[Tensor]] = {}
        for position, tracked in enumerate(call.tracked):
            for key, (reader, _) in tracked.readers.items():
                own = tangents.setdefault(self._tap_of(key), [torch.zeros_like(x) for x in consts])
                own[position] = own[position] + shaped(_direction(reader), tracked.const)
        return [(tap, along(tuple(us))[0]) for tap, us in tangents.items()]

    def _tap_of(self, key: ReaderKey) -> tuple[int, int]:
        k, leaf = key
        return k, leaf if len(self._position_taps[k]) > 1 else 0

    def _by_tap(
        self, changes: Sequence[tuple[ReaderKey, Tensor]]
    ) -> list[tuple[tuple[int, int], Tensor]]:
        if not self._position_taps:
            return []
        taps: dict[tuple[int, int], list[Tensor]] = {}
        for key, change in changes:
            taps.setdefault(self._tap_of(key), []).append(change)
        return [(tap, add_up(parts)) for tap, parts in taps.items()]

    def _move(
        self,
        func: Callable[..., Any],
        call: CallArgs,
        y: Tensor,
        sample_axis: int,
        changes: Sequence[tuple[tuple[int, int], Tensor]],
    ) -> Tensor:
        """`y + eps * change` for every tap; `y` has its samples on an axis of their own."""
        if not self._position_taps:
            names = ", ".join(repr(t.name) for t in call.tracked)
            self.seen.append((f"{op_name(func)} on {names}", tuple(y.shape), sample_axis))
            return y
        axis = self._axes[len(self.seen)]
        self.seen.append(("", tuple(y.shape), sample_axis))
        for (k, column), change in changes:
            eps = self._position_taps[k][column]
            if y.shape[axis] != eps.shape[1]:
                raise StaleLayout(f"{op_name(func)} has {y.shape[axis]} positions")
            eps = eps if sample_axis < axis else eps.mT
            shape = [1] * y.ndim
            shape[sample_axis], shape[axis] = self._n_rows, y.shape[axis]
            y = y + (eps.reshape(shape) * wide(change)).to(y.dtype)
        return y


def _direction(reader: Reader | None) -> Tensor:
    if reader is None:
        raise PositionAxisError(
            "per_position=True pushes directions through what is made of parameters alone, and "
            "torch has no second derivative for one of those ops (of sparse tensors, say). Ask "
            "without per_position."
        )
    assert isinstance(reader, DotReader)  # all that `_PositionMode` is given
    return reader.u


# --- where positions lie ------------------------------------------------------------------------


class PositionAxes(Recent[Hashable, tuple[list[int], int]]):
    """What `_position_axes` found of one model function, by trace and length."""

    def __init__(self) -> None:
        super().__init__(STRUCTURES)


def _position_axes(model: TracedModel) -> tuple[list[int], int]:
    """The axis of positions at every use, and how many positions there are."""
    length = _length(model.batch)
    remembered = memory(model.model_fn, PositionAxes)
    return remembered.made((model.trace, length), lambda: _find_axes(model, length))


def _find_axes(model: TracedModel, length: int) -> tuple[list[int], int]:
    few = take(model.batch, range(min(model.n, 2)))
    whole = _seen(model, few)
    try:
        cut = _seen(model, map_leaves(lambda x: x[:, :-1].contiguous() if x.ndim > 1 else x, few))
    except (RuntimeError, ValueError, TypeError, LookupError, StaleLayout) as error:
        raise PositionAxisError(
            "per_position=True sees where positions lie by running samples that are one position "
            f"shorter (axis 1 of the batch's tensors, {length} to {length - 1}). That failed "
            f"({type(error).__name__}: {error}): model_fn must take samples of any length."
        ) from error
    axes: list[int] = []
    counts: dict[int, str] = {}
    for (what, shape, _), (_, short, _) in zip(whole, cut, strict=True):
        changed = [i for i, (a, b) in enumerate(zip(shape, short, strict=True)) if a != b]
        if len(changed) != 1:
            raise PositionAxisError(
                f"{what}: with samples one position shorter, "
                f"{'several axes' if changed else 'no axis'} of its output got shorter "
                f"({list(shape)}, then {list(short)}): it has no positions of its own. {WAY_OUT}"
            )
        axes.append(changed[0])
        counts.setdefault(shape[changed[0]], what)
    if len(counts) > 1:
        listed = "; ".join(f"{count} at {what}" for count, what in counts.items())
        raise PositionAxisError(
            f"Parameters meet samples at unequal numbers of positions ({listed}): they have no "
            f"common numbering. {WAY_OUT}"
        )
    return axes, next(iter(counts), length)


def _seen(model: TracedModel, batch: PyTree) -> list[tuple[str, tuple[int, ...], int]]:
    """What the outputs of all uses look like for a few samples."""
    mode = _PositionMode(replace(model, batch=batch, n=batch_size(batch)), [])
    with mode, torch.enable_grad():
        model.model_fn(mode.params, batch)
    mode.finish()
    return mode.seen


def _length(batch: PyTree) -> int:
    """The number of positions of the batch: the size of axis 1 of all tensors that have one."""
    sizes = {x.shape[1] for x in tensors_of(batch) if x.ndim > 1}
    if len(sizes) != 1 or min(sizes) < 2:
        raise PositionAxisError(
            "per_position=True takes batches with positions on axis 1 of every tensor that has "
            f"one, the same number (2 or more) in all; found {sorted(sizes) or 'no such axis'}."
        )
    return sizes.pop()
