"""Neumann series: `(C + damping I)^-1 u` as a sum of powers of C."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import OptionError
from ghostfunc._base.losses import refuse_not_finite
from ghostfunc._base.trees import flatten_params
from ghostfunc._base.types import PyTree
from ghostfunc.curvature._cg import Solution, Vector, added, check_tolerance, norm
from ghostfunc.curvature._errors import ConvergenceError, check_count, check_damping
from ghostfunc.curvature._matvecs import DataOperator
from ghostfunc.curvature._operator import Operator


class Series:
    """A solver; made by `neumann` or `lissa`."""

    def __init__(
        self,
        operator: Operator,
        scale: float,
        iterations: int,
        tolerance: float,
        repeats: int,
        seed: int | None,
    ) -> None:
        if not isinstance(operator, Operator):
            raise OptionError(
                f"operator must be such as gf.curvature.ggn(...); got {type(operator).__name__}."
            )
        check_scale(scale)
        check_count("iterations", iterations)
        check_count("repeats", repeats)
        self.operator, self.scale, self.iterations = operator, float(scale), iterations
        self.tolerance, self.repeats, self.seed = check_tolerance(tolerance), repeats, seed

    def solve(self, direction: PyTree, damping: float) -> PyTree:
        """`(C + damping I)^-1 u`, a pytree like `direction`, float32 or wider.

        Raises:
            ConvergenceError: the residual after all iterations exceeds the tolerance.
            OptionError: the damping is not positive.
        """
        return self.solution(direction, damping).direction

    def solution(self, direction: PyTree, damping: float) -> Solution:
        """`solve`, with the residuals: of every iteration of a Neumann series, of the result of
        LiSSA alone."""
        damping = check_damping(damping)
        leaves, spec = flatten_params(direction, "direction")
        refuse_not_finite(leaves, spec, "direction")
        u = [wide(x.detach()) for x in leaves]
        length = norm(u)
        if length == 0:
            return Solution(spec.unflatten([torch.zeros_like(x) for x in u]), (0.0,))

        def residual(x: Vector, batch: PyTree | None = None) -> Vector:
            """`u - (C + damping I) x`, C of one batch or of all."""
            tree = spec.unflatten(x)
            if batch is None:
                made = self.operator.matvec(tree)
            else:
                assert isinstance(self.operator, DataOperator)
                made = self.operator.matvec_of(batch, tree)
            leaves = flatten_params(made)[0]
            return [a - b - damping * c for a, b, c in zip(u, leaves, x, strict=True)]

        history = [1.0]
        if self.seed is None:
            x, r = [torch.zeros_like(a) for a in u], u
            for _ in range(self.iterations):
                x = added(x, r, self.scale)
                r = residual(x)
                history.append(norm(r) / length)
                if history[-1] <= self.tolerance or not math.isfinite(history[-1]):
                    break
        else:
            x = self._sampled(u, residual, self.seed)
            history.append(norm(residual(x)) / length)
        if not history[-1] <= self.tolerance:
            largest = 2 / self.scale
            raise ConvergenceError(
                f"the series did not reach tolerance={self.tolerance:g} in {self.iterations} "
                f"iterations: its residual is {history[-1]:.3g}. It converges where all "
                f"eigenvalues of C + damping I lie below 2 / scale = {largest:.3g}, the faster the "
                "larger scale is. Change scale, or use gf.curvature.cg.",
                history,
            )
        return Solution(spec.unflatten(x), tuple(history))

    def _sampled(self, u: Vector, residual: Callable[..., Vector], seed: int) -> Vector:
        assert isinstance(self.operator, DataOperator)
        batches = list(self.operator.batches)
        generator = torch.Generator().manual_seed(seed)
        total: list[Tensor] = [torch.zeros_like(a) for a in u]
        for _ in range(self.repeats):
            x = [torch.zeros_like(a) for a in u]
            for _ in range(self.iterations):
                chosen = int(
                    torch.randint(len(batches), (), generator=generator, device=generator.device)
                )
                x = added(x, residual(x, batches[chosen]), self.scale)
            total = added(total, x, 1 / self.repeats)
        return total


def check_scale(scale: object) -> None:
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not number or not scale > 0 or not math.isfinite(scale):  # type: ignore[operator, arg-type]
        raise OptionError(f"scale={scale!r} must be a positive, finite number.")


def neumann(
    operator: Operator, *, scale: float, iterations: int = 1000, tolerance: float = 1e-3
) -> Series:
    """Solve `(C + damping I) x = u` by a Neumann series.

        x_(k+1) = x_k + scale (u - (C + damping I) x_k),    x_0 = 0

    Args:
        operator: C, such as `gf.curvature.ggn(...)`.
        scale: below 2 / (largest eigenvalue of C + damping I), or the series diverges.
        iterations: at most.
        tolerance: the largest residual relative to `u`, where it stops; above it, it is an error.

    Returns:
        A solver: `solve(direction, damping)`, and `solution(...)` with the history of residuals.
    """
    return Series(operator, scale, iterations, tolerance, 1, None)


def lissa(
    operator: DataOperator,
    *,
    scale: float,
    iterations: int,
    repeats: int = 1,
    seed: int = 0,
    tolerance: float = 0.5,
) -> Series:
    """Solve `(C + damping I) x = u` by a series with C of one random batch in every iteration.

        x_(k+1) = x_k + scale (u - (C_k + damping I) x_k),    x_0 = 0,    averaged over `repeats`

    Args:
        operator: `gf.curvature.ggn(...)` or `gf.curvature.hessian(...)`.
        scale: below 2 / (largest eigenvalue of any C_k + damping I).
        iterations: of every repeat.
        repeats: independent runs, which are averaged.
        seed: of the order of batches.
        tolerance: the largest residual of the result, measured on all batches once; above it, it is
            an error. An average over batches is noisy: `cg` is exact.

    Returns:
        A solver: `solve(direction, damping)`, and `solution(...)` with the residual.

    Reference:
        Agarwal et al., "Second-Order Stochastic Optimization for Machine Learning in Linear Time",
        JMLR 2017.
    """
    if not isinstance(operator, DataOperator):
        raise OptionError(
            "operator: lissa draws batches, so it takes gf.curvature.ggn(...) or "
            f"gf.curvature.hessian(...); got {type(operator).__name__}."
        )
    if type(seed) is not int:
        raise OptionError(f"seed={seed!r} must be an integer.")
    return Series(operator, scale, iterations, tolerance, repeats, seed)
