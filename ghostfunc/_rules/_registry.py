"""The op registry: refuses what it does not know, and to be told twice."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from torch.overrides import resolve_name

from ghostfunc._errors import CoupledSamplesError, OptionError
from ghostfunc._factors import Factor

RuleFn: TypeAlias = Callable[..., dict[str, Callable[[], Factor]]]


@dataclass(frozen=True)
class FactorRule:
    """An op whose per-sample gradient follows from its inputs and its output's cotangent."""

    fn: RuleFn
    signature: inspect.Signature

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by the names the rule uses."""
        return self.signature.bind(*args, **kwargs).arguments


@dataclass(frozen=True)
class BroadcastRule:
    """An op that broadcasts a parameter against samples.

    It is fed a copy of the parameter expanded to the samples; autograd's cotangent of that copy is
    the per-sample gradient.
    """


Rule: TypeAlias = FactorRule | BroadcastRule

RULES: dict[Callable[..., Any], Rule] = {}
REFUSED: dict[Callable[..., Any], Callable[..., None]] = {}


def _add(op: Callable[..., Any], rule: Rule) -> None:
    if not callable(op):
        raise OptionError(f"register_rule takes the op itself (such as F.linear), not {op!r}.")
    if op in RULES:
        raise OptionError(f"{op_name(op)} has a rule already; an op has exactly one.")
    RULES[op] = rule


def register_rule(*ops: Callable[..., Any]) -> Callable[[RuleFn], RuleFn]:
    """Teach ghostfunc an op: decorate a rule for it.

    Args:
        ops: the op as torch functions see it (`F.linear`, `torch.matmul`, `torch.Tensor.matmul`,
            ...); several names of one op may share a rule.

    Returns:
        A decorator for a rule: a function `rule(b, <the op's own signature>)` that returns a dict
        from argument name to a function that makes the factor of that argument's per-sample
        gradient (`gf.Outer`, `gf.OneHot` or `gf.Dense`). `b` and every argument that carries
        samples are `[n, ...]`.

    Raises:
        OptionError: an op is not callable or has a rule already.
    """

    def decorate(fn: RuleFn) -> RuleFn:
        parameters = list(inspect.signature(fn).parameters.values())
        rule = FactorRule(fn, inspect.Signature(parameters[1:]))
        for op in ops:
            _add(op, rule)
        return fn

    return decorate


def register_broadcasting(*ops: Callable[..., Any]) -> None:
    """Declare ops that broadcast their tensor arguments against each other."""
    for op in ops:
        _add(op, BroadcastRule())


def refuse(*ops: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a check, with the op's signature, that raises for calls with no per-sample
    meaning. It is asked before the op runs, whether a parameter is involved or not."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        REFUSED.update(dict.fromkeys(ops, check))
        return check

    return decorate


def lookup(op: Callable[..., Any]) -> Rule | None:
    """The rule of an op, or None."""
    return RULES.get(op)


def op_name(op: Callable[..., Any]) -> str:
    """What an op is called in errors: `torch.nn.functional.linear`, `torch.Tensor.mul`."""
    return resolve_name(op) or repr(op)


def coupled(what: str, remedy: str) -> CoupledSamplesError:
    return CoupledSamplesError(
        f"{what}: the loss of one sample depends on the others, so per-sample gradients do not "
        f"exist. {remedy}"
    )


def rows(x: Tensor) -> Tensor:
    """`[n, ..., d]` as `[n, t, d]`: all positions of a sample on one axis (t = 1 if none)."""
    return x.reshape(x.shape[0], -1, x.shape[-1])
