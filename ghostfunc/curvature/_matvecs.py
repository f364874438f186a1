"""Exact products with the Hessian or the generalised Gauss-Newton matrix of a data set."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ghostfunc._base.batches import chunks
from ghostfunc._base.definition import ReverseModeConstants
from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import OptionError, TransformError
from ghostfunc._base.locks import FORWARD_MODE
from ghostfunc._base.losses import refuse_not_finite
from ghostfunc._base.options import check_chunk_size, check_model_fn, one_of
from ghostfunc._base.processes.pieces import refuse_pieces
from ghostfunc._base.program import Program
from ghostfunc._base.torch_private import unrounded, versions
from ghostfunc._base.trees import ParamSpec, batch_size, flatten_like, flatten_params
from ghostfunc._base.types import ModelFn, PyTree
from ghostfunc.curvature._errors import CurvatureError, check_batches
from ghostfunc.curvature._fisher import Gradients
from ghostfunc.curvature._likelihood import Likelihood
from ghostfunc.curvature._operator import Operator
from ghostfunc.shapley._curvature import Hvp, grad_and_hvp

Leaves = Sequence[Tensor]


class DataOperator(Operator):
    """The mean of one operator per batch of a data set, each batch weighted by its samples.

    Attributes:
        batches: the data set.
    """

    def __init__(
        self, params: PyTree, batches: Iterable[PyTree], hvp: Hvp, chunk_size: int | None
    ) -> None:
        one_of("hvp", hvp, ("forward", "reverse"))
        check_chunk_size(chunk_size)
        check_batches(batches)
        if isinstance(batches, Iterator):
            raise OptionError(
                f"batches is a {type(batches).__name__}, which can be gone through once; products "
                "go through it every time. Pass a list, or the data loader itself."
            )
        leaves, self._spec = flatten_params(params)
        self._leaves = [x.detach() for x in leaves]
        self._versions = versions(self._leaves)
        self.batches, self._hvp, self._chunk_size = batches, hvp, chunk_size
        self._looked_at = False
        if next(iter(batches), None) is None:
            raise OptionError("batches is empty: a curvature needs at least one batch.")

    def _look_at(self, chunk: PyTree) -> None:
        """Raise for data that the operator cannot be that of; the first product looks at all."""

    @abstractmethod
    def _product(self, chunk: PyTree, u: Leaves) -> list[Tensor]:
        """The mean over a chunk of batch, times `u`."""

    def check(self, params: PyTree) -> None:
        """Raise `CurvatureError` unless `params` are those of the operator."""
        self._check_unchanged()
        leaves, spec = flatten_params(params)
        pairs = zip(leaves, self._leaves, strict=False)
        if spec != self._spec or not all(x.shape == y.shape for x, y in pairs):
            raise CurvatureError(
                f"the curvature is one of other parameters: {', '.join(self._spec.names)}."
            )
        if not all(torch.equal(x, y) for x, y in zip(leaves, self._leaves, strict=True)):
            raise CurvatureError(
                "the curvature was made at other values of these parameters: a curvature belongs "
                "to one checkpoint. Make it again at this one."
            )

    def _check_unchanged(self) -> None:
        """Raise `CurvatureError` where its parameters were written to, by an optimizer's step."""
        now = versions(self._leaves)
        if now != self._versions:
            names = zip(self._spec.names, self._versions, now, strict=True)
            first = next(name for name, before, after in names if before != after)
            raise CurvatureError(
                f"parameter {first!r} was written to since the curvature was made: a curvature "
                "belongs to one checkpoint. Make it again at this one, or make it of a copy of the "
                "parameters."
            )

    def matvec(self, direction: PyTree) -> PyTree:
        """`C u`, C the mean over the data set; float32 or wider."""
        return self._over(self.batches, direction)

    def matvec_of(self, batch: PyTree, direction: PyTree) -> PyTree:
        """`C u`, C the mean over one batch."""
        return self._over([batch], direction)

    def _over(self, batches: Iterable[PyTree], direction: PyTree) -> PyTree:
        self._check_unchanged()
        looked_at = self._looked_at or batches is not self.batches
        us = flatten_like(direction, self._leaves, self._spec, "direction")
        refuse_not_finite(us, self._spec, "direction")
        us = [u.detach().to(x.dtype) for u, x in zip(us, self._leaves, strict=True)]
        sums, samples = [torch.zeros_like(wide(x)) for x in self._leaves], 0
        for batch in batches:
            for _, chunk in chunks(batch, self._chunk_size):
                n = batch_size(chunk)
                if not looked_at:
                    self._look_at(chunk)
                for out, x in zip(sums, self._product(chunk, us), strict=True):
                    out.add_(x, alpha=n)
                samples += n
        self._looked_at |= batches is self.batches
        return self._spec.unflatten([x / samples for x in sums])


