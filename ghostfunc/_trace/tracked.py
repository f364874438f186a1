"""Tracked tensors: parameters, and what is derived from them before any sample is met; the way of
directions from a parameter to such a tensor, and of factors back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, KeysView, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import optree
import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._base.dense_gradients import dense
from ghostfunc._base.processes.shards import gather
from ghostfunc._base.refusals import op_name
from ghostfunc._base.torch_private import autocasting, cast_as, in_transform
from ghostfunc._base.trees import ParamSpec, flatten, unflatten
from ghostfunc._factors.beside_total import RunningTotal
from ghostfunc._factors.contract import add_up, materialize, transpose
from ghostfunc._factors.factor import Dense, Factor, OneHot
from ghostfunc._quantities.readers import LinearReader, Push, Reader
from ghostfunc._trace.layout import Layout, stack_all

Derivation: TypeAlias = Literal["general", "transpose", "cast"]
ReaderKey: TypeAlias = tuple[int, int]
"""(quantity, parameter): what a reader reads."""


def getter(name: str) -> Callable[..., Any]:
    """The function that reading a tensor's attribute calls."""
    found: Callable[..., Any] = getattr(Tensor, name).__get__
    return found


_TRANSPOSES: set[Callable[..., Any]] = {
    torch.t, torch.transpose, torch.swapaxes, Tensor.t, Tensor.transpose, Tensor.swapaxes,
    getter("T"), getter("mT"), torch.adjoint, Tensor.adjoint,
}  # fmt: skip
_CASTS = {
    Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type,
    Tensor.type_as, Tensor.contiguous, Tensor.clone, torch.clone, Tensor.cpu, Tensor.cuda,
}  # fmt: skip
_LINEAR: set[Callable[..., Any]] = _TRANSPOSES | {
    F.embedding, Tensor.view, Tensor.reshape, torch.reshape, Tensor.permute, torch.permute,
    Tensor.expand, Tensor.unsqueeze, torch.unsqueeze, Tensor.squeeze, torch.squeeze,
    Tensor.flatten, torch.flatten, Tensor.chunk, torch.chunk, Tensor.split, torch.split, gather,
}  # fmt: skip
"""Ops that are linear in the one tensor that is tracked, and so are their own derivative."""
LONGEST_NAME = 80
"""Characters of a derived tensor's name: an expression in full, or its end is left out."""
_EMBEDDING = inspect.signature(F.embedding)


