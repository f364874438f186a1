"""Ghost quantities of per-sample gradients, in one backward pass.

import ghostfunc as gf

model_fn, params = gf.from_module(module, loss)       # loss(module, batch) -> [n]
scores = gf.ghost_dot_prod(model_fn, params, train, val)
"""

from ghostfunc import (
    curvature,
    data,
    distributed,
    hf,
    projection,
    select,
    shapley,
    testing,
    unrolled,
)
from ghostfunc._base.errors import (
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
    RankError,
    SampleAxisError,
    TransformError,
    UnsupportedOpError,
    UntrackedUseError,
    VerificationError,
)
from ghostfunc._base.module import accumulate_grads, from_module
from ghostfunc._factors.contract import materialize
from ghostfunc._factors.factor import Dense, Grouped, OneHot, Outer
from ghostfunc._quantities.quantity import Dot, Gram, Quantity, SampleGrad, SqNorm
from ghostfunc._rules.registry import register_rule
from ghostfunc._taps.remat.remat import remat
from ghostfunc._transforms.clipping import ClippedGrad, ghost_clipped_grad
from ghostfunc._transforms.dot_prods import (
    GhostStep,
    ghost_cosine,
    ghost_dot_prod,
    ghost_value_and_grad,
)
from ghostfunc._transforms.explain import Plan, explain
from ghostfunc._transforms.factored import FactoredGrads, factored_grads
from ghostfunc._transforms.grads import direction, per_sample_grads
from ghostfunc._transforms.gram import ghost_gram
from ghostfunc._transforms.norms import ghost_norm
from ghostfunc._transforms.verify import Report, verify
from ghostfunc._transforms.vjp import GhostVjp, ghost_vjp
from ghostfunc.curvature import influence
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
    "Grouped",
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
    "RankError",
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
    "curvature",
    "data",
    "direction",
    "distributed",
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
    "influence",
    "kronecker_projection",
    "materialize",
    "per_sample_grads",
    "projection",
    "register_rule",
    "remat",
    "score_dataset",
    "select",
    "shapley",
    "testing",
    "unrolled",
    "verify",
]
