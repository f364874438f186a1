"""What is remembered of a model function, for as long as the function lives."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from ghostfunc._base.compilable import known
from ghostfunc._base.module import ModuleFn
from ghostfunc._base.trees import ParamSpec, flatten, tensors_of
from ghostfunc._base.types import ModelFn, PyTree

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
        tuple((x.ndim, x.dtype) for x in leaves),
        batch_def,
        tuple((x.ndim, x.dtype) for x in batch_leaves),
        len(batch_leaves[0]) > 1,  # a batch of one proves nothing of others
        randomness,
        model_fn.training_flags() if isinstance(model_fn, ModuleFn) else (),
    )


def shapes_key(batch: PyTree) -> Hashable:
    """The exact shapes of a batch."""
    return tuple(tuple(map(known, x.shape)) for x in tensors_of(batch))
