"""Ghost quantities of per-sample gradients, in one backward pass.

import ghostfunc as gf

model_fn, params = gf.from_module(module, loss)       # loss(module, batch) -> [n]
scores = gf.ghost_dot_prod(model_fn, params, train, val)
"""

from ghostfunc import hf
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
    RandomnessError,
    SampleAxisError,
    TransformError,
    UnsupportedOpError,
    UntrackedUseError,
    VerificationError,
)
from ghostfunc._factors import Dense, OneHot, Outer
from ghostfunc._module import from_module
from ghostfunc._quantities import Dot, Quantity, SampleGrad
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

__version__ = "0.1.0"

__all__ = [
    "BatchError",
    "ControlFlowError",
    "CoupledSamplesError",
    "Dense",
    "Dot",
    "GhostError",
    "GhostStep",
    "GhostVjp",
    "InPlaceError",
    "LossShapeError",
    "NonFiniteLossError",
    "OneHot",
    "OptionError",
    "Outer",
    "ParamsError",
    "Quantity",
    "RandomnessError",
    "Report",
    "SampleAxisError",
    "SampleGrad",
    "TransformError",
    "UnsupportedOpError",
    "UntrackedUseError",
    "VerificationError",
    "direction",
    "from_module",
    "ghost_dot_prod",
    "ghost_value_and_grad",
    "ghost_vjp",
    "hf",
    "per_sample_grads",
    "register_rule",
    "verify",
]
