"""The blocks of a curvature: one parameter each, seen as a few matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from ghostfunc._base.errors import OptionError
from ghostfunc.curvature._errors import CurvatureError


class Form(NamedTuple):
    """The factor of one use of a parameter: its type, and the shape of the gradient it makes."""

    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """One parameter in a curvature: its gradient as `groups` matrices of `rows` x `columns`.

    Attributes:
        path: the parameter's name.
        shape: its shape.
        kind: "matrix" (eigenbases of sums over positions), "vector" (of the gradient's own second
            moment), "unused" (the losses do not depend on it) or "identity" (asked for by name).
        groups, rows, columns: the matrices; several for grouped and batched products.
        left, right: whether the rows' side and the columns' side have an eigenbasis. A side without
            one keeps its own axes.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    groups: int
    rows: int
    columns: int
    left: bool
    right: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.groups, self.rows, self.columns


@dataclass(frozen=True)
class Limits:
    """What becomes of sides that are large; see `ekfac`."""

    max_side: int
    max_dense: int
    diagonal: tuple[str, ...]
    identity: tuple[str, ...]


def patterns(option: str, given: object, names: Sequence[str]) -> tuple[str, ...]:
    """Glob patterns of parameters, each of which matches one."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise OptionError(
            f'{option}={given!r} must be a list of patterns such as ["*.wte.weight"].'
        )
    for pattern in given:
        if not isinstance(pattern, str) or not any(fnmatchcase(x, pattern) for x in names):
            raise OptionError(
                f"{option}: the pattern {pattern!r} matches no parameter. The parameters are: "
                f"{', '.join(names)}."
            )
    return tuple(given)


def matches(path: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(path, glob) for glob in globs)


def block_of(path: str, shape: tuple[int, ...], forms: Sequence[Form], limits: Limits) -> Block:
    """How one parameter is seen, given the factors of its uses."""
    size = math.prod(shape)
    if matches(path, limits.identity):
        return Block(path, shape, "identity", 1, 1, size, False, False)
    if not forms:
        return Block(path, shape, "unused", 1, 1, size, False, False)
    if len(shape) < 2:
        return Block(path, shape, "vector", 1, 1, size, False, 1 < size <= limits.max_dense)
    groups, rows, columns = _matrices(shape, forms)
    looked_up = any(kind == "OneHot" and x == (rows, columns) for kind, x in forms)
    left, right = rows > 1 and not looked_up, columns > 1
    for has_basis, side in ((left, rows), (right, columns)):
        if has_basis and side > limits.max_side and not matches(path, limits.diagonal):
            raise CurvatureError(
                f"parameter {path!r}, seen as {rows} x {columns}, has a side of {side}, more than "
                f"max_side={limits.max_side}: its eigenbasis would be a {side} x {side} matrix. "
                f'Raise max_side; pass diagonal=["{path}"], and sides that large keep their own '
                f'axes; or pass identity=["{path}"].'
            )
    left, right = left and rows <= limits.max_side, right and columns <= limits.max_side
    return Block(path, shape, "matrix", groups, rows, columns, left, right)


def _matrices(shape: tuple[int, ...], forms: Sequence[Form]) -> tuple[int, int, int]:
    """The matrices that the first factored use sees; for dense uses `[first, rest]`."""
    size = math.prod(shape)
    for kind, seen in forms:
        if kind != "Dense" and math.prod(seen) == size:
            return (seen[0], seen[1], seen[2]) if len(seen) == 3 else (1, seen[0], seen[1])
    return 1, shape[0], math.prod(shape[1:])
