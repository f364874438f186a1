"""Scores and steps on many processes.

    step = gf.ghost_value_and_grad(model_fn, params, train, val, group=dist.group.WORLD)
    gf.accumulate_grads(module, step.grads)
    scores = gf.distributed.gather(step.dot_prods, dist.group.WORLD)

Every rank has samples of its own. `group=` averages the validation gradient and the training
gradient over the samples of all ranks; scores stay where their samples are until they are gathered.
"""

from ghostfunc._base.errors import RankError
from ghostfunc.distributed._ddp import gather

__all__ = ["RankError", "gather"]
