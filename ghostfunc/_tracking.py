"""Tracked tensors: parameters, and what is derived from them before any sample is met.

A `TorchFunctionMode`, active while `model_fn` runs, sees every torch call and knows tracked
tensors by identity. This file holds what tracing and tapping share: the mode's skeleton, the
bookkeeping of derived tensors, and the pull-back of factors from derived tensors to parameters.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import optree
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ghostfunc._errors import (
    WAYS_OUT,
    InPlaceError,
    TransformError,
    UnsupportedOpError,
    UntrackedUseError,
)
from ghostfunc._factors import Dense, Factor, OneHot, materialize, transpose
from ghostfunc._functorch import address, depth, in_transform
from ghostfunc._layout import Layout, stack_all
from ghostfunc._quantities import DeriveFn, Push, Reader, Turn
from ghostfunc._rules import DECOMPOSITIONS, REFUSED
from ghostfunc._rules._registry import constant, op_name
from ghostfunc._rules.inplace import write_part_
from ghostfunc._several import RunningTotal
from ghostfunc._tree import ParamSpec, flatten, tensors_of, unflatten

Derivation: TypeAlias = Literal["general", "transpose", "cast"]
ReaderKey: TypeAlias = tuple[int, int]
"""(quantity, parameter): which tap a reader belongs to."""


def _getter(name: str) -> Callable[..., Any]:
    """The function that reading a tensor's attribute calls."""
    getter: Callable[..., Any] = getattr(Tensor, name).__get__
    return getter


_TRANSPOSES: set[Callable[..., Any]] = {
    torch.t, torch.transpose, torch.swapaxes, Tensor.t, Tensor.transpose, Tensor.swapaxes,
    _getter("T"), _getter("mT"), torch.adjoint, Tensor.adjoint,
}  # fmt: skip
_CASTS = {
    Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type,
    Tensor.type_as, Tensor.contiguous, Tensor.clone, torch.clone, Tensor.cpu, Tensor.cuda,
}  # fmt: skip
_LINEAR: set[Callable[..., Any]] = _TRANSPOSES | {
    F.embedding, Tensor.view, Tensor.reshape, torch.reshape, Tensor.permute, torch.permute,
    Tensor.expand, Tensor.unsqueeze, torch.unsqueeze, Tensor.squeeze, torch.squeeze,
    Tensor.flatten, torch.flatten, Tensor.chunk, torch.chunk, Tensor.split, torch.split,
}  # fmt: skip
"""Ops that are linear in their first tensor, so that they are their own derivative."""
_TENSOR_GETTERS = {
    _getter(name) for name in ("T", "mT", "H", "mH", "data", "real", "imag", "grad")
}  # fmt: skip
_CONVERSIONS: set[Callable[..., Any]] = {
    Tensor.char, Tensor.cpu, Tensor.bfloat16, Tensor.byte, Tensor.double, Tensor.float, Tensor.bool,
    Tensor.half, Tensor.int, Tensor.long,
}  # fmt: skip
_EMBEDDING = inspect.signature(F.embedding)
CONSTANTS: set[Callable[..., Any]] = {
    Tensor.detach, torch.detach, _getter("data"), constant,
    Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty, Tensor.new_tensor,
    torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like,
    torch.rand_like, torch.randn_like, torch.randint_like,
}  # fmt: skip
"""Ops whose result autograd holds constant."""
_IN_PLACE_OPERATORS = {
    "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__ipow__", "__imod__",
    "__iand__", "__ior__", "__ixor__", "__setitem__", "__set__",
}  # fmt: skip


_REQUIRES_GRAD = _getter("requires_grad")

_NESTED: set[Callable[..., Any]] = {
    torch.autograd.grad, torch.autograd.backward, Tensor.backward,
}  # fmt: skip

FORWARD_MODE = threading.RLock()
"""The levels of torch's forward-mode AD are shared by all threads of a process."""


def traced_as(func: Callable[..., Any]) -> Callable[..., Any]:
    """What a call goes by in a trace: the compiler's tensors convert by `to` alone."""
    return Tensor.to if func in _CONVERSIONS else func


def reads_attribute(func: Callable[..., Any]) -> bool:
    """Whether a call reads a shape, a device and the like. No way through a model is known by
    these: of tensors without values some are not seen."""
    return func.__name__ == "__get__" and func not in _TENSOR_GETTERS


def gradients(
    losses: Tensor, inputs: Sequence[Tensor], cotangent: Tensor, *, again: bool = False
) -> list[Tensor | None]:
    """Plain autograd's cotangents of `inputs`; None where no path leads to them. The graph is kept
    if it is needed `again`."""
    if not losses.requires_grad:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(losses, inputs, cotangent, allow_unused=True, retain_graph=again)
    )


