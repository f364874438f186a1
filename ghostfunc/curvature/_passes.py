"""Two passes over a data set: sums over positions, whose eigenvectors are the bases; then second
moments of the gradients in these bases. Resumable, and summed over processes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ghostfunc._base.batches import chunks
from ghostfunc._base.errors import OptionError
from ghostfunc._base.fingerprint import fingerprint, frozen
from ghostfunc._base.processes.ranks import Ranks
from ghostfunc._base.processes.same_weights import number_of
from ghostfunc._base.program import Program
from ghostfunc._base.torch_private import unrounded
from ghostfunc._base.trees import ParamSpec, batch_size, take, tensors_of
from ghostfunc._base.types import PyTree
from ghostfunc._quantities.quantity import Prepared, Quantity
from ghostfunc._taps.run import run
from ghostfunc.curvature import _files
from ghostfunc.curvature._blocks import Block, Form, Limits, block_of, matches
from ghostfunc.curvature._errors import CurvatureError
from ghostfunc.curvature._fisher import Gradients
from ghostfunc.curvature._operator import Basis
from ghostfunc.curvature._readers import EigenvalueReader, FormReader, SideReader, VectorReader

Batches: TypeAlias = Iterable[PyTree]


@dataclass(frozen=True)
class Data:
    """Parameters, and the batches that are gone through twice.

    Attributes:
        chunk_size: the most samples to run at one time.
        progress: show a progress bar.
        group: the processes to sum over, each with batches of its own; None: this one alone.
    """

    leaves: list[Tensor]
    spec: ParamSpec
    batches: Batches
    chunk_size: int | None
    progress: bool
    group: Any

    @property
    def params(self) -> PyTree:
        return self.spec.unflatten(self.leaves)


COUNTS = ("phase", "batches", "samples", "first", "seen")
"""What a kept state says beside its tensors."""


@dataclass
class State:
    """How far a computation has come.

    Attributes:
        phase: "bases" or "eigenvalues".
        batches: how many batches of this phase are done.
        samples: in those batches.
        sums: of this phase, by name, float64.
        bases: eigenbases by name, once they are known.
        first: samples of the first phase.
        seen: a digest of those batches, where the state is kept.
    """

    phase: str = "bases"
    batches: int = 0
    samples: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    bases: dict[str, Tensor] = field(default_factory=dict)
    first: int = 0
    seen: str = ""

    def add(self, name: str, x: Tensor) -> None:
        x = x.double()
        self.sums[name] = self.sums[name] + x if name in self.sums else x


@dataclass(frozen=True)
class Keeper:
    """Keeps a state in a file, every few batches.

    Attributes:
        path: the file; None keeps nothing.
        every: how many batches apart.
        about: what the computation is one of; a state of another one is refused.
    """

    path: str | os.PathLike[str] | None
    every: int
    about: dict[str, Any]

    def load(self, device: torch.device) -> State:
        """The state that was kept, or the first one."""
        if self.path is None or not os.path.exists(self.path):
            return State()
        tensors, about = _files.read(self.path)
        found = {key: about.get(key) for key in self.about}
        if found != self.about:
            differing = sorted(key for key in self.about if found[key] != self.about[key])
            raise CurvatureError(
                f"{os.fspath(self.path)!r} is the state of another computation: it differs in "
                f"{', '.join(differing)}. Delete the file, or give another checkpoint path."
            )
        _files.check_entries(self.path, about, COUNTS)
        tensors = {name: x.to(device) for name, x in tensors.items()}
        sums, bases = (
            {name[len(part) :]: x for name, x in tensors.items() if name.startswith(part)}
            for part in ("sums ", "bases ")
        )
        return State(
            about["phase"], about["batches"], about["samples"], sums, bases, about["first"],
            about["seen"],
        )  # fmt: skip

    def check_seen(self, state: State, seen: str) -> None:
        """Raise unless the batches before are those that the state was made of."""
        if seen != state.seen:
            raise CurvatureError(
                f"{os.fspath(self.path or '')!r} is the state of other batches: the first "
                f"{state.batches} hold other numbers now, or come in another order. Give the "
                "batches that it was begun with, or delete the file."
            )

    def keep(self, state: State, *, now: bool = False) -> None:
        if self.path is None or not (now or state.batches % self.every == 0):
            return
        tensors = {f"sums {k}": x for k, x in state.sums.items()}
        tensors |= {f"bases {k}": x for k, x in state.bases.items()}
        counts = {k: getattr(state, k) for k in COUNTS}
        _files.write(self.path, tensors, {**self.about, **counts})


def blocks_of(gradients: Gradients, data: Data, limits: Limits) -> list[Block]:
    """How every parameter is seen, from the factors of two samples of the first batch.

    What these do not use is looked for in all batches: "unused" is what none of them uses.
    """
    ranks = _ranks_of(data.group)
    if ranks is None:
        forms = _own_forms(gradients, data, limits)
    else:
        with ranks.phase("looking at its first batches"):
            forms = _own_forms(gradients, data, limits)
        # Those of the first process that uses a parameter: blocks are the same on all of them.
        found = ranks.objects(forms, "comparing what the factors look like")
        forms = [next((x for x in seen if x), []) for seen in zip(*found, strict=True)]
    return [
        block_of(name, tuple(x.shape), seen, limits)
        for name, x, seen in zip(data.spec.names, data.leaves, forms, strict=True)
    ]


def _own_forms(gradients: Gradients, data: Data, limits: Limits) -> list[list[Form]]:
    """What the factors of every parameter look like in this process's batches."""
    first = next(iter(data.batches), None)
    if first is None:
        raise OptionError("batches is empty: a curvature needs at least one batch.")
    few = take(first, range(min(2, batch_size(first))))
    gradients.check(data.params, few)
    readers = [None if matches(name, limits.identity) else FormReader() for name in data.spec.names]
    _look(gradients, data, few, readers)
    rest = iter(data.batches) if _unmet(readers) else iter(())
    while _unmet(readers) and (batch := next(rest, None)) is not None:
        for _, chunk in chunks(batch, data.chunk_size):
            _look(gradients, data, chunk, [None if r is None or r.forms else r for r in readers])
    return [[] if r is None else r.forms for r in readers]


