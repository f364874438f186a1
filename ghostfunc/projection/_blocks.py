"""Which parameters a projection covers, to how many numbers each, and in which columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ghostfunc._base.errors import OptionError


@dataclass(frozen=True)
class Block:
    """One parameter in a projection.

    Attributes:
        path: the parameter's name.
        shape: its shape.
        n_o, n_i: the matrix it is seen as: `[p, d]` as it is, a convolution as `[out, rest]`, a
            vector as `[1, size]`.
        k_o, k_i: the size of its projection `P_o g P_i^T`. A side that is not reduced (`k == n`)
            is kept as it is: its P is the identity.
        start: first of its columns; they hold `P_o g P_i^T` row by row.
    """

    path: str
    shape: tuple[int, ...]
    n_o: int
    n_i: int
    k_o: int
    k_i: int
    start: int

    @property
    def k(self) -> int:
        """Number of its columns."""
        return self.k_o * self.k_i

    @property
    def columns(self) -> slice:
        """Its columns."""
        return slice(self.start, self.start + self.k)

    def sides(self) -> tuple[tuple[str, int, int], ...]:
        """`(name, n, k)` of both sides, what `P_o` and `P_i` map from and to."""
        return ("o", self.n_o, self.k_o), ("i", self.n_i, self.k_i)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The matrix a parameter is seen as."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def ranks(n_o: int, n_i: int, rank_total: int, rank_min: int) -> tuple[int, int]:
    """`(k_o, k_i)` with `k_o k_i <= rank_total`.

    Projecting one position costs `n_o k_o + n_i k_i`, least at `k_i = sqrt(rank_total n_o / n_i)`;
    neither side goes below `rank_min` or above its own size, and what one side cannot use the
    other one gets.
    """
    least_o, least_i = min(rank_min, n_o), min(rank_min, n_i)
    best = round(math.sqrt(rank_total * n_o / n_i))
    k_i = max(least_i, min(best, n_i, rank_total // least_o))
    k_o = min(n_o, rank_total // k_i)
    return k_o, min(n_i, rank_total // k_o)


def select(paths: Sequence[str], layers: Iterable[str] | None) -> list[str]:
    """The paths that match one of the glob patterns `layers`; all for None."""
    if layers is None:
        return list(paths)
    layers = _patterns(layers)
    for pattern in layers:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise OptionError(
                f"layers: the pattern {pattern!r} matches no parameter. The parameters are: "
                f"{', '.join(paths)}."
            )
    return [path for path in paths if any(fnmatchcase(path, pattern) for pattern in layers)]


def _patterns(layers: object) -> list[str]:
    """`layers`, if they are patterns, at least one."""
    several = isinstance(layers, Iterable) and not isinstance(layers, str)
    patterns = list(layers) if several else []  # type: ignore[call-overload]
    if not patterns or not all(isinstance(x, str) for x in patterns):
        raise OptionError(
            f"layers={layers!r} is not a list of patterns. Use None for all parameters, or glob "
            'patterns such as ["*.attn.*.weight", "wte.weight"].'
        )
    return patterns
