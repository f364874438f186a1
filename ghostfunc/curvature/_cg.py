"""Conjugate gradients: `(C + damping I) x = u` by products with C alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import OptionError
from ghostfunc._base.losses import refuse_not_finite
from ghostfunc._base.trees import ParamSpec, flatten_params
from ghostfunc._base.types import PyTree
from ghostfunc.curvature._errors import ConvergenceError, check_count, check_damping
from ghostfunc.curvature._operator import EKFAC, Operator

Vector: TypeAlias = list[Tensor]
Apply: TypeAlias = Callable[[Vector], Vector]


class Solution(NamedTuple):
    """What an iterative solver found.

    Attributes:
        direction: `x`, a pytree like the right-hand side.
        residuals: `||u - (C + damping I) x|| / ||u||` at the start and after each iteration.
    """

    direction: PyTree
    residuals: tuple[float, ...]


def check_tolerance(tolerance: object) -> float:
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise OptionError(f"tolerance must be a number; got {type(tolerance).__name__}.")
    if not 0 < tolerance < 1:
        raise OptionError(
            f"tolerance={tolerance!r} must lie between 0 and 1: it is the largest residual "
            "relative to the right-hand side."
        )
    return float(tolerance)


class CG:
    """A solver; made by `cg`. `solve` gives the direction, `solution` its residuals besides."""

    def __init__(
        self,
        operator: Operator,
        preconditioner: EKFAC | None,
        tolerance: float,
        max_iterations: int,
    ) -> None:
        if not isinstance(operator, Operator):
            raise OptionError(
                "operator: cg takes an operator such as gf.curvature.ggn(...); got "
                f"{type(operator).__name__}."
            )
        if preconditioner is not None and not isinstance(preconditioner, EKFAC):
            raise OptionError(
                "preconditioner must be what gf.curvature.ekfac returns, or None; got "
                f"{type(preconditioner).__name__}."
            )
        check_count("max_iterations", max_iterations)
        self.operator, self.preconditioner = operator, preconditioner
        self.tolerance, self.max_iterations = check_tolerance(tolerance), max_iterations

    def solve(self, direction: PyTree, damping: float) -> PyTree:
        """`(C + damping I)^-1 u`, a pytree like `direction`, float32 or wider.

        Raises:
            ConvergenceError: the tolerance was not reached, or C + damping I is not positive.
            OptionError: the damping is not positive.
        """
        return self.solution(direction, damping).direction

    def solution(self, direction: PyTree, damping: float) -> Solution:
        """`solve`, with the history of residuals."""
        damping = check_damping(damping)
        leaves, spec = flatten_params(direction, "direction")
        refuse_not_finite(leaves, spec, "direction")
        u = [wide(x.detach()) for x in leaves]

        def product(x: Vector) -> Vector:
            made = flatten_params(self.operator.matvec(spec.unflatten(x)))[0]
            return [a + damping * b for a, b in zip(made, x, strict=True)]

        x, residuals = self._iterate(u, product, self._preconditioned(spec, damping))
        return Solution(spec.unflatten(x), tuple(residuals))

    def _preconditioned(self, spec: ParamSpec, damping: float) -> Apply:
        made = self.preconditioner
        if made is None:
            return lambda r: r
        return lambda r: flatten_params(made.solve_about(spec.unflatten(r), damping))[0]

    def _iterate(
        self, u: Vector, product: Apply, preconditioned: Apply
    ) -> tuple[Vector, list[float]]:
        x = [torch.zeros_like(a) for a in u]
        length = norm(u)
        if length == 0:
            return x, [0.0]
        r, residuals = u, [1.0]
        p, rho, exact = r, 0.0, True
        for _ in range(self.max_iterations):
            z = preconditioned(r)
            before, rho = rho, dot(r, z)
            # Directions start anew where the residual was measured instead of updated.
            p = z if exact else added(z, p, rho / before)
            q = product(p)
            curved = dot(p, q)
            if not math.isfinite(curved):
                raise ConvergenceError(
                    "C p is not finite: losses or gradients overflow. Run the model in a wider "
                    f"dtype, or scale the direction. {_history(residuals)}",
                    residuals,
                )
            if not (curved > 0 and rho > 0):
                raise ConvergenceError(
                    "(C + damping I) is not positive: along a direction p, <p, (C + damping I) p> "
                    f"is {curved:.3g}. A Hessian away from a minimum is not; use "
                    f"gf.curvature.ggn, or a larger damping. {_history(residuals)}",
                    residuals,
                )
            x, r, exact = added(x, p, rho / curved), added(r, q, -rho / curved), False
            residuals.append(norm(r) / length)
            if residuals[-1] <= self.tolerance:
                # What was updated drifts from what is: measured once, at the end.
                r, exact = added(u, product(x), -1.0), True
                residuals[-1] = norm(r) / length
                if residuals[-1] <= self.tolerance:
                    return x, residuals
        raise ConvergenceError(
            f"cg did not reach tolerance={self.tolerance:g} in {self.max_iterations} iterations. "
            f"{_history(residuals)} Raise max_iterations or the damping, or pass "
            "preconditioner=gf.curvature.ekfac(...).",
            residuals,
        )


def cg(
    operator: Operator,
    *,
    preconditioner: EKFAC | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
) -> CG:
    """Solve `(C + damping I) x = u` by preconditioned conjugate gradients.

    Args:
        operator: C, such as `gf.curvature.ggn(...)` or `gf.curvature.hessian(...)`.
        preconditioner: an `EKFAC`, whose own solution every iteration starts from. It changes how
            fast the iteration converges, and nothing else.
        tolerance: the largest residual `||u - (C + damping I) x|| / ||u||`.
        max_iterations: products with C, at most; not to have converged by then is an error.

    Returns:
        A `CG`: `solve(direction, damping)`, and `solution(direction, damping)` with the history of
        residuals. Influence functions take it as their `curvature`.

    Raises:
        OptionError: an option that does not exist.
    """
    return CG(operator, preconditioner, tolerance, max_iterations)


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))


def norm(a: Sequence[Tensor]) -> float:
    return math.sqrt(dot(a, a))


def added(a: Sequence[Tensor], b: Sequence[Tensor], c: float) -> Vector:
    """`a + c b`."""
    return [x + c * y for x, y in zip(a, b, strict=True)]


def _history(residuals: Sequence[float]) -> str:
    shown = ", ".join(f"{x:.2g}" for x in residuals[-5:])
    return f"The last residuals are {shown}."
