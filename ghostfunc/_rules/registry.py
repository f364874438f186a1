"""The registry of op rules: from torch ops to rules, which live in the other files of this room, by
family of ops.

Where a parameter meets samples, an op with neither a rule nor a decomposition is refused. Nowhere
else is a rule looked for. An op has one rule or one decomposition; a second one is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import WAYS_OUT, CoupledSamplesError, OptionError, UnsupportedOpError
from ghostfunc._base.refusals import op_name
from ghostfunc._base.torch_private import CustomOpDef, OpOverload, OpOverloadPacket
from ghostfunc._factors.factor import Factor

ArgName: TypeAlias = str | tuple[str, int]
"""An argument of an op: its name, or for one inside a list its name and position there."""


COPY: ArgName = ""
"""The name of every parameter that a `BroadcastRule` is for: its argument is the expanded copy."""


FactorMakers: TypeAlias = dict[Any, Callable[[], Factor]]
"""What a rule returns: argument name -> a function without arguments that makes its factor. The
names are `ArgName`s; dict is invariant in them, and the rules of users return `dict[str, ...]`."""


RuleFn: TypeAlias = Callable[..., FactorMakers]


@dataclass(frozen=True)
class TwoForms:
    """Makes a factor in one of two forms. A call gives the cheaper one. `by_position` keeps
    positions apart, even where that is larger: readers of single positions ask for it."""

    cheaper: Callable[[], Factor]
    by_position: Callable[[], Factor]

    def __call__(self) -> Factor:
        return self.cheaper()


@dataclass(frozen=True)
class FactorRule:
    """An op whose per-sample gradient follows from its inputs and its output's cotangent."""

    fn: RuleFn
    signature: inspect.Signature
    check: Callable[..., None] | None = None
    multilinear: bool = False

    def names(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, ArgName]:
        """The rule's name for every argument; arguments are told apart by `id`.

        Raises:
            TypeError: the call does not fit the rule's signature.
        """
        named: dict[int, ArgName] = {}
        for name, value in self.signature.bind(*args, **kwargs).arguments.items():
            if isinstance(value, (list, tuple)):
                named.update({id(x): (name, i) for i, x in enumerate(_flat(value))})
            else:
                named[id(value)] = name
        return named


@dataclass(frozen=True)
class BroadcastRule:
    """An op that broadcasts a parameter against samples.

    It is fed a copy of the parameter expanded to the samples; autograd's cotangent of that copy is
    the per-sample gradient.
    """


Rule: TypeAlias = FactorRule | BroadcastRule


def _flat(values: Any) -> list[Any]:
    """The elements of lists within lists."""
    return [y for x in values for y in (_flat(x) if isinstance(x, (list, tuple)) else [x])]


RULES: dict[Callable[..., Any], Rule] = {}
"""The rule of an op."""

DECOMPOSITIONS: dict[Callable[..., Any], Callable[..., Any]] = {}
"""What is called instead of an op: the same in ops that have rules."""

REASONS: dict[Callable[..., Any], str] = {}
"""Why an op, or some calls of it, have no rule, and what to do."""


def _add(op: Callable[..., Any], rule: Rule) -> None:
    _check_new(op)
    RULES[canonical(op)] = rule


def canonical(op: Callable[..., Any]) -> Callable[..., Any]:
    """One object for all that a custom op of `torch.library` is called by."""
    if isinstance(op, CustomOpDef):
        op = op._opoverload
    if isinstance(op, OpOverload) and op._overloadname == "default":
        return op.overloadpacket
    return op


def _names(op: Callable[..., Any]) -> Iterable[Callable[..., Any]]:
    """All that an op is called by. Calls of a custom op show its overload or its packet."""
    op = canonical(op)
    return (op, op.default) if isinstance(op, OpOverloadPacket) else (op,)


def _check_new(op: Callable[..., Any]) -> None:
    if not callable(op):
        raise OptionError(f"Registering a rule takes the op itself (such as F.linear), not {op!r}.")
    op = canonical(op)
    if op in RULES or op in DECOMPOSITIONS:
        raise OptionError(
            f"{op_name(op)} has a rule or a decomposition already; an op has one of them."
        )


