"""`gf.remat`: activations are computed again in the backward pass instead of being kept.

Where the taps are, autograd runs by itself, and torch's own checkpoints do the work: they run the
region again as soon as the backward pass asks for a tensor it saved. All that has to be seen to is
that the second run is watched as the first was, from the same place in the trace.

Inside transforms checkpoints cannot run. There the region's outputs pass through a function whose
backward runs the region again under `torch.func.vjp`, with everything it was seen to use as an
input: arguments, parameters, and what else it closes over.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states
from torch.utils.weak import WeakIdKeyDictionary

from ghostfunc._errors import UntrackedUseError
from ghostfunc._purity import Refusals
from ghostfunc._regions import Region
from ghostfunc._taps import TapMode
from ghostfunc._tracking import TrackingMode, differentiable, in_transform
from ghostfunc._tree import flatten, tensors_of, unflatten

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
        A function called like `fn`. In `model_fn`, in functions under `torch.func`, and in ordinary
        training with `loss.backward()`. Under forward-mode AD, under `torch.no_grad()` and while
        compiling it is `fn` itself: nothing is kept there, or the compiler decides.

    Raises:
        TransformError: run again, `fn` uses another parameter than at first.
        UntrackedUseError: under `torch.func`, `fn` uses a tensor that is not among its arguments in
            a way that torch functions do not show (a custom `autograd.Function`, `torch.vmap`).

    Reference:
        Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """

    @functools.wraps(fn)
    def rematerialized(*args: Any, **kwargs: Any) -> Any:
        return _call(fn, args, kwargs)

    return rematerialized  # type: ignore[return-value]


def _call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _forward_mode():
        return fn(*args, **kwargs)
    modes = _get_current_function_mode_stack()
    watching = [m for m in modes if isinstance(m, (TrackingMode, Refusals))]
    if watching:
        mode = watching[-1]
        if isinstance(mode, TapMode) and not in_transform():
            return _under_taps(mode, fn, args, kwargs)
        return fn(*args, **kwargs)  # tracing keeps nothing
    region = Region(fn, args, kwargs)
    if in_transform():
        return _in_transform(region)
    return checkpoint(_Runs(region), *region.inputs, use_reentrant=False)


def _forward_mode() -> bool:
    """Whether tangents are computed around us: forward mode keeps no activations."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


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


# --- under taps -------------------------------------------------------------------------------


def _under_taps(
    mode: TapMode, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    # Tracked tensors are known by identity: they do not go through a checkpoint's hands.
    region = Region(fn, args, kwargs, held=mode.tracks)
    start = mode.fork()
    with torch._C.DisableTorchFunction():  # what a checkpoint does itself is not in the trace
        return checkpoint(
            _Runs(region),
            *region.inputs,
            use_reentrant=False,
            context_fn=lambda: (torch._C._EnableTorchFunction(), _Replay(start)),
        )


class _Replay:
    """Every run again starts where the first started."""

    def __init__(self, start: TapMode) -> None:
        self._start = start
        self._running: list[TapMode] = []

    def __enter__(self) -> None:
        self._running.append(self._start.fork())
        self._running[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._running.pop().__exit__(*error)


# --- inside transforms ------------------------------------------------------------------------


class _Rerun(torch.autograd.Function):
    """The identity on a region's outputs; its backward runs the region again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(again: _Again, n_out: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in tensors[:n_out])  # the tensors themselves would be views

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        again, n_out, *tensors = inputs
        ctx.again, ctx.n_out = again, n_out
        ctx.save_for_backward(*tensors[n_out:])

    @staticmethod
    def backward(ctx: Any, *b: Tensor) -> tuple[Tensor | None, ...]:
        first = 2 + ctx.n_out
        grads = ctx.again.pull_back(ctx.saved_tensors, ctx.needs_input_grad[first:], b)
        return (*[None] * first, *grads)


