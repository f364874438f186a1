"""`verify`: ghost numbers beside materialized ones, parameter by parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ghostfunc._base.definition import vmap_runs
from ghostfunc._base.errors import SampleAxisError, VerificationError
from ghostfunc._base.options import check_flags, check_model_fn, check_not_negative, check_vectorize
from ghostfunc._base.processes.pieces import refuse_pieces
from ghostfunc._base.program import Program
from ghostfunc._base.reprs import preformatted
from ghostfunc._base.trees import flatten_params
from ghostfunc._base.types import Check, ContractDtype, Mode, ModelFn, PyTree, Randomness
from ghostfunc._taps import rounding
from ghostfunc._transforms.dot_prods import ghost_dot_prod


@dataclass(frozen=True)
class Row:
    """One parameter: the norms over samples of both results, and how far they are apart.

    Attributes:
        error: the relative error, as `verify` defines it.
        noise: what rounding accounts for; 0 unless the error was above the tolerance without it.
    """

    name: str
    shape: tuple[int, ...]
    ghost: float
    materialized: float
    error: float
    noise: float = 0.0


@dataclass(frozen=True)
class Report:
    """What `verify` found. `print` it, look at `rows`, or call `check`.

    Attributes:
        rows: one per parameter.
        total: the row of the whole model.
        unused: parameters the losses do not depend on; their scores are zero.
        tolerance: the largest relative error that passes.
        contract_dtype: what ghost mode rounded the operands of matrix products to.
        vectorized: whether the materialized gradients were made by vmap; if not, by a loop over
            samples.
        refused: the error that `ghost_dot_prod` raises in place of these numbers, if it does. They
            are then numbers that no call returns.
    """

    rows: tuple[Row, ...]
    total: Row
    unused: tuple[str, ...]
    tolerance: float
    contract_dtype: ContractDtype = None
    vectorized: bool = True
    refused: str = ""

    @property
    def max_error(self) -> float:
        """The largest relative error of any parameter or the total."""
        return max(row.error for row in (*self.rows, self.total))

    @property
    def ok(self) -> bool:
        """Whether every relative error is within the tolerance."""
        return all(row.error <= self.tolerance for row in (*self.rows, self.total))

    def check(self) -> None:
        """Raise `VerificationError` unless `ok`."""
        if not self.ok:
            worst = [r.name for r in (*self.rows, self.total) if not r.error <= self.tolerance]
            raise VerificationError(
                f"Ghost and materialized dot products differ by more than {self.tolerance:.1e} for "
                f"{', '.join(worst)}.\n{self}"
            )

    def __repr__(self) -> str:
        found = "ok" if self.ok else "NOT OK"
        return (
            f"Report({found}, max_error={self.max_error:.1e}, tolerance={self.tolerance:.1e}, "
            f"{len(self.rows)} parameters)"
        )

    def _repr_html_(self) -> str:
        return preformatted(self)

    def __str__(self) -> str:
        width = max(len(r.name) for r in (*self.rows, self.total))
        head = f"{'parameter':<{width}}  {'shape':>14}  {'ghost':>12}  {'materialized':>12}"
        head += "  rel. error"
        lines = [head, "-" * len(head)]
        for row in (*self.rows, self.total):
            shape = "x".join(map(str, row.shape)) or "-"
            flag = "" if row.error <= self.tolerance else "  FAIL"
            lines.append(
                f"{row.name:<{width}}  {shape:>14}  {row.ghost:>12.5e}  {row.materialized:>12.5e}  "
                f"{row.error:>10.1e}{flag}"
            )
        if self.unused:
            lines.append(f"unused (the losses do not depend on them): {', '.join(self.unused)}")
        if self.contract_dtype is None:
            verdict = "exact to" if self.ok else "NOT EXACT to"
        else:
            within = "within" if self.ok else "NOT WITHIN"
            verdict = f"contractions in {self.contract_dtype}: {within}"
        lines.append(f"{verdict} a tolerance of {self.tolerance:.1e}")
        lines.append(f"materialized by {'vmap' if self.vectorized else 'a loop over samples'}")
        if self.refused:
            lines.append(f"ghost_dot_prod refuses these numbers: {self.refused}")
        return "\n".join(lines)


def verify(
    model_fn: ModelFn,
    params: PyTree,
    train: PyTree,
    val: PyTree,
    *,
    tolerance: float | None = None,
    vectorize: bool | None = None,
    contract_dtype: ContractDtype = None,
    randomness: Randomness = "error",
    check: bool = False,
) -> Report:
    """Compute the dot products in ghost and in materialized mode, and compare.

        error_p = max(0, max_i |ghost_i - materialized_i| - noise_p)
                  / max(max_i |materialized_i|, eps * scale)

    per parameter p; `scale` is the largest total score and `eps` the resolution of the parameters'
    dtype or of `contract_dtype`, whichever is coarser, so that parameters whose true score is zero
    (key biases of attention) are not compared noise to noise. `noise_p` is zero unless a parameter
    fails the default tolerance without it. It is then 100 times as much as the materialized scores
    move where parameters move by two units in their last place, and at most the square root of the
    tolerance, of the largest score: where terms cancel, scores have no more digits.

    Args:
        model_fn, params, train, val: as in `ghost_dot_prod`. Materialized gradients are as large as
            n + m models: verify with a few samples.
        tolerance: largest relative error that passes; by default 1e-10 for float64 parameters, 1e-4
            for float32, 5e-2 for less and for a `contract_dtype`.
        vectorize: True for vmap, False for a loop over samples. None takes vmap where it runs the
            model on both batches, and the loop elsewhere; the report says which it was.
        contract_dtype: as in `ghost_dot_prod`, for ghost mode alone: the errors are what it costs.
        randomness: "error"; a random model cannot be compared with itself.
        check: raise `VerificationError` at once if the comparison fails.

    Returns:
        A `Report`, which prints as a table.
    """
    check_model_fn(model_fn)
    check_flags(check=check)
    check_vectorize(vectorize)
    if tolerance is not None:
        check_not_negative("tolerance", tolerance)
    refuse_pieces(model_fn, "gf.verify")
    program = Program.of(model_fn, params)
    leaves, spec = program.leaves, program.spec

    def scores(
        mode: Mode,
        contract_dtype: ContractDtype,
        vectorize: bool | None = None,
        proof: Check = "new",
        at: PyTree = params,
    ) -> list[Tensor]:
        dots = ghost_dot_prod(
            model_fn,
            at,
            train,
            val,
            mode=mode,
            per_param=True,
            vectorize=vectorize,
            contract_dtype=contract_dtype,
            check=proof,
            randomness=randomness,
        )
        return flatten_params(dots)[0]

    # Ghost mode goes first: it proves that the model is one that has per-sample gradients.
    ghost, refused = _refused_too(partial(scores, "ghost", contract_dtype))
    if vectorize is None:
        vectorize = all(vmap_runs(program, batch) for batch in (train, val))
    exact = scores("materialized", None, vectorize)
    eps = _resolution(leaves, contract_dtype)
    limit = _usual_tolerance(eps) if tolerance is None else tolerance
    rows = _rows(program, ghost, exact, eps)
    if tolerance is None and any(not row.error <= limit for row in rows):
        unit = 2 * _resolution(leaves, None)
        moved = [rounding.moved(leaves, unit, k) for k in range(rounding.MOVES)]
        others = [scores("materialized", None, vectorize, at=spec.unflatten(x)) for x in moved]
        rows = _rows(program, ghost, exact, eps, limit, others)
    unused = _unused(spec.names, ghost, exact)
    found = tuple(rows[:-1]), rows[-1], unused
    report = Report(*found, limit, contract_dtype, vectorize, refused)
    if check:
        report.check()
    return report


def _refused_too(scores: Callable[..., list[Tensor]]) -> tuple[list[Tensor], str]:
    """Scores, and the error that a call raises in their place: they are compared all the same."""
    try:
        return scores(), ""
    except SampleAxisError as error:
        return scores(proof="never"), str(error)


def _resolution(leaves: Sequence[Tensor], contract_dtype: ContractDtype) -> float:
    """That of the coarsest dtype."""
    dtypes = [x.dtype for x in leaves] + ([contract_dtype] if contract_dtype else [])
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _unused(
    names: Sequence[str], ghost: Sequence[Tensor], exact: Sequence[Tensor]
) -> tuple[str, ...]:
    """The parameters that no loss depends on."""
    found = zip(names, ghost, exact, strict=True)
    return tuple(name for name, g, e in found if not bool(g.any()) and not bool(e.any()))


def _usual_tolerance(eps: float) -> float:
    """For float64, float32, and half precision."""
    return 1e-10 if eps < 1e-12 else 1e-4 if eps < 1e-5 else 5e-2


def _rows(
    program: Program,
    ghost: Sequence[Tensor],
    exact: Sequence[Tensor],
    eps: float,
    limit: float = 0.0,
    others: Sequence[Sequence[Tensor]] = (),
) -> list[Row]:
    """The row of every parameter, and last that of the whole model. Those above a limit are held
    against how far other materialized scores, of moved parameters, are from these."""
    names = [*program.spec.names, "total"]
    shapes = [*(tuple(x.shape) for x in program.leaves), ()]
    ghost, exact, *moved = ([*x, torch.stack(list(x)).sum(0)] for x in (ghost, exact, *others))
    floor = eps * float(exact[-1].nan_to_num(0, 0, 0).abs().max())
    found = []
    for i, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        row = _row(name, shape, ghost[i], exact[i], floor)
        if moved and not row.error <= limit:
            noise = rounding.MARGIN * max(_difference(exact[i], x[i]) for x in moved)
            if math.isfinite(noise):
                noise = min(noise, limit**0.5 * _scale(ghost[i], exact[i], floor))
                row = _row(name, shape, ghost[i], exact[i], floor, noise)
        found.append(row)
    return found


def _row(
    name: str,
    shape: tuple[int, ...],
    ghost: Tensor,
    exact: Tensor,
    floor: float,
    noise: float = 0.0,
) -> Row:
    scale, difference = _scale(ghost, exact, floor), _difference(ghost, exact)
    beyond = difference if math.isnan(difference) else max(0.0, difference - noise)
    error = 0.0 if beyond == 0 else beyond / scale if scale else float("inf")
    return Row(name, shape, float(ghost.norm()), float(exact.norm()), error, noise)


def _scale(ghost: Tensor, exact: Tensor, floor: float) -> float:
    """What an error is relative to."""
    both_nan = ghost.isnan() & exact.isnan()
    return max(float(exact.masked_fill(both_nan, 0).abs().max()), floor)


def _difference(ghost: Tensor, exact: Tensor) -> float:
    """The largest; NaN where only one of both is."""
    both_nan = ghost.isnan() & exact.isnan()
    return float((ghost - exact).masked_fill(both_nan, 0).abs().max())
