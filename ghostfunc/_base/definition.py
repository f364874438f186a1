"""The two other ways to the same numbers: `vmap(grad)`, and forward-mode derivatives.

They know no op rules and no taps, so what they agree on with ghost mode is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ghostfunc._base.company import neighbours
from ghostfunc._base.dense_gradients import DenseGradients, dense, give_dense
from ghostfunc._base.documents import apart, packing_of
from ghostfunc._base.dtypes import coarsest_of, normal_like, wide
from ghostfunc._base.errors import GhostError, RandomnessError, TransformError
from ghostfunc._base.locks import FORWARD_MODE
from ghostfunc._base.losses import check_finite, check_losses, check_shape, close
from ghostfunc._base.modes import Mode
from ghostfunc._base.module import ModuleFn
from ghostfunc._base.processes.pieces import in_step, refuse_other_samples
from ghostfunc._base.program import Program
from ghostfunc._base.purity import (
    coupled_samples,
    lend,
    pure,
    refuse_checkpoints,
    refuse_unreached,
    seen_from_outside,
)
from ghostfunc._base.refusals import Refusals
from ghostfunc._base.remembered import Structures, layout_key, memory, structure
from ghostfunc._base.torch_private import (
    autocasting,
    cast_as,
    differentiated,
    in_transform,
    symbolic,
    unrounded,
)
from ghostfunc._base.trees import batch_size, flatten, take, tensors_of, unflatten
from ghostfunc._base.types import PyTree


def val_gradient(
    program: Program,
    val: PyTree,
    scale: float,
    look: Callable[[Tensor], None] = check_finite,
    ready: Callable[[int, Tensor], None] | None = None,
) -> list[Tensor]:
    """The gradient of the summed validation losses, scaled, by reverse mode alone. `look` gets the
    losses when all is queued; `ready` gets every parameter's gradient as it comes up."""
    weights = torch.full((batch_size(val, "val"),), scale, dtype=torch.float64, device="cpu")
    return weighted_gradient(program, val, weights, look, ready)[1]