def _unmet(readers: Sequence[FormReader | None]) -> bool:
    return any(reader is not None and not reader.forms for reader in readers)


def _look(
    gradients: Gradients, data: Data, batch: PyTree, readers: Sequence[FormReader | None]
) -> None:
    """Note what the factors of some parameters look like."""
    model_fn, scored = next(gradients.runs(data.params, batch, 0))
    run(Program(model_fn, data.leaves, data.spec, "error"), scored, [Prepared(readers, degree=1)])


def find_bases(
    gradients: Gradients,
    data: Data,
    blocks: Sequence[Block],
    reduce: bool,
    state: State,
    keeper: Keeper,
) -> None:
    """Fill `state.bases`."""
    left = [SideReader(b, True, reduce) if b.kind == "matrix" and b.left else None for b in blocks]
    right = [
        SideReader(b, False, reduce) if b.kind == "matrix" and b.right else None for b in blocks
    ]
    vector = [VectorReader(b) if b.kind == "vector" and b.right else None for b in blocks]
    # What is read at the uses of one side adds up; a vector's uses are taken together.
    quantities = [Prepared(left, 1), Prepared(right, 1), Prepared(vector, 2)]
    _pass(gradients, data, blocks, quantities, ("left", "right", "right"), state, keeper)
    bases = {}
    for name in sorted(state.sums):
        bases[name] = _eigenvectors(state.sums[name])
        _broadcast(bases[name], data.group)
    state.bases = bases
    state.phase, state.first = "eigenvalues", state.samples
    state.batches, state.samples, state.sums, state.seen = 0, 0, {}, ""
    keeper.keep(state, now=True)


def find_eigenvalues(
    gradients: Gradients, data: Data, blocks: Sequence[Block], state: State, keeper: Keeper
) -> list[Basis]:
    """The bases with their eigenvalues, from the second pass."""
    readers: list[EigenvalueReader | None] = []
    for i, (block, leaf) in enumerate(zip(blocks, data.leaves, strict=True)):
        dtype = torch.promote_types(leaf.dtype, torch.float32)
        left, right = (
            state.bases[key].to(dtype) if (key := f"{i} {side}") in state.bases else None
            for side in ("left", "right")
        )
        met = block.kind in ("matrix", "vector")
        readers.append(EigenvalueReader(block, left, right) if met else None)
    _pass(gradients, data, blocks, [Prepared(readers, 2)], ("eigenvalues",), state, keeper)
    if state.samples != state.first:
        raise CurvatureError(
            f"batches held {state.first} samples the first time and {state.samples} the second. "
            "Both passes must see the same samples: switch off whatever drops or repeats some."
        )
    out = []
    for i, (block, leaf, reader) in enumerate(zip(blocks, data.leaves, readers, strict=True)):
        dtype = torch.promote_types(leaf.dtype, torch.float32)
        if reader is None:
            fill = torch.ones if block.kind == "identity" else torch.zeros
            out.append(Basis(None, None, fill(block.sizes, dtype=dtype, device=leaf.device)))
            continue
        mean = state.sums[f"{i} eigenvalues"] / (state.samples * gradients.draws)
        out.append(Basis(reader.left, reader.right, mean.to(dtype)))
    return out


