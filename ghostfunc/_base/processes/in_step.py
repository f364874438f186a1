"""Ranks in step: processes that share one model, and have to communicate equally often.

What a run does beyond the plain one depends on its data, and one collective more on one rank is a
deadlock. So before every collective all ranks *meet*: a few bytes say where each of them is. A rank
that stopped says so there, and all of them stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghostfunc._base.errors import RankError
from ghostfunc._base.processes.ranks import Ranks
from ghostfunc._base.text_number import number_of_text
from ghostfunc._base.torch_private import all_gather

_RUNS, _STOPPED, _RETRIES = range(3)


class OtherRankRetries(Exception):
    """Another rank has to begin anew. Never leaves the package."""


class _Told(NamedTuple):
    """What every rank says where they meet."""

    places: list[int]
    states: list[int]
    numbers: list[int]


class InStep:
    """The ranks of a process group, as they meet.

    Attributes:
        group: what tensors travel by; `control`: what the few bytes of a meeting travel by.
        rank, size: of this process in the group, and how many there are.
        together: whether this process runs with the others at present.
    """

    def __init__(self, group: Any) -> None:
        dist = torch.distributed
        self.group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self.control = group
        if dist.get_backend(group) != "gloo":  # a meeting does not wait for the device
            members = dist.get_process_group_ranks(group)
            self.control = dist.new_group(members, backend="gloo", use_local_synchronization=True)
        self.together = 0
        self._over = False  # all ranks know that this call ended, and have not met since
        self._tensors = Ranks(self.group, "A sharded module")
        self._ranks = Ranks(self.control, "A sharded module")

    # --- waiting for each other ---

    def meet(self, place: str) -> None:
        """Wait for the others, before all of them communicate at one place."""
        self._meet(place)

    def any(self, place: str, flag: bool) -> bool:
        """Whether it is so on any rank: a decision that all of them take alike."""
        return any(self._meet(place, number=int(flag)).numbers)

    def all(self, place: str, number: int) -> list[int]:
        """The numbers of all ranks."""
        return self._meet(place, number=number).numbers

    def add_up(self, place: str, x: Tensor) -> Tensor:
        """The sum of the tensors of all ranks; `x` is written over."""
        out = x.detach().contiguous()
        self.meet(place)
        self._tensors.wait(self._tensors.sum_later(out, place), place)
        return out

    def samples(self, place: str, x: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Every rank's tensor of samples, of which it has as many as `counts` says."""
        self.meet(place)
        return self._tensors.samples(x, counts, place)

    def _meet(self, place: str, state: int = _RUNS, number: int = 0) -> _Told:
        mine = torch.tensor([number_of_text(place), state, number], device="cpu")
        rows = mine.new_empty(self.size * 3)
        try:
            all_gather(rows, mine, group=self.control)
        except RuntimeError as error:
            raise self.lost(place, error) from error
        self._over = False
        told = _Told(*(column.tolist() for column in rows.view(self.size, 3).unbind(1)))
        if any(told.states) or len(set(told.places)) > 1:
            self._stop(place, told, state)
        return told

    def named(self, rank: int) -> str:
        """A rank, as the whole program knows it."""
        return self._ranks.named(rank)

    def lost(self, place: str, error: RuntimeError) -> RankError:
        """What is said where the connection to another rank breaks or times out."""
        return self._ranks.lost(place, error)

    def _stop(self, place: str, told: _Told, state: int) -> None:
        """All ranks are here, and know that they do not go on."""
        texts: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(texts, place, group=self.control)
        stopped = [r for r, s in enumerate(told.states) if s == _STOPPED]
        self._over = bool(stopped) or not any(told.states)
        if state != _RUNS and (state == _STOPPED or not stopped):
            return  # whoever says so has an error of its own
        if stopped:
            listed = "; ".join(f"{self.named(r)} failed with {texts[r]}" for r in stopped)
            raise RankError(
                f"{self.named(self.rank)} stopped while {place}, since another rank did: " + listed
            )
        if any(told.states):
            raise OtherRankRetries
        listed = "; ".join(f"{self.named(r)} is {x}" for r, x in enumerate(texts))
        raise RankError(
            f"The ranks are at several places of the program: {listed}. Every rank has to make the "
            "same calls of ghostfunc in the same order, with as many chunks of batches of its own, "
            "and the model has to use its parameters in one order on all of them."
        )

    # --- stretches of the program ---

    def in_step(self, place: str, retries: tuple[type[Exception], ...] = ()) -> Stretch:
        """What all ranks do together. An error on one of them ends it on all; one that is among
        `retries` has the others begin anew."""
        return Stretch(self, place, retries, together=True)

    def apart(self, place: str) -> Stretch:
        """What every rank does by itself, as it needs; nothing in it communicates."""
        return Stretch(self, place, (), together=False)

    def end(
        self, place: str, error: BaseException | None, retries: tuple[type[Exception], ...]
    ) -> None:
        """Meet the others where a stretch ends, and tell them how it did."""
        if error is None:
            self._meet(f"done with {place}")
        elif not self._over and not isinstance(error, (RankError, OtherRankRetries, GeneratorExit)):
            self._tell(place, error, _RETRIES if isinstance(error, retries) else _STOPPED)

    def _tell(self, place: str, error: BaseException, state: int) -> None:
        said = str(error).splitlines()
        text = f"{type(error).__name__} while {place}: {said[0] if said else ''}"
        self._meet(text, state)


class Stretch:
    """A stretch of the program that all ranks go through; made by `InStep`."""

    def __init__(
        self, ranks: InStep, place: str, retries: tuple[type[Exception], ...], *, together: bool
    ) -> None:
        self._ranks, self._place, self._retries = ranks, place, retries
        self._together = together

    def __enter__(self) -> None:
        self._ranks.together += self._together

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ranks.together -= self._together
        self._ranks.end(self._place, error, self._retries)
