"""The mode that watches a model run: the skeleton that tracing and tapping share.

It is active while `model_fn` runs. It sees every torch call, and knows tracked tensors by identity.
`record` and `probe` fill in what a run of tracing does at a tracked tensor, `TapMode` what a run
under taps does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghostfunc._base.dense_gradients import dense, dense_call
from ghostfunc._base.errors import (
    WAYS_OUT,
    InPlaceError,
    TransformError,
    UnsupportedAlwaysError,
    UnsupportedOpError,
    UntrackedUseError,
)
from ghostfunc._base.modes import Mode
from ghostfunc._base.processes.shards import attached, gather, shown
from ghostfunc._base.refusals import REFUSED, op_name
from ghostfunc._base.torch_private import address, depth, in_transform
from ghostfunc._base.trees import flatten, tensors_of, unflatten
from ghostfunc._rules.inplace import write_part_
from ghostfunc._rules.registry import DECOMPOSITIONS, constant
from ghostfunc._trace.tracked import CallArgs, Tracked, derived, differentiable, getter

_TENSOR_GETTERS = {
    getter(name) for name in ("T", "mT", "H", "mH", "data", "real", "imag", "grad")
}  # fmt: skip


_CONVERSIONS: set[Callable[..., Any]] = {
    Tensor.char, Tensor.cpu, Tensor.bfloat16, Tensor.byte, Tensor.double, Tensor.float, Tensor.bool,
    Tensor.half, Tensor.int, Tensor.long,
}  # fmt: skip


ALIKE: set[Callable[..., Any]] = {
    Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty, Tensor.new_tensor,
    torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like,
    torch.rand_like, torch.randn_like, torch.randint_like,
}  # fmt: skip
"""Ops that make a tensor like their first one, of other values."""


CONSTANTS: set[Callable[..., Any]] = ALIKE | {
    Tensor.detach, torch.detach, getter("data"), constant,
}  # fmt: skip
"""Ops whose result autograd holds constant."""


_IN_PLACE_OPERATORS = {
    "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__ipow__", "__imod__",
    "__iand__", "__ior__", "__ixor__", "__setitem__", "__set__",
}  # fmt: skip


_REQUIRES_GRAD = getter("requires_grad")
_DETACHES: set[Callable[..., Any]] = {Tensor.detach_, torch.detach_}


_NESTED: set[Callable[..., Any]] = {
    torch.autograd.grad, torch.autograd.backward, Tensor.backward,
}  # fmt: skip


def op_key(func: Callable[..., Any]) -> Callable[..., Any]:
    """What a call goes by in a trace: the compiler's tensors convert by `to` alone."""
    return Tensor.to if func in _CONVERSIONS else func


def nests(func: Callable[..., Any]) -> bool:
    """Whether a call takes gradients itself."""
    return func in _NESTED


def reads_attribute(func: Callable[..., Any]) -> bool:
    """Whether a call reads a shape, a device and the like. No way through a model is known by
    these: of tensors without values some are not seen."""
    return func.__name__ == "__get__" and func not in _TENSOR_GETTERS


SIZED_BY_VALUES: set[Callable[..., Any]] = {
    torch.bincount, Tensor.bincount, torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere,
    torch.unique, Tensor.unique, torch.unique_consecutive, Tensor.unique_consecutive,
    torch.masked_select, Tensor.masked_select, torch.repeat_interleave, Tensor.repeat_interleave,
}  # fmt: skip
"""Ops whose output's shape depends on values."""


TELLING = frozenset((0.0, 1.0))
"""Of floats, those that make another program of the same calls."""


def plain_arguments(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """The arguments of a call besides tensors, as far as they may differ for other samples. These
    are whole numbers, words, dtypes, and slices and arrays of them. Of other numbers, whether they
    are zero or one: dropout draws nothing then, and what a zero multiplies does not show."""
    return tuple(map(_plain, args)), tuple(map(_plain, kwargs.values()))


def _plain(x: Any) -> Hashable:
    kind = type(x)
    if kind is int or kind is str or kind is bool:
        return kind is bool, x
    if kind is tuple or kind is list or kind is torch.Size:
        inner = tuple(map(_plain, x))
        return inner if any(i is not None for i in inner) else None  # any number of tensors
    if kind is slice:
        return _plain(x.start), _plain(x.stop), _plain(x.step)
    if isinstance(x, Tensor):
        return None
    if isinstance(x, np.ndarray):
        return x.shape, x.dtype.str, x.tobytes()
    if isinstance(x, (int, np.integer)):
        return False, operator.index(x)
    if isinstance(x, (float, np.floating)):
        return float(x) if x in TELLING else "float"
    if isinstance(x, (tuple, list)):
        return kind.__name__, tuple(map(_plain, x))
    return str(x) if isinstance(x, (str, torch.dtype)) else kind.__name__


def gradients(
    losses: Tensor, inputs: Sequence[Tensor], cotangent: Tensor, *, again: bool = False
) -> list[Tensor | None]:
    """Plain autograd's cotangents of `inputs`; None where no path leads to them. The graph is kept
    if it is needed `again`."""
    if not losses.requires_grad:
        return [None] * len(inputs)
    try:
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            losses, inputs, cotangent, allow_unused=True, retain_graph=again
        )
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        raise UnsupportedAlwaysError(
            f"The losses depend on parameters through an op that has no gradient: {error}."
        ) from error
    return [None if g is None else dense(g) for g in found]


