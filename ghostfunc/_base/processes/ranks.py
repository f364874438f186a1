"""Processes that compute together: what they sum up, and what they agree on.

A call with a `group` goes through *phases*. In a phase every rank computes on its own, and tensors
may travel meanwhile (`Exchange`); at its end all ranks exchange one small table: whether a rank
failed, whether all of them were given alike, and a number of each. So the collectives of a call
follow from its arguments alone. Whatever the data make a rank do besides (another way through the
model, a proof, an exception) it does between two collectives: nobody waits for what never comes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import accumulate
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import OptionError, RankError, TransformError
from ghostfunc._base.text_number import number_of_text
from ghostfunc._base.torch_private import all_gather, group_store, in_transform

BUCKET_BYTES = 25 << 20
"""Of gradients that travel together: what DistributedDataParallel takes, too."""

GRACE = 5.0
"""For how many seconds ranks wait for each other to say who is left, once a collective failed."""

_HERE = "ghostfunc/here/{}"
"""How often a rank said that it is here; `_SEEN`: how often another heard it the last time."""

_SEEN = "ghostfunc/seen/{}/{}"


class Ranks:
    """The processes of a group, in one call of a public function.

    Attributes:
        group: of `torch.distributed`.
        call: the function's name, for messages.
        rank, size: this process among the group's.
    """

    def __init__(self, group: Any, call: str) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise OptionError(
                f"{call} got a group, and torch.distributed is not initialized. Start the program "
                "with torchrun and call torch.distributed.init_process_group() first."
            )
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise OptionError(
                f"{call} got a group that this process, rank {dist.get_rank()}, is not in: "
                "torch.distributed.new_group gives others no group. Call it on the group's ranks "
                "alone."
            )
        if not isinstance(group, dist.ProcessGroup):
            raise OptionError(
                f"group is a {type(group).__name__}; expected a process group, such as "
                "torch.distributed.group.WORLD, ddp.process_group or mesh.get_group()."
            )
        if in_transform():
            raise TransformError(
                f"{call} got a group inside a transform of torch.func, which cannot follow an "
                "exchange between processes. Call it outside."
            )
        self.group, self.call = group, call
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise OptionError(
                f"{call} got a group that this process, rank {dist.get_rank()}, is not in."
            )
        self._gloo = "gloo" in dist.get_backend_config(group)
        self.device = torch.device("cpu" if self._gloo else "cuda")

    def named(self, rank: int) -> str:
        """A rank of the group, as the whole program knows it."""
        return f"rank {dist.get_global_rank(self.group, rank)}"

    def phase(self, place: str) -> Phase:
        """A part of the call, for `with`; `place` completes "failed while ..."."""
        return Phase(self, place)

    def sum_later(self, x: Tensor, place: str) -> Any:
        """Begin to add up `x`, in place, over the ranks. Returns what `wait` takes."""
        try:
            return dist.all_reduce(x, group=self.group, async_op=True)
        except RuntimeError as error:
            raise self.lost(place, error) from error

    def wait(self, work: Any, place: str) -> None:
        """Wait for a collective; raise `RankError` that names the ranks it fails for."""
        try:
            work.wait()
        except RuntimeError as error:
            raise self.lost(place, error) from error

    def samples(self, x: Tensor, counts: Sequence[int], place: str) -> list[Tensor]:
        """Every rank's tensor of samples, of which it has as many as `counts` says: each sends as
        many as the longest has. Bytes travel, since backends do not take all dtypes."""
        sent = x.new_zeros(max(counts), *x.shape[1:])
        sent[: len(x)] = x.detach()
        received = sent.new_empty(self.size, *sent.shape)
        try:
            all_gather(as_bytes(received), as_bytes(sent), group=self.group)
        except RuntimeError as error:
            raise self.lost(place, error) from error
        return [rows[:n] for rows, n in zip(received, counts, strict=True)]

    def rows(self, row: Sequence[int], place: str) -> list[list[int]]:
        """One row of numbers from every rank."""
        table = torch.zeros(self.size, len(row), dtype=torch.int64, device=self.device)
        table[self.rank] = torch.tensor(row, dtype=torch.int64, device="cpu")
        self.wait(self.sum_later(table, place), place)
        return table.tolist()

    def from_first(self, row: Sequence[int], place: str) -> list[int]:
        """The first rank's numbers, of which every rank has as many."""
        numbers = torch.tensor(row, dtype=torch.int64, device=self.device)
        self.take_first(numbers, place)
        return numbers.tolist()

    def take_first(self, x: Tensor, place: str) -> None:
        """Write the first rank's values over `x`."""
        source = dist.get_global_rank(self.group, 0)
        try:
            dist.broadcast(x, source, group=self.group)
        except RuntimeError as error:
            raise self.lost(place, error) from error

    def objects(self, x: Any, place: str) -> list[Any]:
        """One picklable object from every rank."""
        out: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(out, x, group=self.group)
        except RuntimeError as error:
            raise self.lost(place, error) from error
        return out

    def lost(self, place: str, error: RuntimeError) -> RankError:
        """The error of a collective that failed, with the names of those who do not answer."""
        said = str(error).strip().splitlines()[0]
        missing = self._roll_call()
        if missing is None:
            who = "the store of the process group does not answer: the process that holds it, rank "
            who += "0 unless torchrun does, is gone"
        elif missing:
            names = ", ".join(map(self.named, missing))
            who = (
                f"no answer comes from {names} of {self.size}: killed, ended by an error, or held "
            )
            who += "up for longer than the timeout of the process group"
        else:
            who = "every rank still answers; one of them took longer than the timeout of the "
            who += "process group, or called something else"
        return RankError(
            f"{self.call}: {self.named(self.rank)} waited for the others while {place}, and {who}. "
            f"Look at what that rank printed last; start the run again. torch said: {said}"
        )

    def _roll_call(self) -> list[int] | None:
        """The ranks that do not say that they are here; None if nobody can tell."""
        others = [r for r in range(self.size) if r != self.rank]
        try:
            store: Any = group_store(self.group)
            store.add(_HERE.format(self.rank), 1)
            self._wake(others)
            # Of this failure: what was said at an earlier one tells nothing.
            heard = {r: store.add(_SEEN.format(self.rank, r), 0) for r in others}
            missing, end = others, time.monotonic() + GRACE
            while missing and time.monotonic() < end:
                counts = {r: store.add(_HERE.format(r), 0) for r in missing}
                for r in missing:
                    store.add(_SEEN.format(self.rank, r), max(0, counts[r] - heard[r]))
                missing = [r for r in missing if counts[r] <= heard[r]]
                time.sleep(0.02 if missing else 0)
            return missing
        except RuntimeError:
            return None

    def _wake(self, others: Sequence[int]) -> None:
        """Have those who still wait for a collective see that it failed: a message that times out
        closes a connection of gloo."""
        if not self._gloo:
            return  # NCCL's own watchdog ends those who wait
        for r in others:
            try:
                to = dist.get_global_rank(self.group, r)
                work = dist.isend(torch.zeros(1, device="cpu"), to, group=self.group)
                if work is not None:
                    work.wait(timedelta(milliseconds=20))
            except RuntimeError:  # gone, or closed: both are what was wanted
                continue


