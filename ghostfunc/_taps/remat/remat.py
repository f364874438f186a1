"""`gf.remat`: activations are computed again in the backward pass instead of being kept.

A region first runs without gradient, watched: which tensors it closes over, and under the taps
which of them it uses. Then its outputs pass through a function whose inputs are all of those, and
whose backward runs the region again and pulls back to them. Under the taps the second run is
watched as the first was, from the same place in the trace, so that its uses are known and read
what they would have read.

Outside transforms and without taps, torch's own checkpoints do the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ghostfunc._base.processes.units import call_again
from ghostfunc._base.refusals import Refusals
from ghostfunc._base.torch_private import (
    function_modes,
    in_forward_mode,
    in_transform,
    with_torch_functions,
    without_torch_functions,
)
from ghostfunc._base.trees import flatten, tensors_of, unflatten
from ghostfunc._rules.registry import register_decomposition
from ghostfunc._taps.mode import TapMode
from ghostfunc._taps.remat.region import Region
from ghostfunc._taps.remat.rerun import attach
from ghostfunc._taps.remat.stand_ins import (
    FreeTensors,
    RngAndAutocast,
    Substitutes,
    hidden_tensor,
    standing_in,
)
from ghostfunc._taps.tap import SinkUse
from ghostfunc._trace.tracked import ReaderKey, differentiable
from ghostfunc._trace.watch import TrackingMode

F = TypeVar("F", bound=Callable[..., Any])


def remat(fn: F) -> F:
    """`fn`, whose activations are not kept for the backward pass but computed again in it.

    For a layer of a deep model: memory then grows with the layers' inputs instead of with all that
    is computed inside them, and the forward pass is computed twice. Numbers do not change: every
    quantity, in every mode, is what it is without it.

    Args:
        fn: any pure function or module: pytrees in, pytree of tensors out. It may close over
            parameters, of modules too, over other tensors, and over what is not a tensor. It may
            draw random numbers (the second run draws the same) and hold further `gf.remat`.

    Returns:
        A function called like `fn`: for `model_fn`, for functions under `torch.func`, and for
        ordinary training with `loss.backward()`. It is `fn` itself, and saves nothing, under
        forward-mode AD, under `torch.no_grad()`, while compiling, and in a ghost-mode call that is
        itself inside a transform (the gradient of scores, `vmap` over directions).

    Raises:
        TransformError: run again, `fn` uses a parameter that it did not use at first.
        InPlaceError: `fn` writes to a tensor that it did not make.
        UntrackedUseError: `fn` uses a tensor that is not among its arguments in a way that torch
            functions do not show (a custom `autograd.Function`).

    Reference:
        Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """

    @functools.wraps(fn)
    def rematerialized(*args: Any, **kwargs: Any) -> Any:
        return _call(fn, args, kwargs)

    return rematerialized  # type: ignore[return-value]


def _call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or in_forward_mode():
        return fn(*args, **kwargs)
    modes = function_modes()
    watching = [m for m in modes if isinstance(m, (TrackingMode, Refusals, FreeTensors))]
    if watching:
        mode = watching[-1]
        if isinstance(mode, TapMode) and not in_transform():
            # Tracked tensors are known by identity: they are not handed in anew.
            region = Region(fn, args, kwargs, held=mode.tracks)
            with without_torch_functions():  # what is done besides is not in the trace
                return _under_taps(mode, region)
        return fn(*args, **kwargs)  # nothing is kept
    region = Region(fn, args, kwargs)
    if in_transform():
        return _in_transform(region)
    return checkpoint(_Runs(region), *region.inputs, use_reentrant=False)


@register_decomposition(call_again)
def _call_unit(
    tensors: Sequence[Tensor],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    keep: bool,
) -> Any:
    """A unit of a sharded module is a region: made whole, it is not kept."""
    return remat(function)(*args, **kwargs)


class _Runs:
    """A region as the function of a checkpoint, called once and then again."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._ran = False

    def __call__(self, *inputs: Tensor) -> Any:
        if self._ran:
            return self._region.again(*inputs)
        self._ran = True
        return self._region.run(*inputs)


# --- inside transforms ------------------------------------------------------------------------


def _first_run(
    region: Region, held: Callable[[Tensor], bool] = lambda x: False
) -> tuple[Any, list[Tensor]]:
    """What the region returns, keeping nothing, and the tensors it closes over."""
    inputs = [standing_in(x).detach() for x in region.inputs]
    finder = FreeTensors(inputs, held)
    with with_torch_functions(), finder:
        out = region.run(*inputs)
    finder.refuse_writes()
    # Of constants, outputs are constants, unless something else goes in.
    if any(x.requires_grad and not held(x) for x in tensors_of(out)):
        raise hidden_tensor()
    return out, finder.found


