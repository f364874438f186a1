"""What is remembered of a model function, for as long as the function lives."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Generic, TypeVar

from ghostfunc._base.documents import Documents, packing_of
from ghostfunc._base.locks import ForkSafeLock
from ghostfunc._base.module import ModuleFn
from ghostfunc._base.program import Program
from ghostfunc._base.reach import modules_in_reach
from ghostfunc._base.torch_private import ambient, known, modules_within
from ghostfunc._base.trees import flatten, tensors_of
from ghostfunc._base.types import ModelFn, PyTree

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
M = TypeVar("M")

LOOKED_INTO = 64
"""Elements of a list or a dict that is searched for modules; longer ones hold data."""

_INT = frozenset((int,))

STRUCTURES = 256
"""Structures of one function that are remembered: settings of its modules, dtypes, trees."""

SHAPES = 4096
"""Shapes of batches that are remembered, of one function."""


class Recent(Generic[K, V]):
    """What was found lately, by key. What is forgotten is found again when it is needed.

    Args:
        most: how much is kept; what was asked for longest ago goes first.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._found: dict[K, V] = {}
        self._lock = ForkSafeLock()

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: K) -> V | None:
        """What was found; None if nothing was, or it is forgotten."""
        with self._lock.now:
            if key not in self._found:
                return None
            self._found[key] = self._found.pop(key)  # the latest last
            return self._found[key]

    def put(self, key: K, value: V) -> V:
        """Keep what was found, and return it."""
        with self._lock.now:
            self._found.pop(key, None)
            self._found[key] = value
            while len(self._found) > self._most:
                del self._found[next(iter(self._found))]
        return value

    def made(self, key: K, make: Callable[[], V]) -> V:
        """What was found, or is made now."""
        found = self.get(key)
        return self.put(key, make()) if found is None else found


@dataclass(frozen=True)
class Structures:
    """What holds of all batches of one structure.

    Attributes:
        independent: samples do not depend on each other, and the function is pure.
        tangents: nor do their derivatives.
        loops: vmap cannot run the function.
    """

    independent: Recent[Hashable, bool] = field(default_factory=lambda: Recent(STRUCTURES))
    tangents: Recent[Hashable, bool] = field(default_factory=lambda: Recent(STRUCTURES))
    loops: Recent[Hashable, bool] = field(default_factory=lambda: Recent(STRUCTURES))


_memories: weakref.WeakKeyDictionary[ModelFn, dict[type, Any]] = weakref.WeakKeyDictionary()


def memory(model_fn: ModelFn, kind: type[M]) -> M:
    """What one part of the package remembers of a function: an object of a class of its own."""
    try:
        own = _memories.setdefault(model_fn, {})
    except TypeError:  # not hashable or not weakly referable: nothing is remembered
        return kind()
    found: M = own[kind] if kind in own else own.setdefault(kind, kind())
    return found


def structure(program: Program, batch: PyTree) -> Hashable:
    """What a trace depends on: structures, ranks and dtypes, the training flags of modules, and
    what the caller has set for all of torch."""
    batch_leaves, batch_def = flatten(batch)
    return (
        program.spec.treedef,
        tuple([(x.ndim, x.dtype) for x in program.leaves]),
        batch_def,
        tuple([(x.ndim, x.dtype) for x in batch_leaves]),
        len(batch_leaves[0]) > 1,  # a batch of one proves nothing of others
        isinstance(batch, Documents) and batch.packing.several,  # nor a document in its own row
        program.randomness,
        training_flags(program.model_fn),
        ambient(program.leaves[0].device.type),
    )


def training_flags(model_fn: ModelFn) -> tuple[bool, ...]:
    """Which of the modules in a function's reach are in training mode."""
    if isinstance(model_fn, ModuleFn):
        return model_fn.training_flags()
    roots = modules_in_reach([model_fn], names_of_files=True, longest=LOOKED_INTO)
    return tuple([m.training for root in roots for m in modules_within(root)])


def shapes_key(batch: PyTree) -> Hashable:
    """The exact shapes of a batch. Of documents, those that the model sees, which are their rows':
    how many documents the rows hold is no shape of any op."""
    if isinstance(batch, Documents):
        packing = batch.packing
        sizes = tuple(tuple(x.shape[2:]) for x in batch.tensors.values())
        return packing.rows, packing.width, packing.several, len(batch) > 1, sizes
    if isinstance(batch, tuple) and any(isinstance(x, Documents) for x in batch):
        return tuple([shapes_key(x) for x in batch])
    shapes = [x.shape for x in tensors_of(batch)]
    if _INT.issuperset(map(type, chain.from_iterable(shapes))):
        return tuple(shapes)
    return tuple([tuple(map(known, shape)) for shape in shapes])


def layout_key(batch: PyTree) -> Hashable:
    """What a proof of documents holds for besides: rows of one shape hold few or many of them."""
    packing = packing_of(batch)
    return None if packing is None else packing.layout
