"""Influence functions: `<g_i, (C + damping I)^-1 q_j>`, dot products along another direction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias, runtime_checkable

import optree
import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base.batches import chunks, joined
from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import check_chunk_size, check_flags, check_model_fn, one_of
from ghostfunc._base.pieces import refuse_pieces
from ghostfunc._base.program import Program
from ghostfunc._base.trees import (
    ParamSpec,
    batch_size,
    flatten_like,
    flatten_params,
    yields_batches,
)
from ghostfunc._base.types import ModelFn, PyTree, Randomness
from ghostfunc._quantities.quantity import SampleGrad
from ghostfunc._taps.run import run
from ghostfunc._transforms.dot_prods import ghost_dot_prod
from ghostfunc.curvature._cg import CG
from ghostfunc.curvature._errors import check_count
from ghostfunc.curvature._matvecs import DataOperator
from ghostfunc.curvature._operator import EKFAC
from ghostfunc.curvature._series import Series

Stack: TypeAlias = list[Float[Tensor, "k ..."]]
"""Several directions, `[k, *shape]` per parameter."""


@runtime_checkable
class Solver(Protocol):
    """An inverse curvature: an `EKFAC`, a `CG`, a `Series`, or one of your own."""

    def solve(self, direction: PyTree, damping: float) -> PyTree: ...


def influence(
    model_fn: ModelFn,
    params: PyTree,
    train: PyTree,
    queries: PyTree,
    *,
    curvature: Solver | None,
    damping: float | None = None,
    relative: bool = False,
    query_fn: ModelFn | None = None,
    per_param: bool = False,
    per_position: bool = False,
    chunk_size: int | None = None,
    directions_at_once: int = 16,
    randomness: Randomness = "error",
) -> PyTree:
    """How much every train sample changes every query's loss.

        s_ij = <g_i, (C + damping I)^-1 q_j>,    g_i, q_j gradients of single losses

    **Sign and scale.** Let training minimise the mean of n losses, and C be its curvature. To first
    order, training without sample i changes the loss of query j by `+ s_ij / n`. A POSITIVE SCORE
    IS A SAMPLE THAT HELPS: without it, the query's loss rises. (Training on it once more changes
    the loss by `- s_ij / n`.) `gf.ghost_dot_prod` has the same sign.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses [n]`.
        params: pytree of floating-point tensors, those that the curvature was made at.
        train: n samples, a pytree of tensors `[n, ...]`; or a data loader, any iterable of such
            batches that is no pytree itself (a list is one). It is gone through several times.
        queries: m samples, likewise.
        curvature: what `gf.curvature.ekfac(...)`, `cg(...)`, `neumann(...)` or `lissa(...)` return,
            or anything with `solve(direction, damping)`. None: no curvature at all, `<g_i, q_j>`.
        damping: positive; None for `curvature=None`.
        relative: of an `EKFAC`, multiply the damping by each parameter's mean eigenvalue.
        query_fn: what the queries' losses are, if not `model_fn`; of the same params.
        per_param: contributions of every parameter: a pytree like `params` of `[n, m]`, which sum
            to the score.
        per_position: contributions of every position of the train samples, `[n, m, T]`, which sum
            to the score; see `ghost_dot_prod`. Both may be given.
        chunk_size: the most samples to run at one time, of either side.
        directions_at_once: how many directions, each as large as the parameters, exist at one time.
            The train samples are run once for every so many.
        randomness: "error" or "different".

    Returns:
        `[n, m]`, float32 or wider. C is symmetric, so it is applied to whichever side has fewer
        samples: to the queries if `per_position` is given or one side is a loader.

    Raises:
        CurvatureError: the curvature was made at other params.
        OptionError: a damping that is not positive, or options that contradict each other.
        GhostError: another of its children, as for `ghost_vjp`.

    Reference:
        Koh and Liang, "Understanding Black-box Predictions via Influence Functions", ICML 2017.
        Grosse et al., "Studying Large Language Model Generalization with Influence Functions",
        2023.
    """
    check_model_fn(model_fn)
    if query_fn is not None:
        check_model_fn(query_fn, "query_fn")
    refuse_pieces(model_fn, "gf.influence")
    check_count("directions_at_once", directions_at_once)
    check_chunk_size(chunk_size)
    check_flags(relative=relative, per_param=per_param, per_position=per_position)
    one_of("randomness", randomness, ("error", "different"))
    leaves, spec = flatten_params(params)
    solve = _solver(curvature, params, spec, damping, relative)
    fns, sides = (model_fn, query_fn or model_fn), (train, queries)
    fewer = 0 if not per_position and _fewer(train, queries) else 1
    program = Program(fns[fewer], leaves, spec, randomness)
    most = min(directions_at_once, chunk_size or directions_at_once)
    columns: list[list[Tensor]] = []
    for chunk in _parts(sides[fewer], most, ("train", "queries")[fewer]):
        grads = run(program, chunk, [SampleGrad()])
        us = solve([x.detach() for x in grads.values[0]])
        named = {
            f"direction {j}": spec.unflatten([u[j] for u in us]) for j in range(batch_size(chunk))
        }
        rows: list[list[Tensor]] = []
        for others in _parts(sides[1 - fewer], chunk_size, ("train", "queries")[1 - fewer]):
            scores = ghost_dot_prod(
                fns[1 - fewer],
                params,
                others,
                direction=named,
                per_param=per_param,
                per_position=per_position,
                randomness=randomness,
            )
            leaves_of = [optree.tree_leaves(scores[name]) for name in named]
            rows.append([torch.stack(x, 1) for x in zip(*leaves_of, strict=True)])
        columns.append(joined(rows))
    parts = joined(columns, axis=1)
    if fewer == 0:
        parts = [x.mT for x in parts]
    return spec.unflatten(parts) if per_param else parts[0]


def _solver(
    curvature: Solver | None, params: PyTree, spec: ParamSpec, damping: float | None, relative: bool
) -> Callable[[Stack], Stack]:
    """The inverse curvature of several directions."""
    if relative and not isinstance(curvature, EKFAC):
        raise OptionError("relative=True is for an EKFAC, whose eigenvalues are known.")
    if curvature is None:
        if damping is not None:
            raise OptionError(
                f"damping={damping!r} with curvature=None: there is nothing to damp. Leave it out, "
                "or pass a curvature."
            )
        return lambda us: us
    if damping is None:
        raise OptionError("a curvature needs a damping, a positive number.")
    if isinstance(curvature, EKFAC):
        curvature.check(params)
        return lambda us: curvature.solve_each(us, damping, relative=relative)
    if isinstance(curvature, (CG, Series)) and isinstance(curvature.operator, DataOperator):
        curvature.operator.check(params)

    _check_solver(curvature)

    def one_by_one(us: Stack) -> Stack:
        found = [
            flatten_like(
                curvature.solve(spec.unflatten([wide(u[j]) for u in us]), damping),
                [u[j] for u in us],
                spec,
                "what curvature.solve returned",
            )
            for j in range(len(us[0]))
        ]
        return [torch.stack(x) for x in zip(*found, strict=True)]

    return one_by_one


def _check_solver(curvature: object) -> None:
    """Raise `OptionError` unless it solves."""
    if isinstance(curvature, Tensor) or not isinstance(curvature, Solver):
        raise OptionError(
            f"curvature is a {type(curvature).__name__}; expected what gf.curvature.ekfac, cg, "
            "neumann or lissa return, anything with solve(direction, damping), or None."
        )


def _fewer(train: PyTree, queries: PyTree) -> bool:
    if yields_batches(train) or yields_batches(queries):
        return False
    return batch_size(train, "train") < batch_size(queries, "queries")


def _parts(side: Any, most: int | None, what: str) -> Iterator[PyTree]:
    """Its samples, at most so many at one time."""
    if isinstance(side, Iterator):
        raise OptionError(
            f"{what} is a {type(side).__name__}, which can be gone through once. Pass a batch, or "
            "the data loader itself."
        )
    for batch in side if yields_batches(side) else [side]:
        for _, chunk in chunks(batch, most, what):
            yield chunk
