"""Rows as a query compares them: some of their columns, in a metric, whole or by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import check_positive, check_type
from ghostfunc._factors.matmul import squares
from ghostfunc.projection import Projection
from ghostfunc.projection._blocks import select
from ghostfunc.store._errors import IncompatibleStoreError
from ghostfunc.store._rows import StoredRows

SHORT, LONG = 1e-15, 1e15
"""Between these lengths, squares of float32 entries keep their digits."""
SURE = 1e-3
"""The least damping, in units of the rounding of the largest second moment. Less is refused."""


@dataclass(frozen=True)
class Preconditioner:
    """`A = (C + lambda I)^-1` per group of columns, `C` the second moment of the stored rows.

    Attributes:
        roots: `L` with `A = L L^T`, by group: `x L` are whitened rows.
        projection: fingerprint of what made the rows.
    """

    roots: dict[str, Float[Tensor, "k k"]]
    projection: str

    def check(self, projection: Projection) -> None:
        """Raise `IncompatibleStoreError` unless it is of rows of this projection."""
        if self.projection != projection.fingerprint:
            raise IncompatibleStoreError(
                "precondition is of rows of another projection, whose columns are other numbers. "
                "Pass what this store's own store.preconditioner(...) returns."
            )


def preconditioner(store: StoredRows, checkpoint: str, *, damping: float) -> Preconditioner:
    """The damped inverse second moment of the stored rows, per parameter.

        A_b = (1/N sum_i x_ib x_ib^T + lambda_b I)^-1,   lambda_b = damping * (mean eigenvalue)

    Args:
        store: a complete store.
        checkpoint: whose rows.
        damping: relative to the mean eigenvalue of each block; LoGra uses 0.1.

    Raises:
        OptionError: a damping that is not positive, or has no digits beside the moments.

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
    roots = {name: _root(name, c / store.n_samples, damping) for name, c in moments.items()}
    return Preconditioner(roots, store.projection.fingerprint)


def _root(name: str, c: Tensor, damping: float) -> Tensor:
    """`L` with `(C + lambda I)^-1 = L L^T`, in float32."""
    scale, largest = c.diagonal().mean(), c.diagonal().max()
    one = torch.eye(len(c), dtype=c.dtype, device="cpu")
    if scale == 0:  # a parameter without gradient: any metric gives zero
        return one.float()
    by = damping * scale
    lower, failed = torch.linalg.cholesky_ex(c + by * one)
    root = torch.linalg.solve_triangular(lower, one, upper=False).mT.float()
    digits = by >= SURE * torch.finfo(torch.float32).eps * largest
    held = root.isfinite().all() and (root.diagonal() >= torch.finfo(torch.float32).tiny).all()
    if failed or not digits or not held:
        raise OptionError(
            f"damping={damping!r}: beside the second moments of {name!r}, of up to "
            f"{float(largest):.3g} a column, {float(by):.3g} has no digits left in float32. Use a "
            "damping nearer to 1; LoGra uses 0.1."
        )
    return root


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


def measured(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and their lengths `[rows, 1]`, both divided by the row's largest entry where squares
    would overflow or vanish. A zero row has length 1: similarity 0 with everything, not 0/0."""
    lengths = squares(x).sqrt()[:, None]
    far = ~((lengths > SHORT) & (lengths < LONG))
    if bool(far.any()):
        largest = x.abs().amax(1, keepdim=True)
        x = torch.where(far & (largest > 0), x / largest, x)
        lengths = squares(x).sqrt()[:, None]
    return x, lengths.masked_fill(lengths == 0, 1)


def unit(x: Tensor) -> Tensor:
    """Rows of length 1; zero rows stay zero."""
    x, lengths = measured(x)
    return x / lengths
