"""Curvature: directions `C u` and `(C + damping I)^-1 u`, for influence functions."""

from ghostfunc.curvature._cg import CG, Solution, cg
from ghostfunc.curvature._ekfac import ekfac
from ghostfunc.curvature._errors import ConvergenceError, CurvatureError
from ghostfunc.curvature._influence import Solver, influence, influence_plan
from ghostfunc.curvature._likelihood import Likelihood, gaussian, softmax
from ghostfunc.curvature._matvecs import DataOperator, ggn, hessian
from ghostfunc.curvature._operator import (
    EKFAC,
    BlockReport,
    CurvatureReport,
    Operator,
    load,
)
from ghostfunc.curvature._plan import InfluencePlan
from ghostfunc.curvature._rows import EigenRows
from ghostfunc.curvature._series import Series, lissa, neumann

__all__ = [
    "CG",
    "EKFAC",
    "BlockReport",
    "ConvergenceError",
    "CurvatureError",
    "CurvatureReport",
    "DataOperator",
    "EigenRows",
    "InfluencePlan",
    "Likelihood",
    "Operator",
    "Series",
    "Solution",
    "Solver",
    "cg",
    "ekfac",
    "gaussian",
    "ggn",
    "hessian",
    "influence",
    "influence_plan",
    "lissa",
    "load",
    "neumann",
    "softmax",
]