@dataclass(eq=False)
class Tracked:
    """A parameter, or a tensor derived from parameters alone.

    Attributes:
        name: the parameter's name, or an expression of them: what errors call it.
        const: its value, constant at the level of the transform that is running.
        grad: the same value, connected to the transform's primals: its cotangent is the
            training gradient. The same object as `const` where none is wanted.
        shown: the same value, as the program gets it. Outside transforms it is a leaf of autograd's
            graph of its own, which no gradient may reach: all that are seen go another way.
        number: the order in which tracked tensors come up, the parameters first.
        readers: per tap, the reader of this tensor's factors, and whether factors have to be
            pulled back to the parameter first.
        running: where the training gradient is added up, for parameters outside transforms; the
            cotangent of `grad` is then only what comes from derived tensors.
        leaf: index of the parameter, for parameters.
        sources, derivation, fn: for derived tensors, what of and how.
        looked_up: finds, for rows of a table, their numbers and which of them autograd does not
            hold constant, `[rows]` each; None for what is no such thing.
    """

    name: str
    const: Tensor
    grad: Tensor
    shown: Tensor
    number: int = 0
    readers: dict[ReaderKey, tuple[Reader, bool]] = field(default_factory=dict)
    running: RunningTotal | None = None
    leaf: int | None = None
    sources: tuple[Tracked, ...] = ()
    derivation: Derivation = "general"
    fn: Callable[..., Tensor] | None = None
    looked_up: Callable[[], tuple[Tensor, Tensor] | None] = lambda: None

    @property
    def wants_grad(self) -> bool:
        """Whether the training gradient is to be read here."""
        return self.grad is not self.const

    def leaf_names(self) -> set[str]:
        """What those parameters are called."""
        if self.leaf is not None:
            return {self.name}
        return {name for source in self.sources for name in source.leaf_names()}

    def leaves(self) -> set[int]:
        """The parameters this tensor derives from."""
        if self.leaf is not None:
            return {self.leaf}
        return set().union(*(s.leaves() for s in self.sources))

    def at_leaves(self, factor: Factor) -> list[tuple[int, Factor]]:
        """The parameters' factors, given this tensor's: `J^T g_i`, parameter by parameter."""
        if self.leaf is not None:
            return [(self.leaf, factor)]
        first = self.sources[0]
        if self.derivation == "cast":
            return first.at_leaves(factor)
        if self.derivation == "transpose":
            return first.at_leaves(transpose(factor))
        assert self.fn is not None
        g = materialize(factor)
        g = shaped(g, self.const, len(g))
        rows = self.looked_up()
        if rows is not None:
            ids, counted = rows
            b = torch.where(counted[:, None], real(g).reshape(len(g), ids.shape[0], -1), 0)
            return first.at_leaves(OneHot(ids.expand(len(g), -1), b, len(first.const)))
        pullback = torch.func.vjp(self.fn, *(s.const for s in self.sources))[1]
        pulled = torch.vmap(pullback)(g)
        return [
            pair
            for source, g_source in zip(self.sources, pulled, strict=True)
            for pair in source.at_leaves(Dense(real(g_source)))
        ]

    def turns(self, factor: Factor, maps: tuple[DeriveFn, ...] = ()) -> list[tuple[int, Turn]]:
        """`at_leaves`, one sample at a time, when it is its turn."""
        if self.leaf is not None:
            return [(self.leaf, Turn(factor, maps))]
        return [
            pair
            for position, source in enumerate(self.sources)
            for pair in source.turns(factor, (*maps, partial(self._pull, position)))
        ]

    def _pull(self, position: int, g: Tensor) -> Tensor:
        """One sample's gradient of one source, given that of this tensor."""
        assert self.fn is not None
        pullback = torch.func.vjp(self.fn, *(s.const for s in self.sources))[1]
        return real(pullback(shaped(g[None], self.const, 1)[0])[position])


def constants(leaves: Sequence[Tensor], spec: ParamSpec) -> list[Tracked]:
    """Every parameter as a constant; a new object each, whatever is tied outside."""
    values = [x.view_as(x) for x in leaves]
    return [
        Tracked(name, const=x, grad=x, shown=x, leaf=i)
        for i, (name, x) in enumerate(zip(spec.names, values, strict=True))
    ]


