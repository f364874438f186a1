"""What was measured, in files: a run that was cut goes on where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from measure import Measured
from torch import Tensor

HERE = Path(__file__).resolve().parent

Truth = dict[str, tuple[Tensor, Tensor]]
"""By the share of samples left out: which samples each model kept, and its losses of queries."""


class Keep:
    """The results of one task and seed. Names of files hold a digest of the sources that made them,
    so that a changed task or method is measured again.

    Args:
        folder: of all tasks and seeds.
        name: of this task and seed.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / f"{name}-{digest('tasks.py', 'retrain.py')}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def truth(self, share: str, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        path = self.folder / f"left out {share}.pt"
        if not path.exists():
            write(path, make())
        kept, losses = torch.load(path)
        return kept, losses

    def method(self, name: str, source: str, make: Callable[[], Measured]) -> Measured:
        path = self.folder / f"{name}-{digest(source, 'measure.py')}.pt"
        if not path.exists():
            write(path, asdict(make()))
        return Measured(**torch.load(path))


def write(path: Path, value: object) -> None:
    """A file that appears whole or not at all."""
    aside = path.with_suffix(".writing")
    torch.save(value, aside)
    aside.replace(path)


def digest(*files: str) -> str:
    """Of the sources of ghostfunc and of these files."""
    out = hashlib.sha256()
    for path in [
        *sorted((HERE.parents[1] / "ghostfunc").rglob("*.py")),
        *(HERE / x for x in files),
    ]:
        out.update(path.read_bytes())
    return out.hexdigest()[:12]