class _Hessian(DataOperator):
    """Made by `hessian`."""

    def __init__(
        self,
        model_fn: ModelFn,
        params: PyTree,
        batches: Iterable[PyTree],
        hvp: Hvp,
        chunk_size: int | None,
    ) -> None:
        super().__init__(params, batches, hvp, chunk_size)
        self._model_fn = model_fn

    def _product(self, chunk: PyTree, u: Leaves) -> list[Tensor]:
        program = Program(self._model_fn, self._leaves, self._spec, "error")
        return grad_and_hvp(program, chunk, u, self._hvp)[1]


class _GGN(DataOperator):
    """Made by `ggn`."""

    def __init__(
        self,
        params: PyTree,
        batches: Iterable[PyTree],
        gradients: Gradients,
        likelihood: Likelihood,
        hvp: Hvp,
        chunk_size: int | None,
    ) -> None:
        super().__init__(params, batches, hvp, chunk_size)
        self._gradients, self._likelihood = gradients, likelihood

    def _look_at(self, chunk: PyTree) -> None:
        self._gradients.check(self._spec.unflatten(self._leaves), chunk)

    def _product(self, chunk: PyTree, u: Leaves) -> list[Tensor]:
        z, tangent, pullback = linearized(
            self._likelihood.outputs, self._leaves, self._spec, chunk, u, self._hvp
        )
        cotangent = self._likelihood.hessian_product(z, chunk, tangent).to(z.dtype)
        return [x / len(z) for x in pullback(cotangent)]


def linearized(
    outputs: Callable[[PyTree, PyTree], Tensor],
    leaves: Leaves,
    spec: ParamSpec,
    batch: PyTree,
    u: Leaves,
    hvp: Hvp,
) -> tuple[Tensor, Tensor, Callable[[Tensor], list[Tensor]]]:
    """Outputs `z`, `J u`, and the pullback `c -> J^T c`."""

    def of_leaves(p: list[Tensor]) -> Tensor:
        return outputs(spec.unflatten(p), batch)

    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        z, pull = torch.func.vjp(of_leaves, list(leaves))[:2]
        if hvp == "reverse":
            with unrounded(z):
                twice = torch.func.vjp(lambda c: pull(c)[0], torch.zeros_like(z))[1]
                tangent = twice(list(u))[0]
        else:
            with _forward_mode(), FORWARD_MODE, ReverseModeConstants():
                tangent = torch.func.jvp(of_leaves, (list(leaves),), (list(u),))[1]

    def pullback(c: Tensor) -> list[Tensor]:
        with unrounded(z):
            out: Any = pull(c, retain_graph=False, create_graph=False)
        return list(out[0])

    return z.detach(), tangent.detach(), pullback


@contextmanager
def _forward_mode() -> Iterator[None]:
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if "forward AD" not in str(error) and "forward mode AD" not in str(error):
            raise
        raise TransformError(
            'hvp="forward" needs forward-mode AD for every op; use hvp="reverse". torch said: '
            f"{str(error).splitlines()[0]}"
        ) from error


def hessian(
    model_fn: ModelFn,
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    hvp: Hvp = "forward",
    chunk_size: int | None = None,
) -> DataOperator:
    """The Hessian of the mean loss over a data set, by its products with directions.

        C = d^2 mean_i losses[i] / d params^2

    It need not be positive: away from a minimum, `cg` may fail with it where `ggn` does not.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses [n]`, twice differentiable.
        params: pytree of floating-point tensors. Their memory is used: a product after they were
            written to is refused.
        batches: batches of a data set, gone through once per product: no iterator.
        hvp: "forward" (`jvp` over `grad`) or "reverse" (`grad` over `grad`, for ops without
            forward-mode AD).
        chunk_size: the most samples to run at one time.

    Returns:
        An operator: `matvec(direction)`.

    Raises:
        CurvatureError: of a product: the parameters were written to since.
    """
    check_model_fn(model_fn)
    refuse_pieces(model_fn, "gf.curvature.hessian")
    return _Hessian(model_fn, params, batches, hvp, chunk_size)


def ggn(
    model_fn: ModelFn,
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    likelihood: Likelihood,
    hvp: Hvp = "forward",
    chunk_size: int | None = None,
) -> DataOperator:
    """The generalised Gauss-Newton matrix of the mean loss, by its products with directions.

        C = mean_i J_i^T H_i J_i,    J = d outputs / d params,  H = d^2 losses / d outputs^2

    It is positive semidefinite, and the Fisher information matrix where `ekfac` says so.

    Args:
        likelihood: `gf.curvature.softmax(...)` or `gf.curvature.gaussian(...)`.

    Other arguments and what is returned are those of `hessian`.

    Raises:
        OptionError: the likelihood is not that of `model_fn`; of the first batch at once, of the
            others in the first product.

    Reference:
        Martens, "New Insights and Perspectives on the Natural Gradient Method", JMLR 2020.
    """
    check_model_fn(model_fn)
    gradients = Gradients.of(model_fn, likelihood, "exact", 1, 0)
    out = _GGN(params, batches, gradients, likelihood, hvp, chunk_size)
    gradients.check(params, next(iter(out.batches)))
    return out