@dataclass(eq=False)
class Tracked:
    """A parameter, or a tensor derived from parameters alone.

    Attributes:
        name: the parameter's name, or an expression of them: what errors call it.
        const: its value, constant at the level of the transform that is running.
        primal: the same value again, no gradient: its cotangent is the training gradient. Of a
            derived tensor, it is computed from the primals of the parameters. The same object as
            `const` where no training gradient is wanted.
        shown: the same value, as the program gets it. Outside transforms it is a leaf of autograd's
            graph of its own, which no gradient may reach: all that are seen go another way.
        number: the order in which tracked tensors come up, the parameters first.
        readers: by quantity and parameter, the reader of this tensor's factors, None where they
            have to be pulled back to the parameter first, and the parameter's own reader.
        running: where the training gradient is added up, for parameters outside transforms; the
            cotangent of `primal` is then only what comes from derived tensors.
        formed_by_autograd: whether autograd forms the training gradient by itself: ops run on
            `primal` then, and uses do not read the gradient.
        leaf: index of the parameter, for parameters.
        sources, derivation, fn: for derived tensors, what of and how.
        made_whole: whether it, or what it derives from, was made of the pieces of several ranks.
        looked_up: finds, for rows of a table, their numbers and which of them autograd does not
            hold constant, `[rows]` each; None for what is no such thing.
    """

    name: str
    const: Tensor
    primal: Tensor
    shown: Tensor
    number: int = 0
    readers: dict[ReaderKey, tuple[Reader | None, Reader]] = field(default_factory=dict)
    running: RunningTotal | None = None
    formed_by_autograd: bool = False
    leaf: int | None = None
    sources: tuple[Tracked, ...] = ()
    derivation: Derivation = "general"
    fn: Callable[..., Tensor] | None = None
    looked_up: Callable[[], tuple[Tensor, Tensor] | None] = lambda: None
    made_whole: bool = False

    @property
    def reads_grad(self) -> bool:
        """Whether uses read the training gradient off this tensor's factors."""
        return self.running is not None or self.grad_is_returned

    @property
    def grad_is_returned(self) -> bool:
        """Whether uses return the training gradient that they read, or a part of it, as the
        cotangent of `primal`: autograd adds it up over the uses."""
        return self.primal is not self.const and not self.formed_by_autograd

    @property
    def real_shape(self) -> tuple[int, ...]:
        """The shape of its gradients, in real numbers."""
        return (*self.const.shape, *(2,) * self.const.is_complex())

    @property
    def wants_grad(self) -> bool:
        """Whether the training gradient is wanted, of the uses or of autograd itself."""
        return self.reads_grad or self.formed_by_autograd

    def readers_in_order(self) -> list[Reader]:
        """The readers of this tensor's factors, in the order of `readers`. Where the factors have
        to be pulled back to the parameter first, that is the parameter's reader."""
        return [root if own is None else own for own, root in self.readers.values()]

    def direct(self, factor: Factor) -> bool:
        """Whether this is a parameter, or a mere transpose or cast of one, and its factor one at
        the parameter, too: what is looked up in a transpose would have to be written out."""
        if self.leaf is not None:
            return True
        if self.derivation == "general":
            return False
        if self.derivation == "transpose" and isinstance(factor, OneHot):
            return False
        return self.sources[0].direct(factor)

    def __post_init__(self) -> None:
        self._parameters = {} if self.leaf is None else {self.leaf: self.name}
        for source in self.sources:
            self._parameters |= source._parameters

    def leaves(self) -> KeysView[int]:
        """The parameters this tensor derives from."""
        return self._parameters.keys()

    def leaf_names(self) -> set[str]:
        """The names of the parameters this tensor derives from."""
        return set(self._parameters.values())

    def pulled(self, factors: Sequence[Factor]) -> list[tuple[Tracked, Factor]]:
        """The factors of the tensors this one derives from, given its own, whose sum counts."""
        first = self.sources[0]
        if self.derivation == "cast":
            return [(first, factor) for factor in factors]
        if self.derivation == "transpose":
            return [(first, transpose(factor)) for factor in factors]
        assert self.fn is not None
        g = add_up([shaped(x, self.const, len(x)) for x in map(materialize, factors)])
        looked_up = self.looked_up()
        if looked_up is not None:
            ids, counted = looked_up
            b = torch.where(counted[:, None], real(g).reshape(len(g), ids.shape[0], -1), 0)
            return [(first, OneHot(ids.expand(len(g), -1), b, len(first.const)))]
        if _sparse((self, *self.sources)):  # no transform runs these
            pulled = self._pulled_one_by_one(g)
        else:
            pullback = torch.func.vjp(self.fn, *(s.const for s in self.sources))[1]
            pulled = torch.vmap(pullback)(g)
        return [(source, Dense(real(x))) for source, x in zip(self.sources, pulled, strict=True)]

    def _pulled_one_by_one(self, g: Tensor) -> list[Tensor]:
        """Every source's gradients, by plain autograd, sample by sample."""
        assert self.fn is not None
        inputs = [s.const.detach().requires_grad_() for s in self.sources]
        with torch.enable_grad():
            out = self.fn(*inputs)
        rows = [
            torch.autograd.grad(
                out, inputs, x, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for x in g
        ]
        return [torch.stack(list(map(dense, column))) for column in zip(*rows, strict=True)]


def _sparse(tensors: Iterable[Tracked]) -> bool:
    return any(x.const.layout != torch.strided for x in tensors)


def at_leaves(pairs: Iterable[tuple[Tracked, Factor]]) -> dict[int, list[Factor]]:
    """The parameters' factors, given those of tensors derived from them: `J^T g_i`, by parameter.

    At every derived tensor all that reaches it is added up before it is pulled back further, the
    latest tensor first: each is met once, however many ways lead through it.
    """
    met: dict[int, Tracked] = {}
    waiting: dict[int, list[Factor]] = {}
    for tracked, factor in pairs:
        met[tracked.number] = tracked
        waiting.setdefault(tracked.number, []).append(factor)
    found: dict[int, list[Factor]] = {}
    while waiting:
        latest = max(waiting)
        tracked, factors = met[latest], waiting.pop(latest)
        if tracked.leaf is not None:
            found[tracked.leaf] = factors
            continue
        for source, factor in tracked.pulled(factors):
            met[source.number] = source
            waiting.setdefault(source.number, []).append(factor)
    return found


def gradient_at(leaf: int, targets: Sequence[Tracked], factors: Sequence[Factor]) -> Tensor:
    """A parameter's gradients `[n, *shape]`, given the factors of tensors derived from it."""
    found = at_leaves(zip(targets, factors, strict=True))[leaf]
    g = [materialize(factor) for factor in found]
    return add_up([x.reshape(g[0].shape) for x in g])


def constants(
    leaves: Sequence[Tensor], spec: ParamSpec, shown: Sequence[Tensor] = ()
) -> list[Tracked]:
    """Every parameter as a constant. The program gets `shown`, with the same values; without
    them a new view of each parameter, as parameters may be one object outside."""
    if shown:
        return [
            Tracked(name, const=x, primal=x, shown=y, leaf=i)
            for i, (name, x, y) in enumerate(zip(spec.names, leaves, shown, strict=True))
        ]
    values = [x.view_as(x) for x in leaves]
    return [
        Tracked(name, const=x, primal=x, shown=x, leaf=i)
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


def derived(
    func: Callable[..., Any],
    pure: Callable[..., Any],
    call: CallArgs,
    values: tuple[Tensor, Tensor, Tensor],
    index: int | None,
    *,
    pushes: bool = True,
) -> Tracked:
    """What is known of a result of a call on tracked tensors alone; `values` are the program's, the
    primal and the constant.

    Unless it `pushes`, no direction travels through the call: factors are pulled back instead.
    """
    shown, primal, const = values

    pure = _replayed(pure, call)
    rounding = autocasting(const.device.type)

    def fn(*sources: Tensor) -> Tensor:
        if rounding == autocasting(const.device.type):
            out = call.run(pure, sources)
        else:
            with cast_as(rounding):
                out = call.run(pure, sources)
        return out if index is None else flatten(out)[0][index]

    derivation = _derivation(func, call, const)
    tracked = Tracked(
        name=_named(func, call),
        const=const,
        primal=primal,
        shown=shown,
        formed_by_autograd=any(source.formed_by_autograd for source in call.tracked),
        sources=tuple(call.tracked),
        derivation=derivation,
        fn=fn,
        looked_up=partial(_looked_up, func, call),
        made_whole=func is gather or any(source.made_whole for source in call.tracked),
    )
    for position, source in enumerate(call.tracked):
        for key, (reader, root) in source.readers.items():
            pushed = None
            if reader is not None and pushes:
                pushed = reader.push(_push(func, fn, call, position, derivation))
            if key in tracked.readers:
                # Two sources of one parameter: directions add up, J u = J_1 u_1 + J_2 u_2.
                before = tracked.readers[key][0]
                if not isinstance(before, LinearReader) or pushed is None:
                    pushed = None
                else:
                    pushed = before.plus(pushed)
            tracked.readers[key] = (pushed, root)
    return tracked


def _named(func: Callable[..., Any], call: CallArgs) -> str:
    names = ", ".join(t.name for t in call.tracked)
    name = f"{op_name(func).rsplit('.', 1)[-1]}({names})"
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 4] + "...)"


def _derivation(func: Callable[..., Any], call: CallArgs, out: Tensor) -> Derivation:
    if len(call.tracked) != 1:
        return "general"
    if func is gather:  # a factor is one of the whole parameter, and this rank's own
        return "cast"
    source = call.tracked[0].const
    # As real numbers, a complex tensor has a third axis, and its factors are no matrices.
    if func in _TRANSPOSES and source.ndim == 2 and not source.is_complex():
        # w.transpose(0, 0) is none.
        turned = (out.shape, out.stride()) == (source.shape[::-1], source.stride()[::-1])
        return "transpose" if turned else "general"
    if func in _CASTS and source.shape == out.shape and source.is_complex() == out.is_complex():
        return "cast"
    return "general"


def _replayed(func: Callable[..., Any], call: CallArgs) -> Callable[..., Any]:
    """An op as it may be run on tensors with other strides than those of the program."""
    return Tensor.reshape if func is Tensor.view and not _reads_bits(func, call) else func


def _reads_bits(func: Callable[..., Any], call: CallArgs) -> bool:
    """Whether a view takes the bits of a tensor for numbers of another kind."""
    return func is Tensor.view and any(isinstance(x, torch.dtype) for x in call.leaves)


def _push(
    func: Callable[..., Any],
    fn: Callable[..., Tensor],
    call: CallArgs,
    position: int,
    derivation: Derivation,
) -> Push:
    consts = call.consts()
    shape = call.tracked[position].real_shape
    linear = func in _LINEAR and len(consts) == 1 and not _reads_bits(func, call)
    if linear and (func is not F.embedding or not _padded(call)):
        gathers = func is gather and not in_transform()
        return Push(
            lambda tangent: real(fn(shaped(tangent, consts[0]))), derivation, shape, gathers
        )

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

    return Push(jvp, derivation, shape)


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
    if not y.requires_grad:
        return torch.zeros_like(y)
    v = torch.zeros_like(y, requires_grad=True)
    (pulled,) = torch.autograd.grad(y, x, v, create_graph=True, materialize_grads=True)
    if not pulled.requires_grad:
        return torch.zeros_like(y)
    (pushed,) = torch.autograd.grad(pulled, v, along, allow_unused=True, materialize_grads=True)
    return pushed