def _pass(
    gradients: Gradients,
    data: Data,
    blocks: Sequence[Block],
    quantities: Sequence[Quantity],
    names: Sequence[str],
    state: State,
    keeper: Keeper,
) -> None:
    """Add what is read in all batches that are left to the state."""
    ranks = _ranks_of(data.group)
    if ranks is None:
        _own_batches(gradients, data, blocks, quantities, names, state, keeper)
        return
    with ranks.phase("going through its batches") as phase:
        _own_batches(gradients, data, blocks, quantities, names, state, keeper)
        elements = sum(x.numel() for x in state.sums.values())
        phase.number = state.samples
        phase.alike = f"{len(state.sums)} statistics of {elements} elements, "
        phase.alike += f"weights {number_of(data.leaves):x}"
    state.samples = sum(phase.numbers)
    place = "adding statistics up"
    for name in sorted(state.sums):
        state.sums[name] = state.sums[name].contiguous()
        ranks.wait(ranks.sum_later(state.sums[name], place), place)


def _own_batches(
    gradients: Gradients,
    data: Data,
    blocks: Sequence[Block],
    quantities: Sequence[Quantity],
    names: Sequence[str],
    state: State,
    keeper: Keeper,
) -> None:
    """A pass over this process's batches."""
    params, again = data.params, state.phase == "eigenvalues"
    with _bar(data, state) as advance:
        for number, batch in _from(state, data.batches, keeper):
            for _, chunk in chunks(batch, data.chunk_size):
                # A chunk has draws of its own, by its place in the data set.
                for model_fn, scored in gradients.runs(params, chunk, state.samples, checked=again):
                    program = Program(model_fn, data.leaves, data.spec, "error")
                    taken = run(program, scored, quantities)
                    for name, values in zip(names, taken.values, strict=True):
                        _add(state, name, values, blocks, number)
                state.samples += batch_size(chunk)
            state.batches += 1
            keeper.keep(state)
            advance()


def _from(state: State, batches: Batches, keeper: Keeper) -> Iterator[tuple[int, PyTree]]:
    """The batches that are left, by number; `CurvatureError` unless those before are the same."""
    done, seen, number = state.batches, "", -1
    for number, batch in enumerate(batches):
        if keeper.path is not None:
            tensors = tensors_of(batch)
            seen = fingerprint([f"{seen} {i}" for i in range(len(tensors))], tensors)
        if number + 1 == done:
            keeper.check_seen(state, seen)
        if number >= done:
            state.seen = seen
            yield number, batch
    if number + 1 < done:
        keeper.check_seen(state, seen)


def _add(
    state: State, name: str, values: Sequence[Tensor | None], blocks: Sequence[Block], number: int
) -> None:
    for i, value in enumerate(values):
        if value is None:
            continue
        if not bool(value.isfinite().all()):
            raise CurvatureError(
                f"the statistics of parameter {blocks[i].path!r} are not finite in batch {number}: "
                "its activations or gradients overflow there. Look at this batch, or run the model "
                "in a wider dtype."
            )
        state.add(f"{i} {name}", value)


def _eigenvectors(sums: Tensor) -> Tensor:
    """Eigenvectors in columns, for every group, of sums made exactly symmetric."""
    with unrounded(sums):
        return torch.linalg.eigh((sums + sums.mT) / 2).eigenvectors.contiguous()


def _ranks_of(group: Any) -> Ranks | None:
    return None if group is None else Ranks(group, "gf.curvature.ekfac")


def _broadcast(x: Tensor, group: Any) -> None:
    """Eigenvectors are unique up to signs and rotations: all processes take one's."""
    ranks = _ranks_of(group)
    if ranks is not None:
        ranks.take_first(x, "taking the first one's eigenvectors")


@contextmanager
def _bar(data: Data, state: State) -> Iterator[Any]:
    if not data.progress:
        yield lambda: None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    total = len(data.batches) if isinstance(data.batches, Sequence) else None
    with tqdm(total=total, initial=state.batches, unit="batch", desc=state.phase) as bar:
        yield bar.update


def about_of(gradients: Gradients, data: Data, limits: Limits, reduce: bool) -> dict[str, Any]:
    """What tells one computation from another, ready for JSON."""
    return {
        "kind": "state",
        "params": fingerprint(data.spec.names, data.leaves),
        "frozen": frozen(gradients.model_fn, data.params),
        "fisher": gradients.fisher,
        "draws": gradients.draws,
        "seed": gradients.seed,
        "sharing": "reduce" if reduce else "expand",
        "limits": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(limits).items()},
    }