def _in_transform(region: Region) -> Any:
    states = _RandomStates(region.inputs)
    finder = _Finder(region.inputs)
    with torch.no_grad(), finder:
        out = region.run(*region.inputs)
    leaves, spec = flatten(out)
    moving = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and differentiable(x)]
    again = _Again(region, finder.found, moving, states)
    # Inside the second run of a region around this one, the tensors met stand for others.
    closed_over = [x.view_as(x) for x in finder.found]
    outs = [leaves[i] for i in moving]
    wrapped = _Rerun.apply(again, len(outs), *outs, *region.inputs, *closed_over)
    for i, x in zip(moving, wrapped, strict=True):
        leaves[i] = x
    return unflatten(spec, leaves)


class _Again:
    """A region as a function of all that it depends on."""

    def __init__(
        self, region: Region, closed_over: list[Tensor], moving: list[int], states: _RandomStates
    ) -> None:
        self._region = region
        self._closed_over = closed_over
        self._moving = moving
        self._states = states

    def pull_back(
        self, inputs: Sequence[Tensor], wanted: Sequence[bool], b: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The cotangents of those inputs that are wanted, given those of the outputs."""
        places = [i for i, x in enumerate(wanted) if x]
        further = torch.is_grad_enabled()  # somebody wants a derivative of this one
        if further:
            self._check_complete(self._run([x.detach() for x in inputs]))
        else:
            inputs = [x.detach() for x in inputs]

        def of_wanted(*primals: Tensor) -> tuple[Tensor, ...]:
            given = list(inputs)
            for i, x in zip(places, primals, strict=True):
                given[i] = x
            return self._run(given)

        with torch.enable_grad():
            outs, pullback = torch.func.vjp(of_wanted, *(inputs[i] for i in places))[:2]
        if not further:
            self._check_complete(outs)
        cotangents = pullback(tuple(b), retain_graph=further, create_graph=further)
        grads: list[Tensor | None] = [None] * len(inputs)
        for i, g in zip(places, cotangents, strict=True):
            grads[i] = g
        return grads

    def _run(self, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        n = len(self._region.inputs)
        stand_ins = {id(x): y for x, y in zip(self._closed_over, given[n:], strict=True)}
        with self._states.restored(), _Substitute(stand_ins):
            leaves = flatten(self._region.again(*given[:n]))[0]
        return tuple(leaves[i] for i in self._moving)

    def _check_complete(self, outs: Sequence[Tensor]) -> None:
        """Of constant inputs, the outputs are constants, unless something else goes in."""
        if any(x.requires_grad for x in outs):
            raise UntrackedUseError(
                "gf.remat: the function depends on a tensor that is not among its arguments, in a "
                "way torch functions do not show (a custom autograd.Function, torch.vmap). Under "
                "torch.func its gradient would be lost: make that tensor an argument."
            )


class _RandomStates:
    """The states of the random generators when this was made."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices, self._states = get_device_states(*inputs)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._cpu)
            set_device_states(self._devices, self._states)
            yield


class _Finder(TorchFunctionMode):
    """Finds the tensors that torch calls are given and that were not made by other calls."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.found: list[Tensor] = []
        self._known = WeakIdKeyDictionary()
        self._know(given)

    def _know(self, tensors: Sequence[Tensor]) -> None:
        for x in tensors:
            self._known[x] = True

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        new = [x for x in tensors_of((args, kwargs)) if x not in self._known]
        self.found += {id(x): x for x in new}.values()
        self._know(new)
        out = func(*args, **kwargs)
        self._know(tensors_of(out))
        return out


class _Substitute(TorchFunctionMode):
    """Gives torch calls other tensors in place of some, known by identity."""

    def __init__(self, stand_ins: dict[int, Tensor]) -> None:
        super().__init__()
        self._stand_ins = stand_ins

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        leaves, treedef = flatten((args, kwargs or {}))
        args, kwargs = unflatten(treedef, [self._stand_ins.get(id(x), x) for x in leaves])
        return func(*args, **kwargs)
