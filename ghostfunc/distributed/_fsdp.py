"""Sharded modules: the whole of what every rank has a piece of."""

from __future__ import annotations

from ghostfunc._base.options import check_model_fn
from ghostfunc._base.processes.pieces import gathered, of_all_ranks, together, whole_likes
from ghostfunc._base.program import Program
from ghostfunc._base.trees import flatten_like, flatten_params
from ghostfunc._base.types import ModelFn, PyTree


def whole_shapes(model_fn: ModelFn, params: PyTree) -> PyTree:
    """Zeros of the shapes of the whole parameters, where `params` are this rank's pieces.

    They take no memory, and nothing communicates. What is made of names and shapes takes them:

        projection = gf.kronecker_projection(whole_shapes(model_fn, params), ...)
        gf.ghost_project(model_fn, params, batch, projection)        # of whole gradients, [n, k]

    Args:
        model_fn, params: as `gf.from_module` returns them, of a module that `fully_shard` has
            sharded. Of another, `params` come back as they are.

    Returns:
        A pytree like `params`.

    Raises:
        ParamsError: `params` is not a pytree of floating-point tensors.
    """
    check_model_fn(model_fn)
    program = Program.of(model_fn, params)
    return program.spec.unflatten(list(whole_likes(program)))


@of_all_ranks("gf.distributed.whole")
def whole(model_fn: ModelFn, params: PyTree, pieces: PyTree) -> PyTree:
    """The whole tensors like the parameters, of all ranks' pieces: of a direction, of gradients.

        whole(model_fn, params, u)[name] = [u_1; ...; u_R]           u_r the piece of rank r

    All ranks have to call it, and every rank gets all of it: as large as the model.

    Args:
        model_fn, params: as `gf.from_module` returns them, of a module that `fully_shard` has
            sharded.
        pieces: a pytree like `params`: what `gf.direction` returns, or `GhostStep.grads`. Of a
            module that is not sharded they come back as they are.

    Returns:
        A pytree like `params`, of the whole parameters' shapes.

    Raises:
        ParamsError: `pieces` is not like `params`.
        RankError: another rank failed, is gone, or is at another place of the program.
    """
    check_model_fn(model_fn)
    leaves, spec = flatten_params(params)
    with together(model_fn, "making tensors whole"):
        given = flatten_like(pieces, leaves, spec, "pieces")
        return spec.unflatten(list(gathered(model_fn, given, spec)))
