"""Training forward, with every k-th state kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghostfunc._base.options import check_flags, check_path, check_type
from ghostfunc._base.types import PyTree
from ghostfunc.curvature import _files
from ghostfunc.curvature._errors import check_count
from ghostfunc.unrolled._errors import UnrolledError
from ghostfunc.unrolled._training import State, Training, differing


class States:
    """Kept states by number of steps taken, in memory or in a directory.

    Attributes:
        every: how many steps apart.
        directory: where the files are; None keeps them in memory.
    """

    def __init__(
        self, training: Training, every: int, directory: str | os.PathLike[str] | None
    ) -> None:
        self.every = every
        self.directory = None if directory is None else Path(directory)
        start = training.start()
        self._names = [f"params {i}" for i in range(len(start.params))]
        self._names += [f"slots {i}" for i in range(len(start.slots))]
        self._device = training.leaves[0].device
        self._about = {"kind": "training state", **training.about()}
        self._held: dict[int, State] = {}

    def path(self, step: int) -> Path:
        assert self.directory is not None
        return self.directory / f"state_{step:08d}.safetensors"

    def put(self, step: int, state: State) -> None:
        if self.directory is None:
            self._held[step] = state
            return
        tensors = {f"params {i}": x.cpu() for i, x in enumerate(state.params)}
        tensors |= {f"slots {i}": x.cpu() for i, x in enumerate(state.slots)}
        _files.write(self.path(step), tensors, {**self._about, "step": step}, UnrolledError)

    def get(self, step: int) -> State:
        if self.directory is None:
            return self._held[step]
        if not self.path(step).exists():
            raise UnrolledError(
                f"the state after {step} steps is missing: there is no {str(self.path(step))!r}. "
                "Call gf.unrolled.train with this directory again."
            )
        tensors, about = _files.read(self.path(step), UnrolledError)
        wrong = differing(about, self._about)
        if wrong:
            raise UnrolledError(
                f"{str(self.path(step))!r} belongs to another run: it differs in "
                f"{', '.join(wrong)}. Use another directory, or delete this one."
            )
        _files.check_entries(self.path(step), tensors, self._names, UnrolledError)
        tensors = {name: x.to(self._device) for name, x in tensors.items()}
        return State(_numbered(tensors, "params"), _numbered(tensors, "slots"))

    def last(self, total: int) -> int | None:
        """The latest step whose state is kept."""
        if self.directory is None:
            return max(self._held, default=None)
        wanted = [*range(0, total, self.every), total]
        return max((t for t in wanted if self.path(t).exists()), default=None)


class Trained:
    """A finished run; made by `train`.

    Attributes:
        training: the run.
        params: the final parameters, a pytree.
        states: those that were kept.
    """

    def __init__(self, training: Training, states: States) -> None:
        self.training, self.states = training, states
        self.final = states.get(len(training))

    @property
    def params(self) -> PyTree:
        return self.training.unflatten(self.final.params)


def train(
    training: Training,
    *,
    keep_every: int,
    directory: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Trained:
    """Run a training forward, and keep the state after every k-th step and the last.

    Args:
        training: the run.
        keep_every: k. With S the size of parameters and optimizer state, P that of parameters, and
            T steps, `ceil(T / k) + 1` states of S are kept; `metagradients` holds up to k more of
            S + P at a time. Both together are least at k near `sqrt(T)`.
        directory: where to keep the states, one safetensors file each; None keeps them in memory.
            A run that was killed goes on from its last kept state.
        progress: show a progress bar (needs tqdm).

    Returns:
        A `Trained`: `params`, and what `metagradients` needs.

    Raises:
        UnrolledError: the directory holds another run, a file is cut short, or training diverges.
    """
    check_type("training", training, Training, "a gf.unrolled.Training")
    check_count("keep_every", keep_every)
    check_flags(progress=progress)
    if directory is not None:
        check_path("directory", directory)
    states = States(training, keep_every, directory)
    total = len(training)
    step = states.last(total)
    if step is None:
        step = 0
        states.put(0, training.start())
    state = states.get(step)
    with bar(progress, "training", total, step) as advance:
        while step < total:
            state = training.after(state, training.gradient(state, step), step)
            step += 1
            if step % keep_every == 0 or step == total:
                states.put(step, state)
            advance()
    return Trained(training, states)


@contextmanager
def bar(progress: bool, what: str, total: int, initial: int) -> Iterator[Any]:
    if not progress:
        yield lambda: None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, initial=initial, unit="step", desc=what) as shown:
        yield shown.update


def _numbered(tensors: dict[str, torch.Tensor], name: str) -> list[Tensor]:
    count = sum(key.startswith(f"{name} ") for key in tensors)
    return [tensors[f"{name} {i}"] for i in range(count)]
