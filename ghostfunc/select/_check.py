"""What scores and counts have to be."""

from __future__ import annotations

from torch import Tensor

from ghostfunc._errors import OptionError


def check_scores(name: str, scores: object) -> int:
    """The number of scores, if they are a vector of finite numbers."""
    if not isinstance(scores, Tensor) or scores.ndim != 1 or not scores.is_floating_point():
        found = (
            f"{tuple(scores.shape)} of {scores.dtype}"
            if isinstance(scores, Tensor)
            else type(scores).__name__
        )
        raise OptionError(f"{name} must be a floating-point tensor of shape [n]; got {found}.")
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise OptionError(f"{name} must be finite; they are not for samples {bad[:5]}.")
    return len(scores)


def check_count(k: int, n: int) -> None:
    """Raise `OptionError` unless k of n can be chosen."""
    if not 1 <= k <= n:
        raise OptionError(f"k={k}: choose between 1 and all {n} samples.")


def check_positive(name: str, value: float) -> None:
    """Raise `OptionError` unless `value` is a positive number."""
    if not 0 < value < float("inf"):
        raise OptionError(f"{name}={value!r} must be a positive number.")
