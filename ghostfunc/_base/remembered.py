"""What is remembered of a model function, for as long as the function lives."""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ghostfunc._base.compilable import known
from ghostfunc._base.module import ModuleFn
from ghostfunc._base.torch_private import modules_within
from ghostfunc._base.trees import ParamSpec, flatten, tensors_of
from ghostfunc._base.types import ModelFn, PyTree

LOOKED_INTO = 64
"""Elements of a list or a dict that is searched for modules; longer ones hold data."""

_INT = frozenset((int,))

_memo: weakref.WeakKeyDictionary[ModelFn, dict[Hashable, Any]] = weakref.WeakKeyDictionary()


def memory(model_fn: ModelFn) -> dict[Hashable, Any]:
    """What is remembered of a function, for as long as the function lives."""
    try:
        return _memo.setdefault(model_fn, {})
    except TypeError:  # not hashable or not weakly referable: nothing is remembered
        return {}


def structure(
    model_fn: ModelFn, spec: ParamSpec, leaves: Sequence[Tensor], batch: PyTree, randomness: str
) -> Hashable:
    """What a trace depends on: structures, ranks and dtypes, and the training flags of modules."""
    batch_leaves, batch_def = flatten(batch)
    return (
        spec.treedef,
        tuple([(x.ndim, x.dtype) for x in leaves]),
        batch_def,
        tuple([(x.ndim, x.dtype) for x in batch_leaves]),
        len(batch_leaves[0]) > 1,  # a batch of one proves nothing of others
        randomness,
        training_flags(model_fn),
    )


def training_flags(model_fn: ModelFn) -> tuple[bool, ...]:
    """Which of the modules in a function's reach are in training mode."""
    if isinstance(model_fn, ModuleFn):
        return model_fn.training_flags()
    roots = _modules([model_fn], set())
    return tuple([m.training for root in roots for m in modules_within(root)])


def _modules(values: Iterable[Any], seen: set[int]) -> Iterator[nn.Module]:
    """The modules that functions and their arguments hold, and those of the functions' files."""
    for x in values:
        if id(x) in seen:
            continue
        seen.add(id(x))
        match x:
            case nn.Module():
                yield x
            case functools.partial():
                yield from _modules((x.func, *x.args, *x.keywords.values()), seen)
            case types.MethodType():
                yield from _modules((x.__self__, x.__func__), seen)
            case types.FunctionType():
                yield from _modules(_closed_over(x), seen)
            case list() | tuple() if len(x) <= LOOKED_INTO:
                yield from _modules(x, seen)
            case dict() if len(x) <= LOOKED_INTO:
                yield from _modules(x.values(), seen)


def _closed_over(fn: types.FunctionType) -> list[Any]:
    found: list[Any] = [*(fn.__defaults__ or ())]
    for cell in fn.__closure__ or ():
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            found.append(cell.cell_contents)
    names = (name for name in fn.__code__.co_names if name in fn.__globals__)
    for x in (fn.__globals__[name] for name in names):
        own = isinstance(x, types.FunctionType) and x.__globals__ is fn.__globals__
        if own or isinstance(x, nn.Module):
            found.append(x)
    return found


def shapes_key(batch: PyTree) -> Hashable:
    """The exact shapes of a batch."""
    return tuple([_known_shape(x.shape) for x in tensors_of(batch)])


def _known_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if _INT.issuperset(map(type, shape)) else tuple(map(known, shape))
