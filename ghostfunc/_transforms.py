"""The public functions: dot products of per-sample gradients with a validation gradient."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ghostfunc import _chunks, _oracles
from ghostfunc._capture import compilable
from ghostfunc._direction import dense_direction, validation_readers
from ghostfunc._errors import OptionError, one_of
from ghostfunc._factors import wide
from ghostfunc._purity import check_losses, prove_independent
from ghostfunc._quantities import Dot, Prepared, Quantity, SampleGrad
from ghostfunc._tree import ParamSpec, batch_size, flatten_like, flatten_params
from ghostfunc._types import GhostStep, Mode, ModelFn, PyTree, Randomness, Reduction
from ghostfunc._vjp import Taken, run

_MODES = ("ghost", "jvp", "materialized")
_REDUCTIONS = ("mean", "sum", "none")


@compilable()
def ghost_dot_prod(
    model_fn: ModelFn,
    params: PyTree,
    train: PyTree,
    val: PyTree | None = None,
    *,
    direction: PyTree | None = None,
    mode: Mode = "ghost",
    reduction: Reduction = "mean",
    per_param: bool = False,
    vectorize: bool = True,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> PyTree:
    """Dot products of every train sample's gradient with the validation gradient.

        s_i = <g_i, u>,  g_i = d losses_train[i] / d params,  u = mean_j d losses_val[j] / d params

    To first order, a step of `-lr * g_i` changes the mean validation loss by `-lr * s_i`: a
    positive score is a sample that helps.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses`, one loss per sample.
        params: pytree of floating-point tensors.
        train: pytree of tensors `[n, ...]`.
        val: pytree of tensors `[m, ...]`; lengths may differ from those of `train`.
        direction: instead of `val`, a pytree like `params` to dot with, such as `gf.direction(...)`
            returns: the way to score many batches at one checkpoint.
        mode: "ghost" (from factors, one backward pass), "jvp" (directional derivative of the
            losses; any model with forward-mode AD), or "materialized" (`vmap(grad)`; exact by
            definition, as large as n models).
        reduction: over validation samples: "mean", "sum", or "none" for `[n, m]`.
        per_param: return the contributions of every parameter; they sum to the total.
        vectorize: for `mode="materialized"`, False loops over samples where vmap cannot run the
            model.
        chunk_size: the most samples to run at one time, of `train` and of `val`, where all of them
            do not fit into memory. The numbers do not depend on it. With `reduction="none"` every
            chunk of `train` is run once for every chunk of `val`.
        randomness: "error" refuses a model that draws random numbers; "different" allows it.

    Returns:
        `[n]` (`[n, m]` for `reduction="none"`), float32 or wider; for `per_param` a pytree like
        `params` of those. Units: those of loss^2 per parameter^2. Scales: `g_i` is the gradient of
        sample i's own loss, not divided by n.

    Raises:
        GhostError: one of its children: which op, parameter, sample or option, and what to do.

    Reference:
        Wang et al., "Data Shapley in One Training Run", ICLR 2025.
    """
    leaves, spec = flatten_params(params)
    problem = _Problem(
        model_fn, leaves, spec, train, val, direction, reduction, randomness, chunk_size
    )
    one_of("mode", mode, _MODES)
    dots = problem.dots(mode, per_param=per_param, vectorize=vectorize)
    return spec.unflatten(dots) if per_param else _sum(dots)


@compilable(GhostStep)
def ghost_value_and_grad(
    model_fn: ModelFn,
    params: PyTree,
    train: PyTree,
    val: PyTree | None = None,
    *,
    direction: PyTree | None = None,
    mode: Mode = "ghost",
    reduction: Reduction = "mean",
    per_param: bool = False,
    vectorize: bool = True,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> GhostStep:
    """One training step's losses, gradient and scores, from one backward pass over `train`.

        losses_i,   grads = d mean_i losses_i / d params,   dot_prods_i = <g_i, u>

    Arguments and errors are those of `ghost_dot_prod`. Nothing is written anywhere: hand `grads` to
    a functional optimizer, or copy them into `.grad`.

    Returns:
        `GhostStep(losses [n], grads, dot_prods)`. `grads` is a pytree like `params`, of their
        dtypes, the gradient of the *mean* loss; `g_i` in `dot_prods` is that of sample i's own
        loss.
    """
    leaves, spec = flatten_params(params)
    problem = _Problem(
        model_fn, leaves, spec, train, val, direction, reduction, randomness, chunk_size
    )
    one_of("mode", mode, _MODES)
    losses, grads, dots = problem.step(mode, per_param=per_param, vectorize=vectorize)
    return GhostStep(
        losses, spec.unflatten(grads), spec.unflatten(dots) if per_param else _sum(dots)
    )


@compilable()
def direction(
    model_fn: ModelFn,
    params: PyTree,
    val: PyTree,
    *,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> PyTree:
    """The validation gradient `u`, to dot with as often as wanted.

        u = mean_j d losses[j] / d params        (reduction="sum": the sum)

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses`.
        params: pytree of floating-point tensors.
        val: pytree of tensors `[m, ...]`.
        reduction: "mean" or "sum" over the m validation samples.
        chunk_size: the most samples to run at one time; by default all of them.
        randomness: "error" or "different".

    Returns:
        A pytree like `params`.

    Raises:
        OptionError: another reduction. `reduction="none"` would be m models large: use
            `ghost_dot_prod(..., reduction="none")`, which never forms it.
    """
    one_of("reduction", reduction, ("mean", "sum"))
    leaves, spec = flatten_params(params)
    u = dense_direction(
        model_fn,
        leaves,
        spec,
        val,
        mean=reduction == "mean",
        chunk_size=chunk_size,
        randomness=randomness,
    )
    return spec.unflatten(u)


@compilable()
def per_sample_grads(
    model_fn: ModelFn,
    params: PyTree,
    batch: PyTree,
    *,
    mode: Mode = "materialized",
    vectorize: bool = True,
    randomness: Randomness = "error",
) -> PyTree:
    """Every sample's gradient itself: as large as n models.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses`.
        params: pytree of floating-point tensors.
        batch: pytree of tensors `[n, ...]`.
        mode: "materialized" (`vmap(grad)`, the definition) or "ghost" (from the factors, in one
            batched backward pass: how op rules are tested, and a way for models vmap cannot run).
        vectorize: for `mode="materialized"`, False loops over samples instead of vmap.
        randomness: "error" or "different".

    Returns:
        A pytree like `params` of `[n, *shape]`; row i is the gradient of sample i's own loss.
    """
    one_of("mode", mode, ("materialized", "ghost"))
    one_of("randomness", randomness, ("error", "different"))
    leaves, spec = flatten_params(params)
    batch_size(batch)
    if mode == "ghost":
        taken = run(model_fn, leaves, spec, batch, [SampleGrad()], randomness=randomness)
        return spec.unflatten(taken.values[0])
    prove_independent(model_fn, leaves, spec, batch, randomness)
    return spec.unflatten(
        _oracles.materialize(
            model_fn, leaves, spec, batch, vectorize=vectorize, randomness=randomness
        )
    )


class _Problem:
    """A validated call: what is asked of which data."""

    def __init__(
        self,
        model_fn: ModelFn,
        leaves: Sequence[Tensor],
        spec: ParamSpec,
        train: PyTree,
        val: PyTree | None,
        direction: PyTree | None,
        reduction: Reduction,
        randomness: Randomness,
        chunk_size: int | None,
    ) -> None:
        one_of("reduction", reduction, _REDUCTIONS)
        one_of("randomness", randomness, ("error", "different"))
        _chunks.check_chunk_size(chunk_size)
        if (val is None) == (direction is None):
            given = "both" if val is not None else "neither"
            raise OptionError(f"Give exactly one of val and direction; {given} was given.")
        self.model_fn, self.leaves, self.spec = model_fn, leaves, spec
        self.train, self.n = train, batch_size(train, "train")
        self.val, self.reduction, self.randomness = val, reduction, randomness
        self.m = 1 if val is None else batch_size(val, "val")
        self.direction = (
            None if direction is None else flatten_like(direction, leaves, spec, "direction")
        )
        self.chunk_size = chunk_size

    def dots(self, mode: Mode, *, per_param: bool, vectorize: bool) -> list[Tensor]:
        """Dot products, one per parameter (one in all is enough unless `per_param`)."""
        parts = self._parts(mode)
        return _chunks.joined(
            (part._dots(mode, per_param=per_param, vectorize=vectorize) for part in parts), axis=1
        )

    def step(
        self, mode: Mode, *, per_param: bool, vectorize: bool
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Losses, gradients of the mean loss, and `dots`."""
        if mode != "ghost":
            dots = self.dots(mode, per_param=per_param, vectorize=vectorize)
            return *self._plain_gradient(), dots
        first, *others = self._parts(mode)
        losses, grads, dots = first._ghost(grads=True)
        columns = [dots, *(part._ghost(grads=False)[2] for part in others)]
        return losses, grads, _chunks.joined(columns, axis=1)

    def _parts(self, mode: Mode) -> list[_Problem]:
        """The same for as much of the validation batch as is run at one time; the dot products of
        all parts lie side by side."""
        if self.val is None or self.chunk_size is None:
            return [self]
        if self.reduction == "none":
            return [self._against(val=x) for _, x in _chunks.chunks(self.val, self.chunk_size)]
        if self.m <= self.chunk_size and mode == "ghost":
            return [self]
        u = dense_direction(
            self.model_fn,
            self.leaves,
            self.spec,
            self.val,
            mean=self.reduction == "mean",
            chunk_size=self.chunk_size,
            randomness=self.randomness,
        )
        return [self._against(direction=u)]

    def _against(
        self, val: PyTree | None = None, direction: list[Tensor] | None = None
    ) -> _Problem:
        other = copy.copy(self)
        other.val, other.direction = val, direction
        other.m = 1 if val is None else batch_size(val, "val")
        return other

    def _dots(self, mode: Mode, *, per_param: bool, vectorize: bool) -> list[Tensor]:
        if mode == "ghost":
            return self._ghost(grads=False)[2]
        if self.val is not None:
            prove_independent(self.model_fn, self.leaves, self.spec, self.val, self.randomness)

        def of_chunk(train: PyTree) -> list[Tensor]:
            prove_independent(self.model_fn, self.leaves, self.spec, train, self.randomness)
            if mode == "jvp":
                if self.randomness == "error":
                    _oracles.prove_independent_tangents(
                        self.model_fn, self.leaves, self.spec, train
                    )
                return self._jvp(train, per_param=per_param)
            return self._materialized(train, vectorize=vectorize)

        return _chunks.joined(_chunks.each(of_chunk, self.train, self.chunk_size, "train"))

    def _ghost(self, *, grads: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        quantity: Quantity
        if self.direction is not None:
            quantity = Dot(self.spec.unflatten(self.direction))
        else:
            readers = validation_readers(
                self.model_fn,
                self.leaves,
                self.spec,
                self.train,
                self.val,
                reduction=self.reduction,
                grads=grads,
                randomness=self.randomness,
            )
            quantity = Prepared(readers, degree=1)

        def of_chunk(train: PyTree) -> Taken:
            return run(
                self.model_fn,
                self.leaves,
                self.spec,
                train,
                [quantity],
                grads=range(len(self.leaves)) if grads else (),
                scale=1 / self.n if grads else 1.0,
                randomness=self.randomness,
            )

        rows, sums = [], _chunks.Sums()
        for taken in _chunks.each(of_chunk, self.train, self.chunk_size, "train"):
            rows.append([taken.losses, *taken.values[0]])
            sums.add(taken.grads if grads else ())
            del taken
        losses, *dots = _chunks.joined(rows)
        return losses, sums.result(), dots

    def _plain_gradient(self) -> tuple[Tensor, list[Tensor]]:
        def of_chunk(train: PyTree) -> tuple[list[Tensor], Tensor]:
            def share(p: list[Tensor]) -> tuple[Tensor, Tensor]:
                losses = self.model_fn(self.spec.unflatten(p), train)
                losses = check_losses(losses, batch_size(train))
                return losses.sum() / self.n, losses

            grads, losses = torch.func.grad(share, has_aux=True)(list(self.leaves))
            return grads, losses

        rows, sums = [], _chunks.Sums()
        for grads, losses in _chunks.each(of_chunk, self.train, self.chunk_size, "train"):
            rows.append([losses])
            sums.add(grads)
            del grads
        return _chunks.joined(rows)[0], sums.result()

    def _directions(self) -> Any:
        """Every direction to dot with, one at a time."""
        if self.direction is not None:
            return iter([self.direction])
        if self.reduction == "none":
            return _oracles.val_gradients(self.model_fn, self.leaves, self.spec, self.val)
        scale = 1 / self.m if self.reduction == "mean" else 1.0
        return iter([_oracles.val_gradient(self.model_fn, self.leaves, self.spec, self.val, scale)])

    def _stacked(self, columns: list[list[Tensor]]) -> list[Tensor]:
        if self.reduction == "none" and self.direction is None:
            return [torch.stack(column, dim=1) for column in zip(*columns, strict=True)]
        return columns[0]

    def _jvp(self, train: PyTree, *, per_param: bool) -> list[Tensor]:
        return self._stacked(
            [
                _oracles.jvp_dots(
                    self.model_fn, self.leaves, self.spec, train, u, per_param=per_param
                )
                for u in self._directions()
            ]
        )

    def _materialized(self, train: PyTree, *, vectorize: bool) -> list[Tensor]:
        def grads(batch: PyTree) -> list[Tensor]:
            return _oracles.materialize(
                self.model_fn,
                self.leaves,
                self.spec,
                batch,
                vectorize=vectorize,
                randomness=self.randomness,
            )

        rows = [wide(g)[:, None].flatten(1) for g in grads(train)]
        if self.direction is not None:
            return [g @ wide(u).flatten() for g, u in zip(rows, self.direction, strict=True)]
        val = [wide(g)[:, None].flatten(1) for g in grads(self.val)]
        gram = [g @ v.mT for g, v in zip(rows, val, strict=True)]
        if self.reduction == "none":
            return gram
        return [x.mean(1) if self.reduction == "mean" else x.sum(1) for x in gram]


def _sum(dots: Sequence[Tensor]) -> Tensor:
    return sum(dots[1:], dots[0])
