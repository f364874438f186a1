"""The processes that share a run: those of a group, or this one alone.

What they share is a list of parts. Whoever is done with a part takes the next, so no rank waits for
another for longer than a part takes. A part is the same whoever makes it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from torch import Tensor

from ghostfunc._base.errors import RankError
from ghostfunc._base.processes.ranks import Phase, Ranks, as_bytes
from ghostfunc._base.torch_private import group_store
from ghostfunc._base.trees import map_tensors
from ghostfunc._base.types import PyTree

T = TypeVar("T")

_TAKEN = "ghostfunc/taken/{}"
"""How many parts of a run have been taken."""


class Processes:
    """Those of a process group, in one call; of None this process alone.

    Attributes:
        first: whether this is the one that reads and writes what all of them share.
    """

    def __init__(self, group: Any, call: str) -> None:
        self._ranks = None if group is None else Ranks(group, call)
        self.first = self._ranks is None or self._ranks.rank == 0

    def phase(self, place: str) -> AbstractContextManager[Phase | None]:
        """A part of the call at whose end all wait for each other: an error ends it on all."""
        return nullcontext() if self._ranks is None else self._ranks.phase(place)

    def of_first(self, x: T, place: str) -> T:
        """The first process's object, on all of them."""
        return (
            x if self._ranks is None else self._ranks.objects(x if self.first else None, place)[0]
        )

    def tensors_of_first(self, tree: PyTree, place: str) -> PyTree:
        """The first process's values of tensors, of which all have as many of the same shapes."""
        ranks = self._ranks
        if ranks is None:
            return tree

        def taken(x: Tensor) -> Tensor:
            own = x.detach().to(ranks.device, copy=True).contiguous()
            ranks.take_first(as_bytes(own), place)
            return own.to(x.device)

        return map_tensors(taken, tree)

    @contextmanager
    def dealing(self, count: int) -> Iterator[Iterator[int]]:
        """Numbers below `count`, each to one process. Where one fails, nobody takes more."""
        ranks = self._ranks
        if ranks is None:
            yield iter(range(count))
            return
        key = _TAKEN.format(self.of_first(uuid.uuid4().hex, "dealing out parts"))

        def take(more: int = 1) -> int:
            try:
                before: int = group_store(ranks.group).add(key, more) - more
            except RuntimeError as error:
                raise ranks.lost("dealing out parts", error) from error
            return before

        def numbers() -> Iterator[int]:
            while (number := take()) < count:
                yield number

        try:
            yield numbers()
        except RankError:
            raise
        except BaseException:
            take(count)
            raise

    def joined(self, own: dict[int, T], place: str) -> dict[int, T]:
        """What all processes have, by number."""
        told: Sequence[dict[int, T]] = (
            [own] if self._ranks is None else self._ranks.objects(own, place)
        )
        return {number: x for row in told for number, x in row.items()}