class Phase:
    """What a rank computes between two tables; made by `Ranks.phase`.

    Attributes:
        number: this rank's, to be set inside; `numbers` has those of all ranks afterwards.
        alike: what must be the same on all ranks, in words.
    """

    def __init__(self, ranks: Ranks, place: str) -> None:
        self._ranks, self._place = ranks, place
        self._exchanges: list[Exchange] = []
        self.number, self.alike = 0, ""
        self.numbers: list[int] = []

    def exchange(
        self, like: Sequence[Tensor], order: Sequence[int], weight: float = 1.0
    ) -> Exchange:
        """Sums over the ranks of `weight` times tensors with these shapes, which are expected in
        this order. All ranks have to make it alike but for the weight, and before anything in the
        phase can fail."""
        made = Exchange(self._ranks, like, order, weight, self._place)
        self._exchanges.append(made)
        return made

    def __enter__(self) -> Phase:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if isinstance(error, RankError):
            return  # the others are gone, or know
        # A rank that failed still sends what the others wait for: zeros.
        for exchange in self._exchanges:
            exchange.send_all()
        failed, alike = error is not None, number_of_text(f"{self._ranks.call}: {self.alike}")
        table = self._ranks.rows([failed, alike, self.number], self._place)
        if any(row[0] for row in table):
            self._tell(error)
        elif len({row[1] for row in table}) > 1:
            self._disagree()
        self.numbers = [row[2] for row in table]

    def _tell(self, error: BaseException | None) -> None:
        """All ranks end: those that failed by their own error, the others by one that quotes it."""
        said = None if error is None else f"{type(error).__name__}: {error}"
        told = self._ranks.objects(said, self._place)
        if error is not None:
            return
        named = self._ranks.named
        parts = [f"{named(r)} failed with {x}" for r, x in enumerate(told) if x is not None]
        raise RankError(
            f"{self._ranks.call}: while {self._place}, {'; '.join(parts)}. No rank has a result."
        )

    def _disagree(self) -> None:
        told = self._ranks.objects(f"{self.alike} (in {self._ranks.call})", self._place)
        parts = [f"{self._ranks.named(r)} was given {text}" for r, text in enumerate(told)]
        raise RankError(
            f"{self._ranks.call}: the ranks have to be given the same but for their samples; "
            f"{'; '.join(parts)}."
        )