def register_rule(
    *ops: Callable[..., Any],
    check: Callable[..., None] | None = None,
    multilinear: bool = False,
) -> Callable[[RuleFn], RuleFn]:
    """Teach ghostfunc an op: decorate a rule for it.

    Args:
        ops: the op as torch functions see it (`F.linear`, `torch.matmul`, `torch.Tensor.matmul`,
            ...); several names of one op may share a rule.
        check: called like the op, where a parameter meets samples in it, before the rule is tried:
            the place to raise `UnsupportedOpError` for calls that have no factor.
        multilinear: whether the op is linear in each of its tensors, and the rule only multiplies,
            adds up and moves their elements. It serves complex tensors, too, then.

    Returns:
        A decorator for a rule: a function `rule(b, <the op's own signature>)` that returns a dict
        from argument name (in a list, from `(name, position)`) to a function that makes the factor
        of that argument's per-sample gradient: `gf.Outer`, `gf.OneHot`, `gf.Grouped` or
        `gf.Dense`. `b`, the cotangent of the op's output, and every tensor among the arguments are
        stacked over samples, `[n, *shape]`, where `shape` is what a call with one sample would
        have; see `docs/adding_a_rule.md` for an example.

    Raises:
        OptionError: an op is not callable or has a rule or a decomposition already.
    """

    def decorate(fn: RuleFn) -> RuleFn:
        parameters = list(inspect.signature(fn).parameters.values())
        rule = FactorRule(fn, inspect.Signature(parameters[1:]), check, multilinear)
        for op in dict.fromkeys(ops):  # torch has several names for one object
            _add(op, rule)
        return fn

    return decorate


def register_broadcasting(*ops: Callable[..., Any]) -> None:
    """Declare ops that broadcast their tensor arguments against each other."""
    for op in dict.fromkeys(ops):
        _add(op, BroadcastRule())


def register_decomposition(
    *ops: Callable[..., Any], otherwise: str = ""
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run a composite op by an equivalent: decorate a function of elementary torch ops.

    Args:
        ops: ops that reach torch functions whole (`torch.lstm`, `F.multi_head_attention_forward`).
        otherwise: the reason that an error gives where `fn` returns `NotImplemented`.

    Returns:
        A decorator for a function with the op's signature. It is called instead of the op, and the
        ops it calls are seen in their turn; `NotImplemented` says that this call is to be left as
        it is.

    Raises:
        OptionError: an op is not callable or has a rule or a decomposition already.
    """

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        for op in dict.fromkeys(ops):
            _check_new(op)
            DECOMPOSITIONS.update(dict.fromkeys(_names(op), fn))
            if otherwise:
                no_rule_because(otherwise, op)
        return fn

    return decorate


def no_rule_because(reason: str, *ops: Callable[..., Any]) -> None:
    """Say why ops have no rule."""
    for op in ops:
        REASONS.update(dict.fromkeys(_names(op), reason))


def constant(x: Tensor) -> Tensor:
    """Marks `x` for a tracking mode, which holds the result constant. Without such a mode the
    result is a view of `x`, through which gradients flow. A decomposition that runs an op twice on
    one parameter calls this in one of the two: the parameter's gradient then counts once."""
    if has_torch_function((x,)):
        held: Tensor = handle_torch_function(constant, (x,), x)
        return held
    return x.view_as(x)


def rule_of(op: Callable[..., Any]) -> Rule | None:
    """The rule of an op, or None."""
    return RULES.get(canonical(op))


def coupled(what: str, remedy: str) -> CoupledSamplesError:
    """What a rule raises for a call that makes one sample's output of others, too."""
    return CoupledSamplesError(
        f"{what}: the loss of one sample depends on the others, so per-sample gradients do not "
        f"exist. {remedy}"
    )


def unsupported(what: str, remedy: str = "") -> UnsupportedOpError:
    """What a rule raises for a call it has no exact factor for."""
    return UnsupportedOpError(" ".join(x for x in (f"{what}.", remedy, WAYS_OUT) if x))


def sum_to(g: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum `[n, ...]` over the axes that broadcasting `shape` added, keeping the samples."""
    extra = g.ndim - 1 - len(shape)
    g = wide(g).sum(tuple(range(1, 1 + extra))) if extra else wide(g)
    grown = tuple(i + 1 for i, s in enumerate(shape) if s == 1 and g.shape[i + 1] != 1)
    return g.sum(grown, keepdim=True) if grown else g