def decomposed(
    mode: Mode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The result of the elementary ops that make up a composite one, each seen by `mode`;
    `NotImplemented` if the call is elementary."""
    if func not in DECOMPOSITIONS:
        return NotImplemented
    with mode:
        return DECOMPOSITIONS[func](*args, **kwargs)


class TrackingMode(Mode):
    """Sees every torch call and hands those with tracked tensors to `on_tracked`."""

    def __init__(self, leaves: Sequence[Tracked]) -> None:
        super().__init__()
        # By identity, which lasts as long as the object is held here.
        self._tracked: dict[int, tuple[Any, Tracked]] = {}
        self._n_tracked = 0
        self._stale: dict[int, Tensor] = {}
        self._detached: list[Tensor] = []
        self._depth = depth()
        for leaf in leaves:
            self.track(leaf.shown, leaf)

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in DECOMPOSITIONS:  # whoever calls it: all runs see the same ops
            out = decomposed(self, func, args, kwargs)
            if out is not NotImplemented:
                return out
        return self.elementary(func, args, kwargs)

    def elementary(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One call, seen as it is."""
        args, kwargs = dense_call(func, args, kwargs)
        if func in REFUSED:
            REFUSED[func](*args, **kwargs)
        if func in _NESTED:
            refuse_nested(func, args, kwargs)
        if not self._touched(args, kwargs):
            return func(*args, **kwargs)
        if func is _REQUIRES_GRAD:
            return True
        if func in _DETACHES:
            return self._detach_(func, args[0])
        call = self._flatten(args, kwargs)
        self._check_place(func, call, kwargs)
        if self._stale:
            self._check_fresh(func, call)
        if writes(func, kwargs) and call.hits[:1] == [0]:
            target = call.tracked[0]
            if target.leaf is not None or not torch.is_grad_enabled():
                raise InPlaceError(
                    f"model_fn writes to parameter {target.name!r} in place ({op_name(func)}). A "
                    "pure function leaves its parameters as they are: use the out-of-place op."
                )
        return self.on_tracked(func, call)

    def on_tracked(self, func: Callable[..., Any], call: CallArgs) -> Any:
        raise NotImplementedError

    def _detach_(self, func: Callable[..., Any], x: Tensor) -> Tensor:
        """Have a derived tensor be a constant from now on."""
        _, tracked = self._tracked.pop(id(x))
        if tracked.leaf is not None:
            raise InPlaceError(
                f"model_fn detaches parameter {tracked.name!r} in place ({op_name(func)}). Its "
                "caller has it, too: use detach()."
            )
        self._detached.append(x)  # as long as it is held, nothing else has its identity
        func(x)
        return x

    def track(self, x: Tensor, tracked: Tracked) -> None:
        """Take `x`, wherever the program uses it, for `tracked`."""
        tracked.number, self._n_tracked = self._n_tracked, self._n_tracked + 1
        self._tracked[id(x)] = (x, tracked)

    def _check_place(
        self, func: Callable[..., Any], call: CallArgs, kwargs: dict[str, Any]
    ) -> None:
        """Raise for calls that taps cannot stand beside."""
        if kwargs.get("out") is not None:
            raise UnsupportedOpError(
                f"{op_name(func)} on parameter {call.tracked[0].name!r} with out=: autograd has no "
                "gradient for it. Drop out= and use what the op returns."
            )
        if depth() != self._depth and tensors_of(call.run(func, call.consts())):
            raise UntrackedUseError(
                f"model_fn uses parameter {call.tracked[0].name!r} inside a transform of its own "
                f"({op_name(func)} inside torch.func.grad, jvp, vmap or the like): what becomes of "
                f"it there is not seen. {WAYS_OUT}"
            )

    # --- writes to derived tensors ---

    def _outdate(self, x: Tensor, tracked: Tracked) -> None:
        """Other tensors with the memory of `x`, which is written to, are not what they were."""
        memory = address(tracked.shown)
        for other, its in self._tracked.values():
            if other is not x and its is not tracked and address(its.shown) == memory:
                self._stale[id(other)] = x

    def _check_fresh(self, func: Callable[..., Any], call: CallArgs) -> None:
        """Raise for what reads a tensor after another with the same memory was written to.

        `v[i] += 1` is no such thing: `v[i]` is written to, and then to its place in `v`.
        """
        for i, tracked in zip(call.hits, call.tracked, strict=True):
            written = self._stale.get(id(call.leaves[i]))
            if written is None or func is constant:
                continue
            if func is write_part_ and i == 0:
                x, index, value = call.rebuild(call.leaves)[0]
                if value is written and _same_place(tracked.shown[index], self.find(value)):
                    del self._stale[id(x)]
                    continue
            raise InPlaceError(
                f"model_fn writes to a tensor made from parameters, and then reads a view of it "
                f"({tracked.name}, in {op_name(func)}), or the other way round. Write to the whole "
                "tensor (v[i] = ...), or use out-of-place ops."
            )

    def tracks(self, x: object) -> bool:
        """Whether `x` is tracked."""
        return id(x) in self._tracked

    def find(self, x: object) -> Tracked | None:
        """What is known of `x`, if it is tracked."""
        found = self._tracked.get(id(x))
        return None if found is None else found[1]

    def _touched(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return self._touches(args) or (bool(kwargs) and self._touches(kwargs.values()))

    def _touches(self, values: Any) -> bool:
        for x in values:
            if id(x) in self._tracked or (isinstance(x, (list, tuple)) and self._touches(x)):
                return True
        return False

    def _flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallArgs:
        leaves, treedef = flatten((args, kwargs))
        hits = [i for i, x in enumerate(leaves) if self.find(x) is not None]
        return CallArgs(leaves, treedef, hits, [self._tracked[id(leaves[i])][1] for i in hits])

    def derive(self, func: Callable[..., Any], call: CallArgs, *, pushes: bool = True) -> Any:
        """Run an op on tracked tensors alone; its results are tracked in their turn.

        What an in-place op writes to, it writes to a copy, which stands for the original from then
        on.
        """
        if func is gather and not call.leaves[1].whole:
            return self._gather(call)
        in_place = writes(func, call.kwargs())
        pure = _on_a_copy(func) if in_place else func
        target = call.leaves[0]
        if in_place and call.hits[0] != 0 and not in_transform():
            # What else has the target's memory is connected to the parameters from now on, unseen.
            call.leaves[0] = target.clone()
            args, kwargs = call.replaced([t.shown for t in call.tracked])
            func(target, *args[1:], **kwargs)
        outs, spec = flatten(call.run(pure, [t.shown for t in call.tracked]))
        if all(t.shown is t.primal for t in call.tracked):
            primals = outs
            wanted = any(t.wants_grad for t in call.tracked)
            consts = flatten(call.run(pure, call.consts()))[0] if wanted else outs
        else:
            # An enclosing transform may differentiate what is made of constants.
            nested = in_transform()
            consts = [x.detach() if isinstance(x, Tensor) else x for x in outs]
            consts = flatten(call.run(pure, call.consts()))[0] if nested else consts
            wanted = any(t.wants_grad for t in call.tracked)
            primals = (
                flatten(call.run(pure, [t.primal for t in call.tracked]))[0] if wanted else consts
            )
        if in_place:
            if call.hits[0] == 0:
                self._outdate(target, call.tracked[0])
            values = outs[0], primals[0], consts[0]
            made = derived(func, pure, call, values, None, pushes=pushes)
            self.track(outs[0], made)
            self.track(target, made)
            return target
        known = {id(t.shown) for t in call.tracked}
        for i, values in enumerate(zip(outs, primals, consts, strict=True)):
            if id(values[0]) not in known and differentiable(values[0]):
                index = i if len(outs) > 1 else None
                made = derived(func, func, call, values, index, pushes=pushes)
                self.track(values[0], made)
        return unflatten(spec, outs)

    def _gather(self, call: CallArgs) -> Tensor:
        """Make a piece whole once: the same values serve as the constant, the primal and what the
        program gets."""
        (piece,), shards = call.tracked, call.leaves[1]
        whole = shards.all_gather(piece.const)
        primal = whole
        if piece.primal is not piece.const:
            primal = attached(piece.primal, whole, shards)
        out = shown(piece.shown, whole)
        self.track(out, derived(gather, gather, call, (out, primal, whole), None))
        return out


def refuse_nested(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise for gradients taken inside the model, unless they are constants."""
    create_graph = kwargs.get("create_graph", args[4] if len(args) > 4 else False)
    if func is not torch.autograd.grad or create_graph:
        raise TransformError(
            f"model_fn takes gradients itself ({op_name(func)}), and its losses may depend on "
            "parameters through them: ghost mode does not see that. Use "
            'mode="materialized", with vectorize=False for torch.autograd.grad, or mode="jvp" with '
            "torch.func.grad; gradients that are constants need no create_graph."
        )


def writes(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether an op writes to its first argument."""
    name = func.__name__
    return (
        name in _IN_PLACE_OPERATORS
        or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
        or kwargs.get("inplace") is True
    )


def _same_place(a: Tensor, b: Tracked | None) -> bool:
    """Whether `a` is where the tensor that `b` was made by writing to is."""
    assert b is not None
    shape = (b.shown.shape, b.sources[0].shown.storage_offset(), b.sources[0].shown.stride())
    return (a.shape, a.storage_offset(), a.stride()) == shape


def _on_a_copy(func: Callable[..., Any]) -> Callable[..., Any]:
    """An in-place op as a pure function."""

    def pure(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        x = x.clone()
        func(x, *args, **kwargs)
        return x

    return pure
