"""The scores of a run: one row for every sample of every step, in files that are whole."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from examples.graddotprod_lm import atomic


@dataclass(frozen=True)
class Table:
    """Columns, each `[rows]`.

    Attributes:
        step: which step saw the sample, from 1.
        domain: place in the list of domains.
        sample: which sample of the domain's training file.
        loss: of the sample, before the step.
        dot_prod: `<g_i, g_val>`, before the step.
        learning_rate: of the step. To first order, a plain gradient step on this sample alone would
            have lowered the validation loss by `learning_rate * dot_prod`.
    """

    step: np.ndarray
    domain: np.ndarray
    sample: np.ndarray
    loss: np.ndarray
    dot_prod: np.ndarray
    learning_rate: np.ndarray

    @classmethod
    def concatenate(cls, tables: list[Table]) -> Table:
        return cls(
            *(np.concatenate([vars(t)[f.name] for t in tables]) for f in fields(cls)),
        )

    def __len__(self) -> int:
        return len(self.step)

    @property
    def shapley(self) -> np.ndarray:
        """Each row's first-order share in lowering the validation loss: above zero, it helped."""
        return self.learning_rate * self.dot_prod

    def write(self, path: Path) -> None:
        atomic.write(path, lambda file: np.savez(file, **vars(self)))

    @classmethod
    def read(cls, path: Path) -> Table:
        with np.load(path) as columns:
            return cls(**columns)


class ScoreLog:
    """Collects a run's rows and writes them in pieces, `scores/steps-<first>-<last>.npz`."""

    NAME = re.compile(r"steps-(\d+)-(\d+)\.npz")

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "scores"
        self.folder.mkdir(exist_ok=True)
        self.waiting: list[Table] = []

    def pieces(self) -> list[tuple[int, int, Path]]:
        """First step, last step and path of what is written, in order."""
        found = []
        for path in self.folder.iterdir():
            if match := self.NAME.fullmatch(path.name):
                found.append((int(match[1]), int(match[2]), path))
        return sorted(found)

    def forget_after(self, step: int) -> None:
        """Remove pieces of steps that no checkpoint knows of: they will be computed again."""
        for _, last, path in self.pieces():
            if last > step:
                path.unlink()

    def append(self, rows: Table) -> None:
        self.waiting.append(rows)

    def flush(self) -> None:
        if self.waiting:
            table = Table.concatenate(self.waiting)
            table.write(self.folder / f"steps-{table.step[0]:08}-{table.step[-1]:08}.npz")
            self.waiting = []


def load(run_dir: Path) -> Table:
    """All scores of a run.

    Raises:
        FileNotFoundError: the run has none.
    """
    pieces = ScoreLog(run_dir).pieces() if run_dir.is_dir() else []
    if not pieces:
        raise FileNotFoundError(f"{run_dir} has no scores: is it the folder of a GradDotProd run?")
    return Table.concatenate([Table.read(path) for _, _, path in pieces])
