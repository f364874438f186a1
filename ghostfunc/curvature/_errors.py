"""Errors of curvature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ghostfunc._base.errors import GhostError, OptionError


class CurvatureError(GhostError, RuntimeError):
    """A curvature does not fit the parameters, the file, or the data it is used with."""


class ConvergenceError(GhostError, ArithmeticError):
    """An iterative solution did not reach its tolerance.

    Attributes:
        residuals: `||u - A x|| / ||u||` after each iteration.
    """

    def __init__(self, message: str, residuals: Sequence[float]) -> None:
        super().__init__(message)
        self.residuals = tuple(residuals)


def check_batches(batches: object) -> None:
    """Raise `OptionError` for what cannot be gone through, batch by batch."""
    if isinstance(batches, (str, bytes, Mapping, Tensor)) or not isinstance(batches, Iterable):
        raise OptionError(
            f"batches is a {type(batches).__name__}; expected a list of batches or a data loader. "
            "Of a single batch make a list: [batch]."
        )


def check_count(name: str, value: object) -> None:
    """Raise `OptionError` unless `value` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name}={value!r} must be a positive integer.")


def check_damping(damping: object) -> float:
    """`damping`, if it is a positive, finite number."""
    if isinstance(damping, bool) or not isinstance(damping, (int, float)):
        raise OptionError(f"damping must be a number; got {type(damping).__name__}.")
    if not 0 < damping < float("inf"):
        raise OptionError(
            f"damping={damping!r} must be positive and finite: the curvature alone has no inverse "
            "along directions that no sample has."
        )
    return float(damping)
