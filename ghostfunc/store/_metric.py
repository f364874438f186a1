"""Rows as a query compares them: some of their columns, in a metric, whole or by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base.options import check_positive, check_type
from ghostfunc.projection import Projection
from ghostfunc.projection._blocks import select
from ghostfunc.store._rows import StoredRows


@dataclass(frozen=True)
class Preconditioner:
    """`A = (C + lambda I)^-1` per group of columns, `C` the second moment of the stored rows.

    Attributes:
        roots: `L` with `A = L L^T`, by group: `x L` are whitened rows.
    """

    roots: dict[str, Float[Tensor, "k k"]]


def preconditioner(store: StoredRows, checkpoint: str, *, damping: float) -> Preconditioner:
    """The damped inverse second moment of the stored rows, per parameter.

        A_b = (1/N sum_i x_ib x_ib^T + lambda_b I)^-1,   lambda_b = damping * (mean eigenvalue)

    Args:
        store: a complete store.
        checkpoint: whose rows.
        damping: relative to the mean eigenvalue of each block; LoGra uses 0.1.

    References:
        Choe et al., 2024 (LoGra); Park et al., 2023 (TRAK); Grosse et al., "Studying Large Language
        Model Generalization with Influence Functions", 2023.
    """
    check_positive("damping", damping)
    check_type("checkpoint", checkpoint, str, "its name")
    store.need(checkpoint, None)
    groups = store.projection.groups
    moments = {
        name: torch.zeros((c.stop - c.start,) * 2, dtype=torch.float64, device="cpu")
        for name, c in groups.items()
    }
    for _, rows in store.chunks(checkpoint):
        for name, columns in groups.items():
            x = rows[:, columns].double()
            moments[name] += x.mT @ x
    return Preconditioner(
        {name: _root(c / store.n_samples, damping).float() for name, c in moments.items()}
    )


def _root(c: Tensor, damping: float) -> Tensor:
    """`L` with `(C + lambda I)^-1 = L L^T`."""
    scale = c.diagonal().mean()
    if scale == 0:  # a parameter without gradient: any metric gives zero
        return torch.eye(len(c), dtype=c.dtype, device="cpu")
    damped = c + damping * scale * torch.eye(len(c), dtype=c.dtype, device="cpu")
    lower = torch.linalg.cholesky(damped)
    return torch.linalg.solve_triangular(
        lower, torch.eye(len(c), dtype=c.dtype, device="cpu"), upper=False
    ).mT


class RowView:
    """Rows as a query wants them: some columns, in a metric, in one piece or by block."""

    def __init__(
        self,
        projection: Projection,
        layers: Sequence[str] | None,
        metric: Preconditioner | None,
        *,
        per_block: bool,
    ) -> None:
        self._columns = {g: projection.groups[g] for g in select(list(projection.groups), layers)}
        self._roots = None if metric is None else metric.roots
        self._everything = layers is None and not per_block
        self._per_block = per_block

    def plain(self, rows: Tensor) -> list[Tensor]:
        """`x`."""
        if self._everything:
            return [rows]
        return self._pieces({g: rows[:, c] for g, c in self._columns.items()})

    def whitened(self, rows: Tensor) -> list[Tensor]:
        """`x L`, whose ordinary inner products are those of the metric `A = L L^T`."""
        if self._roots is None:
            return self.plain(rows)
        return self._pieces({g: rows[:, c] @ self._roots[g] for g, c in self._columns.items()})

    def applied(self, rows: Tensor) -> list[Tensor]:
        """`x A`."""
        if self._roots is None:
            return self.plain(rows)
        roots = self._roots
        return self._pieces(
            {g: rows[:, c] @ roots[g] @ roots[g].mT for g, c in self._columns.items()}
        )

    def _pieces(self, parts: dict[str, Tensor]) -> list[Tensor]:
        return list(parts.values()) if self._per_block else [torch.cat(list(parts.values()), 1)]


def norms(x: Tensor) -> Tensor:
    """`[rows, 1]`; a zero row has similarity 0 with everything, not 0/0."""
    norms = x.norm(dim=1, keepdim=True)
    return norms.masked_fill(norms == 0, 1)


def unit(x: Tensor) -> Tensor:
    """Rows of length 1; zero rows stay zero."""
    return x / norms(x)
