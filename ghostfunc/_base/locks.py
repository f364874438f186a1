"""Locks and loans that survive a fork.

A child process has only the thread that forked: a lock held by another thread would stay locked in
the child for ever, and tensors lent to a module would stay in it. So in a child locks are made
anew, and loans are given back.
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ghostfunc._base.torch_private import modules_within, tensors_of_module


class ForkSafeLock:
    """A re-entrant lock that is free in a child process, whoever held it in the parent.

    Attributes:
        now: the lock of this process.
    """

    def __init__(self) -> None:
        self._renew()
        _locks.add(self)

    def _renew(self) -> None:
        self.now = threading.RLock()

    def __enter__(self) -> None:
        self.now.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.now.__exit__(kind, error, trace)


class Loan:
    """Tensors that a module has in place of its own: `take` puts them there.

    A `KeyboardInterrupt` may come up anywhere, also while torch puts a module's own tensors back.
    `give_back` puts back what is still missing, and may be called at any time, more than once.
    """

    def __init__(self, parts: Sequence[nn.Module], lent: Iterable[Tensor]) -> None:
        self._lent = set(map(id, lent))
        self._own: list[tuple[dict[str, Any], str, Any]] = []
        for held in [held for part in parts for held in tensors_of_module(part) if held]:
            self._own += [(held, name, x) for name, x in held.items()]
        _loans.add(self)

    def give_back(self) -> None:
        """Put the module's own tensors back into the places that are empty or hold lent ones."""
        for held, name, own in self._own:
            if name not in held or id(held[name]) in self._lent:
                held[name] = own
        _loans.discard(self)


_locks: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()
_loans: set[Loan] = set()
_of_module: weakref.WeakKeyDictionary[nn.Module, tuple[int, ForkSafeLock]]
_of_module = weakref.WeakKeyDictionary()
_within: weakref.WeakKeyDictionary[nn.Module, list[ForkSafeLock]] = weakref.WeakKeyDictionary()
_numbers = itertools.count()
_registry = ForkSafeLock()

FORWARD_MODE = ForkSafeLock()
"""The levels of torch's forward-mode AD are shared by all threads of a process."""


def _in_child() -> None:
    for lock in list(_locks):
        lock._renew()
    for loan in list(_loans):
        loan.give_back()


if "register_at_fork" in vars(os):  # not on Windows
    os.register_at_fork(after_in_child=_in_child)


@contextmanager
def alone_with(module: nn.Module) -> Iterator[None]:
    """Keep other threads from a module, and from all modules in it, while it has lent parameters.

    A thread may come back to a module that it has. Locks are taken in one order everywhere, so that
    threads with overlapping modules do not wait for each other for ever.
    """
    if torch.compiler.is_compiling():  # by one thread at a time
        yield
        return
    with _registry:
        if module not in _within:
            numbered = {
                _of_module.setdefault(m, (next(_numbers), ForkSafeLock()))
                for m in modules_within(module)
            }
            _within[module] = [lock for _, lock in sorted(numbered, key=lambda x: x[0])]
        locks = [lock.now for lock in _within[module]]
    held = []
    try:
        for lock in locks:
            lock.acquire()
            held.append(lock)
        yield
    finally:
        for lock in reversed(held):
            lock.release()
