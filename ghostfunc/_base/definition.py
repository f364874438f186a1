"""The two other ways to the same numbers: `vmap(grad)`, and forward-mode derivatives.

They know no op rules and no taps, so what they agree on with ghost mode is right.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ghostfunc._base.dense_gradients import DenseGradients, dense
from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import (
    RandomnessError,
    TransformError,
)
from ghostfunc._base.module import ModuleFn
from ghostfunc._base.purity import (
    check_finite,
    check_losses,
    check_shape,
    close,
    coupled_samples,
    refuse_checkpoints,
)
from ghostfunc._base.remembered import memory, structure
from ghostfunc._base.torch_private import autocasting, cast_as, in_transform, unrounded
from ghostfunc._base.trees import ParamSpec, batch_size, flatten, take, unflatten
from ghostfunc._base.types import ModelFn, PyTree, Randomness

FORWARD_MODE = threading.RLock()
"""The levels of torch's forward-mode AD are shared by all threads of a process."""


def val_gradient(
    model_fn: ModelFn,
    leaves: Sequence[Tensor],
    spec: ParamSpec,
    val: PyTree,
    scale: float,
    check: Callable[[Tensor], None] = check_finite,
) -> list[Tensor]:
    """The gradient of the summed validation losses, scaled, by reverse mode alone. `check` gets the
    losses when all is queued."""
    m = batch_size(val, "val")
    losses, pullback = _vjp(model_fn, leaves, spec, val, m)
    with unrounded(losses):
        (grads,) = pullback(torch.full_like(losses, scale), retain_graph=False, create_graph=False)
    check(losses)
    return list(map(dense, grads))


def val_gradients(
    model_fn: ModelFn, leaves: Sequence[Tensor], spec: ParamSpec, val: PyTree
) -> Iterator[list[Tensor]]:
    """The gradient of every validation loss in turn."""
    m = batch_size(val, "val")
    losses, pullback = _vjp(model_fn, leaves, spec, val, m)
    check_finite(losses)
    for j in range(m):
        cotangent = torch.zeros_like(losses)
        cotangent[j] = 1
        with unrounded(losses):
            (grads,) = pullback(cotangent, retain_graph=True, create_graph=False)
        yield list(map(dense, grads))


def _vjp(
    model_fn: ModelFn, leaves: Sequence[Tensor], spec: ParamSpec, batch: PyTree, n: int
) -> tuple[Tensor, Callable[..., tuple[list[Tensor]]]]:
    def losses(p: list[Tensor]) -> Tensor:
        with DenseGradients():
            return check_shape(model_fn(spec.unflatten(p), batch), n)

    out, pullback = torch.func.vjp(losses, list(leaves))[:2]
    return out, pullback


def jvp_dots(
    model_fn: ModelFn,
    leaves: Sequence[Tensor],
    spec: ParamSpec,
    train: PyTree,
    direction: Sequence[Tensor],
    *,
    per_param: bool,
) -> list[Tensor]:
    """`<g_i, u>` as the directional derivative of the losses: `[n]`, one in all or one per
    parameter."""
    n = batch_size(train, "train")

    def losses(p: list[Tensor]) -> Tensor:
        return check_losses(model_fn(spec.unflatten(p), train), n)

    def along(tangents: list[Tensor]) -> Tensor:
        with FORWARD_MODE, _forward_mode(), torch.enable_grad(), ReverseModeConstants():
            tangent = torch.func.jvp(losses, (list(leaves),), (tangents,))[1]
        return wide(tangent)

    direction = [dense(u).to(x.dtype) for u, x in zip(direction, leaves, strict=True)]
    if not per_param:
        return [along(direction)]
    zeros = [torch.zeros_like(x) for x in leaves]
    return [along([*zeros[:i], u, *zeros[i + 1 :]]) for i, u in enumerate(direction)]


def prove_independent_tangents(
    model_fn: ModelFn, leaves: Sequence[Tensor], spec: ParamSpec, batch: PyTree
) -> None:
    """Raise `CoupledSamplesError` if a sample's derivative depends on the others, as its loss may
    not: think of `h.mean(0) - h.mean(0).detach()`. Remembered by structure."""
    remembered = memory(model_fn)
    key = ("independent tangents", structure(model_fn, spec, leaves, batch, "error"))
    if key in remembered:
        return
    generator = torch.Generator().manual_seed(0)
    u = [torch.randn(x.shape, generator=generator).to(x) for x in leaves]
    chosen = [0, min(1, batch_size(batch) - 1)]
    two, three = (
        jvp_dots(model_fn, leaves, spec, take(batch, index), u, per_param=False)[0][:2].nan_to_num()
        for index in (chosen, [*chosen, 0])
    )
    if not close(three.to(leaves[0].dtype), two.to(leaves[0].dtype)):
        raise coupled_samples(
            f"beside each other, samples {chosen} have directional derivatives {two.tolist()}; "
            f"with a copy of sample 0 added, {three.tolist()}"
        )
    remembered[key] = True


