"""Curvature: directions `C u` and `(C + damping I)^-1 u`, for influence functions."""

from ghostfunc.curvature._ekfac import ekfac
from ghostfunc.curvature._errors import ConvergenceError, CurvatureError
from ghostfunc.curvature._likelihood import Likelihood, gaussian, softmax
from ghostfunc.curvature._operator import (
    EKFAC,
    BlockReport,
    CurvatureReport,
    Operator,
    load,
)

__all__ = [
    "EKFAC",
    "BlockReport",
    "ConvergenceError",
    "CurvatureError",
    "CurvatureReport",
    "Likelihood",
    "Operator",
    "ekfac",
    "gaussian",
    "load",
    "softmax",
]