class Exchange:
    """Sums over ranks of tensors that come up one by one, in buckets that travel meanwhile.

    Buckets are made from an order, shapes, dtypes and devices alone, and leave in that order, so
    that all ranks send the same at the same turn. Sums are taken in float32 or wider.

    Attributes:
        arrived: the tensors' numbers, in the order they came up.
        early: how many buckets left while the rank still computed.
    """

    def __init__(
        self,
        ranks: Ranks,
        like: Sequence[Tensor],
        order: Sequence[int],
        weight: float,
        place: str,
    ) -> None:
        self._ranks, self._weight, self._place = ranks, weight, place
        self._like = [(x.shape, wide(x.new_empty(0)).dtype, x.device) for x in like]
        self._buckets = _buckets(like, order)
        self._bucket_of = {i: k for k, bucket in enumerate(self._buckets) for i in bucket}
        self._start: dict[int, int] = {}
        for bucket in self._buckets:
            sizes = [like[i].numel() for i in bucket]
            self._start.update(zip(bucket, accumulate([0, *sizes]), strict=False))
        self._missing = [len(bucket) for bucket in self._buckets]
        self._flat: list[Tensor | None] = [None] * len(self._buckets)
        self.arrived: list[int] = []
        self._work: list[Any] = []
        self.early = 0

    def give(self, i: int, x: Tensor) -> None:
        """Tensor number i; a bucket leaves when it is full and those before it have left."""
        k = self._bucket_of[i]
        if k < len(self._work):
            raise TransformError(
                f"A gradient of shape {tuple(x.shape)} came up twice in one backward pass, and its "
                "first value has been sent to the other ranks. Leave out group= and average the "
                "gradients after the call (torch.distributed.all_reduce)."
            )
        self._place_of(i, k).copy_(x.detach())
        if i not in self.arrived:
            self.arrived.append(i)
            self._missing[k] -= 1
        while len(self._work) < len(self._buckets) and not self._missing[len(self._work)]:
            self._send()
            self.early += 1

    def give_rest(self, tensors: Sequence[Tensor]) -> None:
        """All of them, where most may have been given before."""
        early = self.early
        for i, x in enumerate(tensors):
            if i not in self.arrived:
                self.give(i, x)
        self.early = early

    def send_all(self) -> None:
        """What has not left leaves now; what was not given counts zero."""
        while len(self._work) < len(self._buckets):
            self._send()

    def sums(self) -> list[Tensor]:
        """The sums, float32 or wider, in memory that nobody else holds."""
        self.send_all()
        for work in self._work:
            self._ranks.wait(work, self._place)
        return [self._place_of(i, self._bucket_of[i]) for i in range(len(self._like))]

    def _send(self) -> None:
        flat = self._flat_of(len(self._work))
        if self._weight != 1.0:
            flat.mul_(self._weight)
        self._work.append(self._ranks.sum_later(flat, self._place))

    def _flat_of(self, k: int) -> Tensor:
        flat = self._flat[k]
        if flat is None:
            _, dtype, device = self._like[self._buckets[k][0]]
            size = sum(self._like[i][0].numel() for i in self._buckets[k])
            flat = self._flat[k] = torch.zeros(size, dtype=dtype, device=device)
        return flat

    def _place_of(self, i: int, k: int) -> Tensor:
        """The part of bucket k that belongs to tensor i."""
        shape, start = self._like[i][0], self._start[i]
        return self._flat_of(k)[start : start + shape.numel()].view(shape)


def as_bytes(x: Tensor) -> Tensor:
    """The same memory, byte by byte."""
    return x.reshape(-1).view(torch.uint8)


def _buckets(like: Sequence[Tensor], order: Sequence[int]) -> list[list[int]]:
    """Numbers of tensors that travel together."""
    buckets: list[list[int]] = []
    size, kind = 0, None
    for i in order:
        x = wide(like[i].new_empty(0))
        own, bytes_ = (x.dtype, x.device), like[i].numel() * x.element_size()
        if own != kind or size + bytes_ > BUCKET_BYTES:
            buckets.append([])
            size, kind = 0, own
        buckets[-1].append(i)
        size += bytes_
    return buckets
