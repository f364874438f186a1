"""`verify`: ghost numbers beside materialized ones, parameter by parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from ghostfunc._transforms.dot_prods import ghost_dot_prod


@dataclass(frozen=True)
class Row:
    """One parameter: the norms over samples of both results, and how far they are apart."""

    name: str
    shape: tuple[int, ...]
    ghost: float
    materialized: float
    error: float


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
    """

    rows: tuple[Row, ...]
    total: Row
    unused: tuple[str, ...]
    tolerance: float
    contract_dtype: ContractDtype = None
    vectorized: bool = True

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

        error_p = max_i |ghost_i - materialized_i| / max(max_i |materialized_i|, eps * scale)

    per parameter p; `scale` is the largest total score and `eps` the resolution of the parameters'
    dtype or of `contract_dtype`, whichever is coarser, so that parameters whose true score is zero
    (key biases of attention) are not compared noise to noise.

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
    ) -> list[Tensor]:
        dots = ghost_dot_prod(
            model_fn,
            params,
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
    try:
        ghost = scores("ghost", contract_dtype)
    except SampleAxisError:  # what a call refuses to return is compared all the same
        ghost = scores("ghost", contract_dtype, proof="never")
    if vectorize is None:
        vectorize = all(vmap_runs(program, batch) for batch in (train, val))
    exact = scores("materialized", None, vectorize)
    ghost_total, exact_total = torch.stack(ghost).sum(0), torch.stack(exact).sum(0)
    eps = _resolution(leaves, contract_dtype)
    floor = eps * float(exact_total.nan_to_num(0, 0, 0).abs().max())
    rows = tuple(
        _row(name, tuple(leaf.shape), g, e, floor)
        for name, leaf, g, e in zip(spec.names, leaves, ghost, exact, strict=True)
    )
    total = _row("total", (), ghost_total, exact_total, floor)
    limit = _usual_tolerance(eps) if tolerance is None else tolerance
    unused = _unused(spec.names, ghost, exact)
    report = Report(rows, total, unused, limit, contract_dtype, vectorize)
    if check:
        report.check()
    return report


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


def _row(name: str, shape: tuple[int, ...], ghost: Tensor, exact: Tensor, floor: float) -> Row:
    both_nan = ghost.isnan() & exact.isnan()
    scale = max(float(exact.masked_fill(both_nan, 0).abs().max()), floor)
    difference = float((ghost - exact).masked_fill(both_nan, 0).abs().max())
    error = 0.0 if difference == 0 else difference / scale if scale else float("inf")
    return Row(name, shape, float(ghost.norm()), float(exact.norm()), error)
