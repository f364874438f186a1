"""Influence functions: `<g_i, (C + damping I)^-1 q_j>`, dot products along another direction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import optree
import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base.batches import chunks, joined
from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import BatchError, OptionError, PositionAxisError
from ghostfunc._base.fingerprint import fingerprint
from ghostfunc._base.options import check_chunk_size, check_flags, check_model_fn, one_of
from ghostfunc._base.processes.pieces import refuse_pieces
from ghostfunc._base.program import Program
from ghostfunc._base.torch_private import unrounded
from ghostfunc._base.trees import (
    ParamSpec,
    batch_size,
    flatten_like,
    flatten_params,
    tensors_of,
    yields_batches,
)
from ghostfunc._base.types import ModelFn, PyTree, Randomness
from ghostfunc._factors import contract
from ghostfunc._factors.matmul import inner_products
from ghostfunc._quantities.quantity import SampleGrad
from ghostfunc._taps.run import run
from ghostfunc._transforms.dot_prods import ghost_dot_prod
from ghostfunc.curvature._cg import CG
from ghostfunc.curvature._errors import check_count
from ghostfunc.curvature._matvecs import DataOperator
from ghostfunc.curvature._operator import EKFAC
from ghostfunc.curvature._plan import MOST, InfluencePlan, Side, Way, count
from ghostfunc.curvature._rows import EigenRows
from ghostfunc.curvature._series import Series
from ghostfunc.projection import ghost_project

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
    way: Way = "cheaper",
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
            batches that is no pytree itself (a list is one). It is gone through several times, in
            the same order each: no shuffling.
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
        way: of an `EKFAC`: "directions" (a query's gradient is solved, and is a direction for dot
            products), "rows" (`EKFAC.rows` of both sides, whose inner products are the scores), or
            "cheaper", the one with fewer operations; `influence_plan` counts them. Both are exact.
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
    check_flags(relative=relative, per_param=per_param, per_position=per_position)
    asked = _asked(
        model_fn, params, train, queries, curvature, query_fn, chunk_size, directions_at_once,
        way, randomness, per_position,
    )  # fmt: skip
    solve = _solver(curvature, params, asked.spec, damping, relative)
    if asked.plan().way == "rows":
        assert isinstance(curvature, EKFAC)
        assert damping is not None
        parts = _by_rows(asked, curvature.rows(damping, relative=relative))
    else:
        parts = _by_directions(asked, solve, per_param=per_param, per_position=per_position)
    if asked.fewer == 0:
        parts = [x.mT for x in parts]
    if per_param:
        return asked.spec.unflatten(parts)
    return parts[0] if len(parts) == 1 else contract.add_up(parts)


def influence_plan(
    model_fn: ModelFn,
    params: PyTree,
    train: PyTree,
    queries: PyTree,
    *,
    curvature: Solver | None,
    query_fn: ModelFn | None = None,
    per_position: bool = False,
    chunk_size: int | None = None,
    directions_at_once: int = 16,
    way: Way = "cheaper",
    randomness: Randomness = "error",
) -> InfluencePlan:
    """Which way `influence` takes with these arguments, and the operations of both.

        directions:  (n ceil(m / d) + m) runs,  m solutions,  n m dot products along a direction
        rows:        (n + m) runs,  n + m rotations,          n m inner products of rows

    Counted are products with parameters and passes over memory, from shapes alone; the attention
    between positions is not.

    Args:
        model_fn, params, train, queries, curvature: as for `influence`, as is all else; d is
            `directions_at_once`, or `chunk_size` where that is less.

    Returns:
        `InfluencePlan`: `way`, `why`, `directions` and `rows`. It prints.

    Raises:
        OptionError: rows of what is no `EKFAC`, or of single positions.
    """
    return _asked(
        model_fn, params, train, queries, curvature, query_fn, chunk_size, directions_at_once,
        way, randomness, per_position,
    ).plan()  # fmt: skip


@dataclass(frozen=True)
class _Asked:
    """What was asked for, validated.

    Attributes:
        programs, sides: of train samples and of queries.
        fewer: the side that the curvature is applied to.
        most: directions that exist at one time.
    """

    programs: Sequence[Program]
    sides: tuple[PyTree, PyTree]
    params: PyTree
    curvature: Solver | None
    fewer: int
    chunk_size: int | None
    most: int
    way: Way
    per_position: bool

    @property
    def spec(self) -> ParamSpec:
        return self.programs[0].spec

    def parts(self, side: int, most: int | None) -> Iterator[PyTree]:
        return _parts(self.sides[side], most, ("train", "queries")[side])

    def plan(self) -> InfluencePlan:
        """The way to take."""
        loaders = [yields_batches(x) for x in self.sides]
        n, m = (0 if x else batch_size(s) for s, x in zip(self.sides, loaders, strict=True))
        size = sum(x.numel() for x in self.programs[0].leaves)
        few = (n, m)[self.fewer]
        directions, rows = self.most * size, few * size
        if self.way == "rows":
            return InfluencePlan("rows", "as asked", n, m, None, None, rows)
        if self.way == "directions":
            return InfluencePlan("directions", "as asked", n, m, None, None, directions)
        why = ""
        if not isinstance(self.curvature, EKFAC):
            why = "the only way without an EKFAC"
        elif self.per_position:
            why = "the only way to single positions"
        elif any(loaders):
            why = "since a loader's samples are not counted"
        elif rows > MOST:
            why = f"since the rows of {few} samples would be more than {MOST} elements"
        if why or not isinstance(self.curvature, EKFAC):
            return InfluencePlan("directions", why, n, m, None, None, directions)
        both = [Side.of(*side) for side in zip(self.programs, self.sides, strict=True)]
        ops = count(self.curvature, both[self.fewer], both[1 - self.fewer], self.most)
        if ops[1] < ops[0]:
            return InfluencePlan("rows", "with fewer operations", n, m, *ops, rows)
        return InfluencePlan("directions", "with fewer operations", n, m, *ops, directions)


def _asked(
    model_fn: ModelFn,
    params: PyTree,
    train: PyTree,
    queries: PyTree,
    curvature: Solver | None,
    query_fn: ModelFn | None,
    chunk_size: int | None,
    directions_at_once: int,
    way: Way,
    randomness: Randomness,
    per_position: bool,
) -> _Asked:
    check_model_fn(model_fn)
    if query_fn is not None:
        check_model_fn(query_fn, "query_fn")
    refuse_pieces(model_fn, "gf.influence")
    check_count("directions_at_once", directions_at_once)
    check_chunk_size(chunk_size)
    one_of("randomness", randomness, ("error", "different"))
    one_of("way", way, ("cheaper", "directions", "rows"))
    if way == "rows" and not isinstance(curvature, EKFAC):
        raise OptionError(
            'way="rows" is for an EKFAC, whose eigenbasis is known. Leave it out, or pass '
            "curvature=gf.curvature.ekfac(...)."
        )
    if way == "rows" and per_position:
        raise OptionError(
            'way="rows" with per_position=True: rows are of whole samples. Leave it out.'
        )
    leaves, spec = flatten_params(params)
    if isinstance(curvature, EKFAC):
        curvature.check(params, model_fn)
    fewer = 0 if not per_position and _fewer(train, queries) else 1
    programs = [Program(f, leaves, spec, randomness) for f in (model_fn, query_fn or model_fn)]
    return _Asked(
        programs, (train, queries), params, curvature, fewer, chunk_size,
        min(directions_at_once, chunk_size or directions_at_once), way, per_position,
    )  # fmt: skip


def _by_directions(
    asked: _Asked, solve: Callable[[Stack], Stack], *, per_param: bool, per_position: bool
) -> list[Tensor]:
    """`[other, fewer]`, of every parameter or in all: a few directions at a time."""
    fewer, other = asked.programs[asked.fewer], asked.programs[1 - asked.fewer]
    columns: list[list[Tensor]] = []
    order = Order(asked.sides[1 - asked.fewer])
    for chunk in asked.parts(asked.fewer, asked.most):
        grads = run(fewer, chunk, [SampleGrad()])
        us = solve([x.detach() for x in grads.values[0]])
        named = {
            f"direction {j}": fewer.spec.unflatten([u[j] for u in us])
            for j in range(batch_size(chunk))
        }
        rows: list[list[Tensor]] = []
        for others in order.kept(asked.parts(1 - asked.fewer, asked.chunk_size)):
            scores = ghost_dot_prod(
                other.model_fn,
                asked.params,
                others,
                direction=named,
                per_param=per_param,
                per_position=per_position,
                randomness=other.randomness,
            )
            leaves_of = [optree.tree_leaves(scores[name]) for name in named]
            rows.append([torch.stack(x, 1) for x in zip(*leaves_of, strict=True)])
            _check_lengths(rows[0], rows[-1])
        columns.append(joined(rows))
    return joined(columns, axis=1)


def _check_lengths(first: Sequence[Tensor], last: Sequence[Tensor]) -> None:
    """Raise `PositionAxisError` unless all batches of a loader have as many positions."""
    if any(x.shape[2:] != y.shape[2:] for x, y in zip(first, last, strict=True)):
        raise PositionAxisError(
            f"per_position=True: batches of train have {first[0].shape[2]} positions, and "
            f"{last[0].shape[2]}. Pad all of them to one length, or call gf.influence for each."
        )


class Order:
    """The order of a loader's batches, which has to be the same in every pass over them: what
    several passes found is put side by side."""

    def __init__(self, side: PyTree) -> None:
        self._is_loader, self._seen = yields_batches(side), list[str]()

    def kept(self, parts: Iterator[PyTree]) -> Iterator[PyTree]:
        """The parts; `OptionError` for one that is not what it was in the first pass."""
        before = len(self._seen)
        for number, part in enumerate(parts):
            if self._is_loader:
                tensors = tensors_of(part)
                self._seen.append(fingerprint([str(i) for i in range(len(tensors))], tensors))
                if before and (
                    number >= before or self._seen[before + number] != self._seen[number]
                ):
                    raise OptionError(
                        "the loader's batches hold other samples, or come in another order, in its "
                        "second pass: scores of different samples would stand in one row. Switch "
                        "shuffling and augmentation off (DataLoader(shuffle=False))."
                    )
            yield part
        del self._seen[before or len(self._seen) :]


ROWS = 1 << 24
"""Elements of the rows of the other side that exist at one time."""


def _by_rows(asked: _Asked, rows: EigenRows) -> list[Tensor]:
    """`[other, fewer]` of every parameter: inner products of rows."""
    fewer, most = asked.fewer, max(1, ROWS // rows.k)
    places = list(rows.groups.values())

    def of(side: int, chunk: PyTree) -> Tensor:
        program = asked.programs[side]
        return ghost_project(
            program.model_fn, asked.params, chunk, rows, randomness=program.randomness
        )

    most = min(most, asked.chunk_size or most)
    held = torch.cat([of(fewer, chunk) for chunk in asked.parts(fewer, most)])
    each = []
    for chunk in asked.parts(1 - fewer, most):
        found = of(1 - fewer, chunk)
        with unrounded(found):
            each.append([inner_products(found[:, at], held[:, at]) for at in places])
    return joined(each)


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
    batches = side if yields_batches(side) else [side]
    batch = None
    for batch in batches:
        for _, chunk in chunks(batch, most, what):
            yield chunk
    if batch is None:
        raise BatchError(f"{what} is a {type(side).__name__} without any batch.")