def _in_transform(region: Region) -> Any:
    surroundings = RngAndAutocast(region.inputs)
    out, found = _first_run(region)
    leaves, spec = flatten(out)
    moving = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and differentiable(x)]
    n = len(region.inputs)

    def again(given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with surroundings.restored(), Substitutes(found, given[n:]):
            leaves = flatten(region.again(*given[:n]))[0]
        return tuple(leaves[i] for i in moving)

    # In the second run of a region around this one, other tensors stand in for those met.
    inputs = [standing_in(x) for x in (*region.inputs, *found)]
    attached = attach([leaves[i] for i in moving], again, inputs)
    for i, x in zip(moving, attached, strict=True):
        leaves[i] = x
    return unflatten(spec, leaves)


# --- under taps -------------------------------------------------------------------------------


class _UnderTaps(torch.autograd.Function):
    """The identity on a region's outputs; its backward runs the region again, taps and all."""

    @staticmethod
    def forward(ctx: Any, again: _Again, n_out: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.again, ctx.n_out = again, n_out
        ctx.save_for_backward(*tensors[n_out:])
        return tuple(x.detach() for x in tensors[:n_out])

    @staticmethod
    def backward(ctx: Any, *b: Tensor) -> tuple[Tensor | None, ...]:
        first = 2 + ctx.n_out
        wanted = ctx.needs_input_grad[first:]
        return (*[None] * first, *ctx.again.pull_back(ctx.saved_tensors, wanted, b))


@dataclass
class _Again:
    """A region under taps as a function of what its losses' derivatives go through.

    Attributes:
        start: the mode as it was when the region began.
        free: activations that the region closes over.
        tracked: parameters, and tensors derived from them, that it met.
        taps, collected: which taps it used.
        moving: which of its outputs are differentiable.
    """

    region: Region
    start: TapMode
    surroundings: RngAndAutocast
    free: list[Tensor]
    tracked: list[Tensor]
    taps: list[ReaderKey]
    collected: list[int]
    moving: list[int]

    def pull_back(
        self, saved: Sequence[Tensor], wanted: Sequence[bool], b: Sequence[Tensor]
    ) -> list[Tensor | None]:
        given = [x.detach().requires_grad_(w) for x, w in zip(saved, wanted, strict=True)]
        with torch.enable_grad():
            outs = self._run(iter(given))
        primals = [x for x in given if x.requires_grad]
        pairs = [(x, y) for x, y in zip(outs, b, strict=True) if x.requires_grad]
        if not pairs:
            return [None] * len(given)
        _refuse_others(outs, primals)
        ys, cotangents = zip(*pairs, strict=True)
        grads = iter(torch.autograd.grad(ys, primals, cotangents, allow_unused=True))
        return [next(grads) if x.requires_grad else None for x in given]

    def _run(self, given: Iterator[Tensor]) -> list[Tensor]:
        inputs = [next(given) for _ in self.region.inputs]
        free = Substitutes(self.free, [next(given) for _ in self.free])
        mode = self.start.fork(
            {id(x): next(given) for x in self.tracked},
            {key: next(given) for key in self.taps},
            {number: next(given) for number in self.collected},
        )
        with self.surroundings.restored(), mode, free:
            leaves = flatten(self.region.again(*inputs))[0]
        for use in mode.uses[len(self.start.uses) :]:
            if isinstance(use, SinkUse):
                use.once = True
        return [leaves[i] for i in self.moving]


def _under_taps(mode: TapMode, region: Region) -> Any:
    start, surroundings = mode.fork(), RngAndAutocast(region.inputs)
    with mode.without_taps():
        out, found = _first_run(region, mode.tracks)
    leaves, spec = flatten(out)
    # What is made of parameters alone is tracked, and connected to them, as it is.
    moving = [
        i
        for i, x in enumerate(leaves)
        if isinstance(x, Tensor) and differentiable(x) and not mode.tracks(x)
    ]
    met = [(x, start.find(x)) for x in found]
    free = [x for x, t in met if t is None and standing_in(x).requires_grad]
    tracked = [(x, t.primal) for x, t in met if t is not None and t.primal is not t.const]
    uses = range(len(start.uses), len(mode.uses))
    taps = mode.tap_keys(mode.uses[number] for number in uses)
    collected = [number for number in uses if number in mode.collect]
    mode.forget(start, leaves)
    again = _Again(
        region, start, surroundings, free, [x for x, _ in tracked], taps, collected, moving
    )
    inputs = [
        *(standing_in(x) for x in (*region.inputs, *free)),
        *(primal for _, primal in tracked),
        *(mode.taps[key] for key in taps),
        *(mode.collect[number] for number in collected),
    ]
    outs = [leaves[i] for i in moving]
    attached = _UnderTaps.apply(again, len(outs), *outs, *inputs)
    for i, x in zip(moving, attached, strict=True):
        leaves[i] = x
    return unflatten(spec, leaves)


def _refuse_others(outs: Sequence[Tensor], primals: Sequence[Tensor]) -> None:
    """Raise if `outs` depend on tensors besides `primals`."""
    own = {id(x) for x in primals}
    todo, known = [x.grad_fn for x in outs], set()
    while todo:
        node = todo.pop()
        if node is None or node in known:
            continue
        known.add(node)
        leaf = node.name() == "torch::autograd::AccumulateGrad"
        if leaf and id(node.variable) not in own:  # type: ignore[attr-defined]
            raise hidden_tensor()
        todo += [parent for parent, _ in node.next_functions]
