"""`explain`: what a quantity will cost, parameter by parameter, before it is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import check_flags, check_model_fn, one_of
from ghostfunc._base.processes.pieces import refuse_pieces
from ghostfunc._base.program import Program
from ghostfunc._base.reprs import preformatted
from ghostfunc._base.trees import batch_size
from ghostfunc._base.types import ModelFn, PyTree, Randomness
from ghostfunc._factors import cost
from ghostfunc._factors.cost import UseShape
from ghostfunc._factors.matmul import speed
from ghostfunc._taps.use_shapes import use_shapes
from ghostfunc._transforms.scores.one_run import reason_for_two_runs

PlannedQuantity: TypeAlias = Literal["dot_prod", "norm", "gram", "clipped_grad"]


@dataclass(frozen=True)
class PlanRow:
    """One parameter.

    Attributes:
        name, shape: of the parameter.
        uses: kind of factor and positions per sample of every place where samples meet it.
        representation: what is contracted with what.
        cost: operations; a pass over an element of memory counts as 32.
        materialized: the same, if every `g_i` were formed.
    """

    name: str
    shape: tuple[int, ...]
    uses: str
    representation: str
    cost: int
    materialized: int


@dataclass(frozen=True)
class Plan:
    """What `explain` returns. `print` it, or look at `rows`.

    Attributes:
        quantity: what is planned; `n` train and `m` validation samples (0 if there are none).
        rows: one per parameter.
        cost, materialized: operations, summed over the parameters.
        gradient_bytes: what n + m per-sample gradients would take in memory.
        two_runs: for "dot_prod", why train and validation samples take a run each; None if they
            share one.
    """

    quantity: str
    n: int
    m: int
    rows: tuple[PlanRow, ...]
    gradient_bytes: int
    two_runs: str | None = None

    @property
    def cost(self) -> int:
        """Operations of all contractions."""
        return sum(row.cost for row in self.rows)

    @property
    def materialized(self) -> int:
        """Operations if every `g_i` were formed."""
        return sum(row.materialized for row in self.rows)

    def __repr__(self) -> str:
        return (
            f"Plan({self.quantity!r}, n={self.n}, m={self.m}, cost={self.cost:.3g}, "
            f"{len(self.rows)} parameters)"
        )

    def _repr_html_(self) -> str:
        return preformatted(self)

    def __str__(self) -> str:
        table = [("parameter", "shape", "uses", "representation", "operations", "share")]
        for row in self.rows:
            share = row.cost / self.cost if self.cost else 0.0
            shape = "x".join(map(str, row.shape)) or "-"
            table.append(
                (row.name, shape, row.uses, row.representation, f"{row.cost:.2e}", f"{share:.1%}")
            )
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if i > 3 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            for cells in table
        ]
        rule = "-" * len(lines[0])
        ratio = self.materialized / self.cost if self.cost else 1.0
        samples = f"{self.n} samples" + (f" with {self.m} others" if self.m else "")
        return "\n".join(
            [
                f"{self.quantity} of {samples}",
                rule,
                lines[0],
                rule,
                *lines[1:],
                rule,
                f"contractions          {self.cost:.3e} operations",
                f"forming every g_i     {self.materialized:.3e} operations ({ratio:.1f} x)",
                f"                      {self.gradient_bytes:.3e} bytes",
                f"largest temporary     {cost.BLOCK_ELEMENTS:.3e} elements",
                *self._runs(),
            ]
        )

    def _runs(self) -> list[str]:
        if self.quantity != "dot_prod":
            return []
        if self.two_runs is None:
            return ["runs                  1: train and val share a forward and a backward pass"]
        return [f"runs                  2: {self.two_runs}"]


def explain(
    model_fn: ModelFn,
    params: PyTree,
    train: PyTree,
    val: PyTree | None = None,
    *,
    quantity: PlannedQuantity = "dot_prod",
    grads: bool = False,
    randomness: Randomness = "error",
) -> Plan:
    """The plan of a quantity: how each parameter's per-sample gradients will be contracted.

    The functions of `cost` that choose at run time are asked, with the shapes of these batches; the
    model is traced and run on two samples, and nothing is contracted. Costs are those of the
    contractions alone, without the model's own forward and backward pass.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses [n]`.
        params: pytree of floating-point tensors.
        train: pytree of tensors `[n, ...]`.
        val: pytree of tensors `[m, ...]`: for "dot_prod", and the other batch for "gram".
        quantity: "dot_prod" (`reduction="mean"`), "norm", "gram" or "clipped_grad".
        grads: for "dot_prod", whether the training gradient comes out of the same backward pass, as
            in `ghost_value_and_grad`.
        randomness: "error" or "different".

    Returns:
        A `Plan`, which prints as a table.

    Raises:
        OptionError: a quantity that does not exist, or "dot_prod" without `val`.
        GhostError: another of its children, as for `ghost_vjp`.
    """
    refuse_pieces(model_fn, "gf.explain")
    one_of("quantity", quantity, tuple(_PLANS))
    one_of("randomness", randomness, ("error", "different"))
    if quantity == "dot_prod" and val is None:
        raise OptionError('quantity="dot_prod" needs val, the batch to dot with.')
    if quantity in ("norm", "clipped_grad") and val is not None:
        raise OptionError(f"quantity={quantity!r} is about one batch; drop val.")
    check_model_fn(model_fn)
    check_flags(grads=grads)
    program = Program.of(model_fn, params, randomness)
    n, m = batch_size(train, "train"), 0 if val is None else batch_size(val, "val")
    _, ours = use_shapes(program, train, exact=True)
    theirs: list[list[UseShape]] = [[] for _ in program.leaves]
    if val is not None:
        _, theirs = use_shapes(program, val, exact=True)
    rows = []
    for name, leaf, mine, others in zip(
        program.spec.names, program.leaves, ours, theirs, strict=True
    ):
        uses = _ParamUses(mine, others, leaf.numel(), n, m, grads, speed(leaf))
        way, ops, formed = _PLANS[quantity](uses) if mine else ("unused", 0, 0)
        rows.append(PlanRow(name, tuple(leaf.shape), str(uses), way, ops, formed))
    size = sum(x.numel() * wide(x.new_zeros(())).element_size() for x in program.leaves)
    apart = None
    if quantity == "dot_prod":
        apart = reason_for_two_runs(program, train, val)
    return Plan(quantity, n, m, tuple(rows), (n + m) * size, apart)


@dataclass(frozen=True)
class _ParamUses:
    """One parameter's uses in both batches, and what is asked of them."""

    mine: Sequence[UseShape]
    theirs: Sequence[UseShape]
    size: int
    n: int
    m: int
    grads: bool
    speed: int

    def __str__(self) -> str:
        """`2 x Outer 256 + OneHot 256`: the places where samples meet the parameter."""
        names = [
            x.kind
            + (f" {x.positions}" if x.kind in ("Outer", "OneHot") else "")
            + ("" if x.direct else " (derived)")
            for x in self.mine
        ]
        counts = {name: names.count(name) for name in names}
        return " + ".join(k if c == 1 else f"{c} x {k}" for k, c in counts.items()) or "-"

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the parameter, as its factors see it."""
        found = (x.matrix for x in (*self.mine, *self.theirs) if x.factorable)
        return next(found, (1, self.size))


def _positions(batch: Sequence[UseShape]) -> cost.Positions:
    factored = [x for x in batch if x.factorable]
    outer = sum(x.positions for x in factored if x.kind == "Outer")
    one_hot = sum(x.positions for x in factored if x.kind == "OneHot")
    return cost.Positions(outer, one_hot, len(batch) - len(factored))


_Answer: TypeAlias = tuple[str, int, int]
"""Representation, its operations, and those of forming every gradient."""


def _way(choice: cost.Choice, t: cost.Positions, s: cost.Positions, *, kept: bool) -> str:
    named = {"tokens": f"{t.tokens} x {s.tokens} tokens", "rows": "rows of g"}
    way = named[choice.way] if t.tokens else "g itself"
    return way + ", kept" * kept


def _rows_ops(choice: cost.Choice) -> int:
    return choice.ops if choice.way == "rows" else choice.others["rows"]


def _plan_norm(q: _ParamUses) -> _Answer:
    t = _positions(q.mine)
    choice = cost.norm_choice(t, *q.matrix)
    way = _way(choice, t, t, kept=len(q.mine) > 1)
    return way, q.n * choice.ops, q.n * _rows_ops(choice)


def _plan_clipped_grad(q: _ParamUses) -> _Answer:
    way, norms, formed = _plan_norm(q)
    weighted = sum(cost.total_cost(x, q.speed) for x in q.mine)
    return way, norms + weighted, formed + cost.OPS_PER_ELEMENT * q.n * q.size


def _plan_gram(q: _ParamUses) -> _Answer:
    same = not q.theirs
    m, other = (q.n, q.mine) if same else (q.m, q.theirs)
    t, s = _positions(q.mine), _positions(other)
    choice = cost.gram_choice([(q.n, t)], [(m, s)], *q.matrix, same=same)
    return _way(choice, t, s, kept=len(q.mine) > 1 and same), choice.ops, _rows_ops(choice)


def _plan_dot_prod(q: _ParamUses) -> _Answer:
    t = _positions(q.mine)
    dense = [(1, cost.Positions(0, 0, 0))]
    formed = _rows_ops(cost.gram_choice([(q.n, t)], dense, *q.matrix, same=False))
    formed += sum(cost.total_cost(x, q.speed) for x in q.theirs)
    choice = cost.direction_choice(q.mine, q.theirs, grads=q.grads, speed=q.speed)
    if choice.way == "factored":
        return "u factored", choice.ops, formed
    dots = [cost.dot_choice(x, with_total=q.grads, speed=q.speed) for x in q.mine]
    beside = any(x.way == "beside the gradient" for x in dots)
    return "u dense" + ", beside the gradient" * beside, choice.ops, formed


_PLANS: dict[str, Callable[[_ParamUses], _Answer]] = {
    "dot_prod": _plan_dot_prod,
    "norm": _plan_norm,
    "gram": _plan_gram,
    "clipped_grad": _plan_clipped_grad,
}
