"""The public names, by room. `__init__.py` imports them when the first is asked for."""

from ghostfunc import (
    curvature as curvature,
    data as data,
    distributed as distributed,
    hf as hf,
    projection as projection,
    select as select,
    shapley as shapley,
    testing as testing,
    unrolled as unrolled,
)
from ghostfunc._base.documents import Documents as Documents
from ghostfunc._base.errors import (
    BatchError as BatchError,
    ControlFlowError as ControlFlowError,
    CoupledSamplesError as CoupledSamplesError,
    GhostError as GhostError,
    InPlaceError as InPlaceError,
    LossShapeError as LossShapeError,
    NonFiniteLossError as NonFiniteLossError,
    OptionError as OptionError,
    ParamsError as ParamsError,
    PositionAxisError as PositionAxisError,
    RandomnessError as RandomnessError,
    RankError as RankError,
    SampleAxisError as SampleAxisError,
    TransformError as TransformError,
    UnsupportedOpError as UnsupportedOpError,
    UntrackedUseError as UntrackedUseError,
    VerificationError as VerificationError,
)
from ghostfunc._base.evaluating import evaluating as evaluating
from ghostfunc._base.module import accumulate_grads as accumulate_grads, from_module as from_module
from ghostfunc._base.segments import documents as documents
from ghostfunc._factors.contract import materialize as materialize
from ghostfunc._factors.factor import (
    Dense as Dense,
    Grouped as Grouped,
    OneHot as OneHot,
    Outer as Outer,
)
from ghostfunc._quantities.quantity import (
    Dot as Dot,
    Gram as Gram,
    Quantity as Quantity,
    SampleGrad as SampleGrad,
    Spread as Spread,
    SqNorm as SqNorm,
)
from ghostfunc._rules.registry import register_rule as register_rule
from ghostfunc._taps.remat.remat import remat as remat
from ghostfunc._transforms.clipping import (
    ClippedGrad as ClippedGrad,
    ghost_clipped_grad as ghost_clipped_grad,
)
from ghostfunc._transforms.dot_prods import (
    GhostStep as GhostStep,
    ghost_cosine as ghost_cosine,
    ghost_dot_prod as ghost_dot_prod,
    ghost_value_and_grad as ghost_value_and_grad,
)
from ghostfunc._transforms.explain import Plan as Plan, explain as explain
from ghostfunc._transforms.factored import (
    FactoredGrads as FactoredGrads,
    factored_grads as factored_grads,
)
from ghostfunc._transforms.grads import direction as direction, per_sample_grads as per_sample_grads
from ghostfunc._transforms.gram import ghost_gram as ghost_gram
from ghostfunc._transforms.health import (
    Health as Health,
    HealthStep as HealthStep,
    ghost_health as ghost_health,
    health as health,
)
from ghostfunc._transforms.norms import ghost_norm as ghost_norm
from ghostfunc._transforms.verify import Report as Report, verify as verify
from ghostfunc._transforms.vjp import GhostVjp as GhostVjp, ghost_vjp as ghost_vjp
from ghostfunc.curvature import influence as influence
from ghostfunc.data import Scores as Scores, score_dataset as score_dataset
from ghostfunc.projection import (
    Project as Project,
    Projection as Projection,
    ghost_project as ghost_project,
    kronecker_projection as kronecker_projection,
)

__version__: str
