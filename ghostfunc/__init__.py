"""Ghost quantities of per-sample gradients, in one backward pass.

import ghostfunc as gf

model_fn, params = gf.from_module(module, loss)       # loss(module, batch) -> [n]
scores = gf.ghost_dot_prod(model_fn, params, train, val)
"""

from ghostfunc import data, hf, projection, select, shapley, testing
from ghostfunc._book import FactoredGrads, factored_grads
from ghostfunc._clipping import ClippedGrad, ghost_clipped_grad
from ghostfunc._errors import (
    BatchError,
    ControlFlowError,
    CoupledSamplesError,
    GhostError,
    InPlaceError,
    LossShapeError,
    NonFiniteLossError,
    OptionError,
    ParamsError,
    PositionAxisError,
    RandomnessError,
    SampleAxisError,
    TransformError,
    UnsupportedOpError,
    UntrackedUseError,
    VerificationError,
)
from ghostfunc._explain import Plan, explain
from ghostfunc._factors import Dense, OneHot, Outer
from ghostfunc._module import accumulate_grads, from_module
from ghostfunc._pairwise import ghost_cosine, ghost_gram, ghost_norm
from ghostfunc._quantities import Dot, Gram, Quantity, SampleGrad, SqNorm
from ghostfunc._remat import remat
from ghostfunc._rules import register_rule
from ghostfunc._transforms import (
    direction,
    ghost_dot_prod,
    ghost_value_and_grad,
    per_sample_grads,
)
from ghostfunc._types import GhostStep
from ghostfunc._verify import Report, verify
from ghostfunc._vjp import GhostVjp, ghost_vjp
from ghostfunc.data import Scores, score_dataset
from ghostfunc.projection import Project, Projection, ghost_project, kronecker_projection

__version__ = "0.1.0"

__all__ = [
    "BatchError",
    "ClippedGrad",
    "ControlFlowError",
    "CoupledSamplesError",
    "Dense",
    "Dot",
    "FactoredGrads",
    "GhostError",
    "GhostStep",
    "GhostVjp",
    "Gram",
    "InPlaceError",
    "LossShapeError",
    "NonFiniteLossError",
    "OneHot",
    "OptionError",
    "Outer",
    "ParamsError",
    "Plan",
    "PositionAxisError",
    "Project",
    "Projection",
    "Quantity",
    "RandomnessError",
    "Report",
    "SampleAxisError",
    "SampleGrad",
    "Scores",
    "SqNorm",
    "TransformError",
    "UnsupportedOpError",
    "UntrackedUseError",
    "VerificationError",
    "accumulate_grads",
    "data",
    "direction",
    "explain",
    "factored_grads",
    "from_module",
    "ghost_clipped_grad",
    "ghost_cosine",
    "ghost_dot_prod",
    "ghost_gram",
    "ghost_norm",
    "ghost_project",
    "ghost_value_and_grad",
    "ghost_vjp",
    "hf",
    "kronecker_projection",
    "per_sample_grads",
    "projection",
    "register_rule",
    "remat",
    "score_dataset",
    "select",
    "shapley",
    "testing",
    "verify",
]