def weighted_gradient(
    program: Program,
    batch: PyTree,
    weights: Tensor,
    look: Callable[[Tensor], None] = check_finite,
    ready: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The losses, and the gradient of `sum_i weights_i losses_i`, by reverse mode alone. `look`
    gets the losses when all is queued; `ready` gets every parameter's gradient as it comes up, by
    number, outside transforms."""
    found: list[list[Tensor]] = []
    losses = weighted_gradients(program, batch, [weights], found.append, look, ready)
    return losses, found[0]


def weighted_gradients(
    program: Program,
    batch: PyTree,
    weights: Sequence[Tensor],
    use: Callable[[list[Tensor]], None],
    look: Callable[[Tensor], None] = check_finite,
    ready: Callable[[int, Tensor], None] | None = None,
    *,
    watched: bool = False,
) -> Tensor:
    """The losses of one forward pass. `use` gets the gradients of several weighted sums of them in
    turn, one backward pass each; `look` and `ready` are those of `weighted_gradient`. `watched`,
    the program has to be `pure` in that pass."""
    n, last = batch_size(batch), len(weights) - 1
    ranks = in_step(program.model_fn)
    if ranks is not None and not ranks.together:
        refuse_other_samples(program, batch)
        with ranks.in_step("computing a gradient"):
            return weighted_gradients(program, batch, weights, use, look, ready)
    watched = watched and ranks is None
    if in_transform():
        losses, pullback = _vjp(program, batch, n, watched=watched)
        again = differentiated(losses)
        for k, w in enumerate(weights):
            with unrounded(losses):
                (grads,) = pullback(
                    w.to(losses), retain_graph=again or k < last, create_graph=again
                )
            use(list(map(dense, grads)))
        look(losses)
        return losses
    inputs = [x.detach().requires_grad_() for x in program.leaves]
    if ready is not None:
        for i, x in enumerate(inputs):
            x.register_hook(partial(give_dense, ready, i))

    def gradient(losses_of: Callable[[PyTree], Tensor]) -> Tensor:
        run = partial(losses_of, batch)
        with _from_outside(program, batch, watched), torch.enable_grad(), DenseGradients():
            out = pure(run, program, batch, inputs, Refusals()) if watched else run()
            losses = check_shape(out, n)
        refuse_unreached(losses)
        for k, w in enumerate(weights):
            with unrounded(losses):
                grads = torch.autograd.grad(
                    losses,
                    inputs,
                    w.to(losses),
                    retain_graph=k < last,
                    allow_unused=True,
                    materialize_grads=True,
                )
            use(list(map(dense, grads)))
        look(losses.detach())
        return losses.detach()

    params = program.spec.unflatten(inputs)
    if isinstance(program.model_fn, ModuleFn):
        return program.model_fn.lending(params, gradient)
    return gradient(lambda data: program.model_fn(params, data))


def val_gradients(program: Program, val: PyTree) -> Iterator[list[Tensor]]:
    """The gradient of every validation loss in turn."""
    m = batch_size(val, "val")
    losses, pullback = _vjp(program, val, m)
    check_finite(losses)
    for j in range(m):
        cotangent = torch.zeros_like(losses)
        cotangent[j] = 1
        with unrounded(losses):
            (grads,) = pullback(cotangent, retain_graph=True, create_graph=differentiated(losses))
        yield list(map(dense, grads))


def _vjp(
    program: Program, batch: PyTree, n: int, *, watched: bool = False
) -> tuple[Tensor, Callable[..., tuple[list[Tensor]]]]:
    def losses(p: list[Tensor]) -> Tensor:
        run = partial(program.losses, p, batch)
        with DenseGradients():
            out = pure(run, program, batch, p, Refusals()) if watched else run()
            return check_shape(out, n)

    with _from_outside(program, batch, watched), unwrapped_memory():
        out, pullback = torch.func.vjp(losses, list(program.leaves))[:2]
    return out, pullback


def _from_outside(program: Program, batch: PyTree, watched: bool) -> AbstractContextManager[None]:
    """What looks for side effects of a pass that is not `watched`. A rank by itself could not run
    the program once more."""
    if watched or in_step(program.model_fn) is not None or program.randomness != "error":
        return nullcontext()
    return seen_from_outside(program, batch)


def jvp_dots(
    program: Program, train: PyTree, direction: Sequence[Tensor], *, per_param: bool
) -> list[Tensor]:
    """`<g_i, u>` as the directional derivative of the losses: `[n]`, one in all or one per
    parameter."""
    n = batch_size(train, "train")

    def losses(p: list[Tensor]) -> Tensor:
        return check_losses(program.losses(p, train), n)

    def along(tangents: list[Tensor]) -> Tensor:
        with (
            FORWARD_MODE,
            _forward_mode(),
            unwrapped_memory(),
            torch.enable_grad(),
            ReverseModeConstants(),
        ):
            tangent = torch.func.jvp(losses, (list(program.leaves),), (tangents,))[1]
        return wide(tangent)

    direction = [dense(u).to(x.dtype) for u, x in zip(direction, program.leaves, strict=True)]
    if not per_param:
        return [along(direction)]
    zeros = [torch.zeros_like(x) for x in program.leaves]
    return [along([*zeros[:i], u, *zeros[i + 1 :]]) for i, u in enumerate(direction)]


def prove_independent_tangents(program: Program, batch: PyTree) -> None:
    """Raise `CoupledSamplesError` if a sample's derivative depends on the others, as its loss may
    not: think of `h.mean(0) - h.mean(0).detach()`. Remembered by structure."""
    remembered = memory(program.model_fn, Structures).tangents
    key = structure(program, batch), layout_key(batch)
    if remembered.get(key):
        return
    generator = np.random.default_rng(0)
    u = [normal_like(generator, x) for x in program.leaves]
    chosen = neighbours(batch_size(batch), packing_of(batch))
    two, three = (
        jvp_dots(program, few, u, per_param=False)[0][:2].nan_to_num()
        for few in (take(batch, chosen), apart(take(batch, [*chosen, chosen[0]])))
    )
    if not close(three.to(program.leaves[0].dtype), two.to(program.leaves[0].dtype)):
        raise coupled_samples(
            f"beside each other, samples {chosen} have directional derivatives {two.tolist()}; "
            f"with a copy of sample {chosen[0]} added, {three.tolist()}",
            batch,
        )
    remembered.put(key, True)


class ReverseModeConstants(Mode):
    """Holds constant in forward mode what reverse mode does: what is computed under
    `torch.no_grad`, and the padding row of a look-up."""

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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


def materialize(program: Program, batch: PyTree, *, vectorize: bool | None) -> list[Tensor]:
    """Every sample's gradient by itself, `[n, *shape]` per parameter.

    `vectorize` is True for `vmap(grad)`, False for a loop over samples, and None for vmap where it
    runs the model and the loop elsewhere. A model that vmap cannot run is tried once.
    """
    batch_size(batch)
    if vectorize is not None:
        return (_by_vmap if vectorize else _by_loop)(program, batch)
    loops = memory(program.model_fn, Structures).loops
    key = structure(program, batch)
    if not loops.get(key):
        try:
            return _by_vmap(program, batch)
        except RuntimeError as error:
            if not _of_vmap(error):
                raise
    grads = _by_loop(program, batch)  # an error of the model is raised here, in its own words
    loops.put(key, True)
    return grads


def vmap_runs(program: Program, batch: PyTree) -> bool:
    """Whether vmap runs the model. It shows a model the shapes of samples and no values, so one
    sample tells for all of a batch."""
    try:
        _by_vmap(program, take(batch, [0]))
    except RuntimeError as error:
        if not _of_vmap(error):
            raise
        return False
    return True


class _VmapError(TransformError):
    """torch.vmap cannot run the model."""


def _of_vmap(error: RuntimeError) -> bool:
    """Whether the loop may run where vmap raised this: torch has many ways to say no, while errors
    of this package are about the model."""
    if isinstance(error, _VmapError):
        return True
    return not isinstance(error, (GhostError, torch.OutOfMemoryError))


def _by_vmap(program: Program, batch: PyTree) -> list[Tensor]:
    samples, treedef = flatten(batch)
    rounding = autocasting(program.leaves[0].device.type)

    def loss(p: list[Tensor], sample: list[Tensor]) -> Tensor:
        one = unflatten(treedef, [x[None] for x in sample])
        with DenseGradients(), cast_as(rounding):
            return _one_loss(program.losses(p, one))

    def of_sample(sample: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        grads, value = torch.func.grad_and_value(loss)(list(program.leaves), sample)
        return grads, value

    with _vectorized(), unrounded(program.leaves[0]):
        grads, losses = torch.vmap(of_sample, randomness=program.randomness)(samples)
    check_finite(losses)
    if program.randomness == "error":
        _compare_alone(program, batch, losses)
    return grads


def _by_loop(program: Program, batch: PyTree) -> list[Tensor]:
    rows, values = [], []
    for i in range(batch_size(batch)):
        row, value = _gradient_of_one(program, take(batch, [i]))
        rows.append(row)
        values.append(value)
    alone = torch.stack(values)
    check_finite(alone)
    if program.randomness == "error":
        _compare_alone(program, batch, alone)
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _compare_alone(program: Program, batch: PyTree, alone: Tensor) -> None:
    """Raise `CoupledSamplesError` unless samples have the same losses beside each other as by
    themselves, in a run that is `pure`."""
    n = batch_size(batch)
    if n == 1 or any(map(symbolic, tensors_of(batch))):
        return
    dtypes: set[torch.dtype] = set()
    with torch.enable_grad():  # a model may take gradients itself
        params = lend(program.leaves)
        run = partial(program.losses, params, batch)
        losses = pure(run, program, batch, params, Refusals(), dtypes)
        together = check_losses(losses, n).detach()
    if not close(alone, together, coarsest_of(dtypes)):
        raise coupled_samples(
            f"by themselves, some samples have losses {alone[:8].tolist()}; in the batch, they "
            f"have {together[:8].tolist()}",
            batch,
        )


def _gradient_of_one(program: Program, sample: PyTree) -> tuple[Sequence[Tensor], Tensor]:
    """The gradient and the loss of a batch of one sample. Outside transforms by plain autograd,
    which runs what no transform does: checkpoints, packed sequences, scripted functions."""

    def loss(p: Sequence[Tensor]) -> Tensor:
        with DenseGradients():
            return _one_loss(program.losses(p, sample))

    if in_transform():
        grads, value = torch.func.grad_and_value(loss)(list(program.leaves))
        return grads, value
    inputs = [x.detach().requires_grad_() for x in program.leaves]

    def gradient(losses: Callable[[PyTree], Tensor]) -> tuple[Sequence[Tensor], Tensor]:
        with torch.enable_grad():
            value = _one_loss(losses(sample))
        if not value.requires_grad:
            return [torch.zeros_like(x) for x in program.leaves], value
        refuse_checkpoints(value)
        with unrounded(value):
            grads = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
        return list(map(dense, grads)), value.detach()

    params = program.spec.unflatten(inputs)
    if isinstance(program.model_fn, ModuleFn):
        return program.model_fn.lending(params, gradient)
    return gradient(lambda batch: program.model_fn(params, batch))


def _one_loss(losses: Tensor) -> Tensor:
    if losses.shape != (1,):
        raise TransformError(
            f"model_fn returned shape {tuple(losses.shape)} for one sample; expected [1]."
        )
    return losses[0]


_NO_MEMORY = ("Cannot access data pointer", "doesn't have storage")
"""What torch says where an op asks for the memory of a tensor that a transform has wrapped."""

_OF_KERNELS = ("must be contiguous", "view size is not compatible")
"""What kernels say of the memory layouts that vmap makes."""


@contextmanager
def unwrapped_memory() -> Iterator[None]:
    """Translate what torch says of ops that a transform cannot run."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise TransformError(
            "An op of model_fn looks at the memory of a tensor that a torch.func transform has "
            'wrapped (numpy, or a sparse tensor whose indices are checked). Use mode="ghost", or '
            'mode="materialized" with vectorize=False, which run the model without transforms. '
            f"torch said: {str(error).splitlines()[0]}"
        ) from error


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
            raise _VmapError(
                "torch.vmap cannot run this model: its control flow or masks depend on data. Pass "
                f"vectorize=False to loop over samples instead. torch said: {said.splitlines()[0]}"
            ) from error
        if any(words in said for words in (*_NO_MEMORY, *_OF_KERNELS)):
            raise _VmapError(
                "torch.vmap cannot run one of this model's ops (numpy, sparse tensors and some "
                "kernels look at memory that a batched tensor does not have). Pass vectorize=False "
                f"to loop over samples instead. torch said: {said.splitlines()[0]}"
            ) from error
        raise
