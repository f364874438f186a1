"""In-run data Shapley: what every training sample changed the validation loss by.

state = gf.shapley.init()
for ids, batch in loader:
    out = gf.shapley.step(model_fn, params, batch, {"val": val}, optimizer=gf.shapley.sgd(lr=lr))
    state = gf.shapley.update(state, ids, out.values)
    ...                                               # out.grads to the optimizer
scores = gf.shapley.finalize(state)                   # negative: the sample lowered the loss
"""

from ghostfunc.shapley._from_torch import from_optimizer
from ghostfunc.shapley._optimizers import Optimizer, adam, adamw, clipped, sgd
from ghostfunc.shapley._state import Scores, finalize, init, merge, update
from ghostfunc.shapley._step import ShapleyStep, directions, step

__all__ = [
    "Optimizer",
    "Scores",
    "ShapleyStep",
    "adam",
    "adamw",
    "clipped",
    "directions",
    "finalize",
    "from_optimizer",
    "init",
    "merge",
    "sgd",
    "step",
    "update",
]