@dataclass
class CallArgs:
    """A call's arguments, flattened, and which of them are tracked."""

    leaves: list[Any]
    treedef: optree.PyTreeSpec
    hits: list[int]
    tracked: list[Tracked]

    def rebuild(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = unflatten(self.treedef, leaves)
        return args, kwargs

    def replaced(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with `values` in place of the tracked tensors."""
        leaves = list(self.leaves)
        for i, value in zip(self.hits, values, strict=True):
            leaves[i] = value
        return self.rebuild(leaves)

    def run(self, func: Callable[..., Any], values: Sequence[Any]) -> Any:
        args, kwargs = self.replaced(values)
        return func(*args, **kwargs)

    def consts(self) -> list[Tensor]:
        return [t.const for t in self.tracked]

    def stacked(self, layouts: Mapping[int, Layout], n: int) -> list[Any]:
        """The arguments as op rules get them: every tensor as `[n, *shape]`."""
        leaves = list(self.leaves)
        for i, tracked in zip(self.hits, self.tracked, strict=True):
            leaves[i] = tracked.const
        return stack_all(leaves, layouts, n)

    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments."""
        return self.rebuild(self.leaves)[1]

    def numbers(self) -> tuple[int, ...]:
        return tuple(t.number for t in self.tracked)


def decomposed(
    mode: TorchFunctionMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The result of the elementary ops that make up a composite one, each seen by `mode`;
    `NotImplemented` if the call is elementary."""
    if func not in DECOMPOSITIONS:
        return NotImplemented
    with mode:
        return DECOMPOSITIONS[func](*args, **kwargs)


class TrackingMode(TorchFunctionMode):
    """Sees every torch call and hands those with tracked tensors to `on_tracked`."""

    def __init__(self, leaves: Sequence[Tracked]) -> None:
        super().__init__()
        # By identity, which lasts as long as the object is held here.
        self._tracked: dict[int, tuple[Any, Tracked]] = {}
        self._n_tracked = 0
        self._stale: dict[int, Tensor] = {}
        self._depth = depth()
        for leaf in leaves:
            self.track(leaf.shown, leaf)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in DECOMPOSITIONS:  # whoever calls it: all runs see the same ops
            out = decomposed(self, func, args, kwargs)
            if out is not NotImplemented:
                return out
        return self.elementary(func, args, kwargs)

    def elementary(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One call, seen as it is."""
        if func in REFUSED:
            REFUSED[func](*args, **kwargs)
        if func in _NESTED:
            refuse_nested(func, args, kwargs)
        if not self._touched(args, kwargs):
            return func(*args, **kwargs)
        if func is _REQUIRES_GRAD:
            return True
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

    def derive(self, func: Callable[..., Any], call: CallArgs) -> Any:
        """Run an op on tracked tensors alone; its results are tracked in their turn.

        What an in-place op writes to, it writes to a copy, which stands for the original from then
        on.
        """
        in_place = writes(func, call.kwargs())
        pure = _on_a_copy(func) if in_place else func
        target = call.leaves[0]
        if in_place and call.hits[0] != 0 and not in_transform():
            # What else has the target's memory is connected to the parameters from now on, unseen.
            call.leaves[0] = target.clone()
            args, kwargs = call.replaced([t.shown for t in call.tracked])
            func(target, *args[1:], **kwargs)
        outs, spec = flatten(call.run(pure, [t.shown for t in call.tracked]))
        if all(t.shown is t.grad for t in call.tracked):
            grads = outs
            connected = any(t.wants_grad for t in call.tracked)
            consts = flatten(call.run(pure, call.consts()))[0] if connected else outs
        else:
            consts = [x.detach() if isinstance(x, Tensor) else x for x in outs]
            connected = any(t.wants_grad for t in call.tracked)
            grads = (
                flatten(call.run(pure, [t.grad for t in call.tracked]))[0] if connected else consts
            )
        if in_place:
            if call.hits[0] == 0:
                self._outdate(target, call.tracked[0])
            derived = _derived(func, pure, call, (outs[0], grads[0], consts[0]), None)
            self.track(outs[0], derived)
            self.track(target, derived)
            return target
        known = {id(t.shown) for t in call.tracked}
        for i, values in enumerate(zip(outs, grads, consts, strict=True)):
            if id(values[0]) not in known and differentiable(values[0]):
                index = i if len(outs) > 1 else None
                self.track(values[0], _derived(func, func, call, values, index))
        return unflatten(spec, outs)


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


def real(x: Tensor) -> Tensor:
    """`x` in real numbers: inner products of gradients and directions are real ones."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def shaped(x: Tensor, like: Tensor, *leading: int) -> Tensor:
    """The inverse of `real`, in the shape and dtype of `like` after some leading axes."""
    if like.is_complex():
        x = torch.view_as_complex(x.reshape((*leading, *like.shape, 2)).contiguous())
    return x.reshape((*leading, *like.shape)).to(like.dtype)


def differentiable(x: Tensor) -> bool:
    """Whether a gradient can flow through `x`."""
    return x.is_floating_point() or x.is_complex()


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


def _derived(
    func: Callable[..., Any],
    pure: Callable[..., Any],
    call: CallArgs,
    values: tuple[Tensor, Tensor, Tensor],
    index: int | None,
) -> Tracked:
    shown, grad, const = values

    def fn(*sources: Tensor) -> Tensor:
        out = call.run(pure, sources)
        return out if index is None else flatten(out)[0][index]

    derivation = _derivation(func, call, const)
    names = ", ".join(t.name for t in call.tracked)
    tracked = Tracked(
        name=f"{op_name(func).rsplit('.', 1)[-1]}({names})",
        const=const,
        grad=grad,
        shown=shown,
        sources=tuple(call.tracked),
        derivation=derivation,
        fn=fn,
        looked_up=partial(_looked_up, func, call),
    )
    for position, source in enumerate(call.tracked):
        for key, (reader, pulled) in source.readers.items():
            pushed = None if pulled else reader.push(_push(func, fn, call, position, derivation))
            added = (reader, True) if pushed is None else (pushed, False)
            if key in tracked.readers and not added[1]:
                # Two sources of one parameter: directions add up, J u = J_1 u_1 + J_2 u_2.
                added = (tracked.readers[key][0].plus(pushed), False)
            tracked.readers[key] = added
    return tracked


def _derivation(func: Callable[..., Any], call: CallArgs, out: Tensor) -> Derivation:
    if len(call.tracked) == 1:
        source = call.tracked[0].const
        if func in _TRANSPOSES and source.ndim == 2:
            return "transpose"
        if func in _CASTS and source.shape == out.shape:
            return "cast"
    return "general"


def _push(
    func: Callable[..., Any],
    fn: Callable[..., Tensor],
    call: CallArgs,
    position: int,
    derivation: Derivation,
) -> Push:
    consts = call.consts()
    if func in _LINEAR and len(consts) == 1 and (func is not F.embedding or not _padded(call)):
        return Push(lambda tangent: real(fn(shaped(tangent, consts[0]))), derivation)

    def jvp(tangent: Tensor) -> Tensor:
        def of_one(x: Tensor) -> Tensor:
            return fn(*consts[:position], x, *consts[position + 1 :])

        # J u is the derivative of the linear map v -> J^T v along u. Forward mode would say the
        # same, but torch's levels of it are shared by all threads, and it has not all ops.
        primal = consts[position]
        along = shaped(tangent, primal)
        if not in_transform():
            return real(_twice(of_one, primal.detach().requires_grad_(), along))
        y, pullback = torch.func.vjp(of_one, primal)[:2]
        twice = torch.func.vjp(lambda v: pullback(v)[0], torch.zeros_like(y))[1]
        return real(twice(along)[0])

    return Push(jvp, derivation)


def _padded(call: CallArgs) -> bool:
    """Whether autograd holds a row of an embedding constant."""
    return _bound(call)["padding_idx"] is not None


def _looked_up(func: Callable[..., Any], call: CallArgs) -> tuple[Tensor, Tensor] | None:
    """The rows of a real matrix that an embedding takes."""
    if func is not F.embedding or len(call.tracked) != 1:
        return None
    weight, arguments = call.tracked[0].const, _bound(call)
    if weight.is_complex() or arguments["weight"] is not call.leaves[call.hits[0]]:
        return None
    ids = arguments["input"].flatten().long()
    padding = arguments["padding_idx"]
    if padding is None:
        return ids, torch.ones_like(ids, dtype=torch.bool)
    return ids, ids != padding % len(weight)


def _bound(call: CallArgs) -> dict[str, Any]:
    """The arguments of an embedding by name."""
    args, kwargs = call.rebuild(call.leaves)
    bound = _EMBEDDING.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


@torch.enable_grad()
def _twice(f: Callable[[Tensor], Tensor], x: Tensor, along: Tensor) -> Tensor:
    """The derivative of `f` at `x` along a tangent, by plain autograd."""
    y = f(x)
    v = torch.zeros_like(y, requires_grad=True)
    (pulled,) = torch.autograd.grad(y, x, v, create_graph=True, materialize_grads=True)
    if not pulled.requires_grad:
        return torch.zeros_like(y)
    (pushed,) = torch.autograd.grad(pulled, v, along, allow_unused=True, materialize_grads=True)
    return pushed