class ReverseModeConstants(TorchFunctionMode):
    """Holds constant in forward mode what reverse mode does: what is computed under
    `torch.no_grad`, and the padding row of a look-up."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            leaves, treedef = flatten((args, kwargs))
            leaves = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
            args, kwargs = unflatten(treedef, leaves)
        elif func is F.embedding:
            return _constant_padding(func(*args, **kwargs), *args, **kwargs)
        return func(*args, **kwargs)


def _constant_padding(
    out: Tensor, ids: Tensor, weight: Tensor, padding_idx: int | None = None, *_: Any, **__: Any
) -> Tensor:
    if padding_idx is None:
        return out
    return torch.where((ids == padding_idx % len(weight))[..., None], out.detach(), out)


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Only the plain attention kernel has forward-mode AD."""
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except (NotImplementedError, RuntimeError) as error:
        if "forward AD" not in str(error) and "forward mode AD" not in str(error):
            raise
        raise TransformError(
            f'mode="jvp" needs forward-mode AD for every op, and torch has none for one of them: '
            f'{error}. Use mode="ghost" or mode="materialized".'
        ) from error


def materialize(
    model_fn: ModelFn,
    leaves: Sequence[Tensor],
    spec: ParamSpec,
    batch: PyTree,
    *,
    vectorize: bool,
    randomness: Randomness,
) -> list[Tensor]:
    """Every sample's gradient by itself, `[n, *shape]` per parameter."""
    n = batch_size(batch)
    rounding = autocasting(leaves[0].device.type)

    def loss(p: list[Tensor], sample: PyTree) -> Tensor:
        with DenseGradients(), cast_as(rounding):
            losses = model_fn(spec.unflatten(p), optree.tree_map(lambda x: x[None], sample))
        return _one_loss(losses)

    grad_and_value = torch.func.grad_and_value(loss)
    if not vectorize:
        rows, values = [], []
        for i in range(n):
            row, value = _gradient_of_one(model_fn, leaves, spec, take(batch, [i]))
            rows.append(row)
            values.append(value)
        check_finite(torch.stack(values))
        return [torch.stack(column) for column in zip(*rows, strict=True)]
    samples, treedef = flatten(batch)

    def of_flat(flat: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        return grad_and_value(list(leaves), unflatten(treedef, flat))

    with _vectorized(), unrounded(leaves[0]):
        grads, losses = torch.vmap(of_flat, randomness=randomness)(samples)
    check_finite(losses)
    return grads


def _gradient_of_one(
    model_fn: ModelFn, leaves: Sequence[Tensor], spec: ParamSpec, sample: PyTree
) -> tuple[Sequence[Tensor], Tensor]:
    """The gradient and the loss of a batch of one sample. Outside transforms by plain autograd,
    which runs what no transform does: checkpoints, packed sequences, scripted functions."""

    def loss(p: Sequence[Tensor]) -> Tensor:
        with DenseGradients():
            return _one_loss(model_fn(spec.unflatten(p), sample))

    if in_transform():
        grads, value = torch.func.grad_and_value(loss)(list(leaves))
        return grads, value
    inputs = [x.detach().requires_grad_() for x in leaves]

    def gradient(losses: Callable[[PyTree], Tensor]) -> tuple[Sequence[Tensor], Tensor]:
        with torch.enable_grad():
            value = _one_loss(losses(sample))
        if not value.requires_grad:
            return [torch.zeros_like(x) for x in leaves], value
        refuse_checkpoints(value)
        with unrounded(value):
            grads = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
        return list(map(dense, grads)), value.detach()

    params = spec.unflatten(inputs)
    if isinstance(model_fn, ModuleFn):
        return model_fn.lending(params, gradient)
    return gradient(lambda batch: model_fn(params, batch))


def _one_loss(losses: Tensor) -> Tensor:
    if losses.shape != (1,):
        raise TransformError(
            f"model_fn returned shape {tuple(losses.shape)} for one sample; expected [1]."
        )
    return losses[0]


@contextmanager
def _vectorized() -> Iterator[None]:
    """Translate what torch.vmap says of models it cannot run."""
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if "random" in said and "randomness" in said:
            raise RandomnessError(
                "model_fn draws random numbers (dropout in training mode?). Call module.eval(), or "
                'pass randomness="different" to give every sample its own draws.'
            ) from error
        if "vmap" in said:
            raise TransformError(
                "torch.vmap cannot run this model: its control flow or masks depend on data. Pass "
                f"vectorize=False to loop over samples instead. torch said: {said.splitlines()[0]}"
            ) from error
        raise
