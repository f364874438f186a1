"""Train and validation samples in one run, where they are alike.

Batches that differ only in their numbers of samples are one batch, put one after the other. Then
the validation gradient comes up in the very backward pass that it is needed in: `<g_i, u>` is read,
parameter by parameter, between the first samples and the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ghostfunc._base.compilable import known, same_size
from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import NonFiniteLossError
from ghostfunc._base.remembered import memory, shapes_key
from ghostfunc._base.torch_private import in_transform, symbolic
from ghostfunc._base.trees import ParamSpec, batch_size, flatten, unflatten
from ghostfunc._base.types import Check, ContractDtype, ModelFn, PyTree
from ghostfunc._factors import bundles
from ghostfunc._factors.beside_total import RunningTotal, dots_and_total
from ghostfunc._factors.bundles import Bundle
from ghostfunc._factors.contract import add_up
from ghostfunc._factors.cost import UseShape
from ghostfunc._factors.factor import OneHot
from ghostfunc._quantities.quantity import Prepared
from ghostfunc._quantities.readers import DotReader, OneRunReader
from ghostfunc._taps.run import run
from ghostfunc._taps.uses import use_shapes
from ghostfunc._trace.find import trace_of
from ghostfunc._trace.trace import Trace

TRAIN_PER_VAL = 4
"""Train samples per validation sample, at least. Activations of both live at one time, which is
what a plain step over all of them takes; two runs take as much as the larger."""

COPIED_ELEMENTS = 1 << 20
"""Elements of a batch that may be copied in any case; of models with more parameters, as many."""

WAITING_USES = 4
"""Uses of a parameter whose factors may have to wait for each other."""


class OneRunResult(NamedTuple):
    """Losses of the train samples `[n]`, the gradient of their mean, and for every parameter
    `<g_i, u>`, `[n]`."""

    losses: Tensor
    grads: list[Tensor]
    dots: list[Tensor]


def in_one_run(
    model_fn: ModelFn,
    leaves: Sequence[Tensor],
    spec: ParamSpec,
    train: PyTree,
    val: PyTree,
    *,
    mean: bool,
    grads: bool,
    contract_dtype: ContractDtype,
    check: Check,
) -> OneRunResult | None:
    """Scores, and the training gradient if it is wanted, from one run; None where that takes two.

    It does where samples could be told by the company they are in (the program makes a number of
    several samples, or reads values: two batches that are each of one kind are not when mixed), and
    where one run takes more memory than it is worth.
    """
    n, m = batch_size(train), batch_size(val)
    if n < TRAIN_PER_VAL * m or in_transform() or any(wide(x).dtype != x.dtype for x in leaves):
        return None
    ours, treedef = flatten(train)
    theirs, other = flatten(val)
    if (
        treedef != other
        or not _alike(ours, theirs)
        or _size(ours) > max(COPIED_ELEMENTS, _size(leaves))
    ):
        return None
    remembered, key = memory(model_fn), ("apart", shapes_key((train, val, leaves)))
    if key in remembered or _depends_on_other_samples(
        trace_of(model_fn, leaves, spec, train, randomness="error")
    ):
        return None
    uses = use_shapes(model_fn, leaves, spec, train, randomness="error", exact=False)
    if not all(map(_needs_no_waiting, uses)):
        return None
    trace_of(model_fn, leaves, spec, val, randomness="error")  # proves it, by itself
    shared = [i for i, met in enumerate(uses) if len(met) > 1]
    scales = 1 / n if grads else 1.0, 1 / m if mean else 1.0
    weights = torch.tensor([scales[0]] * n + [scales[1]] * m, dtype=torch.float64)
    batch = unflatten(treedef, _joined(ours, theirs))
    reader = OneRunReader(n, contract_dtype)
    try:
        found = _run(
            model_fn, leaves, spec, batch, reader, shared, weights, grads=grads, check=check
        )
    except NonFiniteLossError:
        return None  # two runs say whose it is
    except Exception:  # whatever it is (a mask made for n samples, no memory), two runs may do
        found = None
    if found is None:
        remembered[key] = True
        return None
    return found._replace(losses=found.losses[:n], dots=[x / scales[0] for x in found.dots])


def _run(
    model_fn: ModelFn,
    leaves: Sequence[Tensor],
    spec: ParamSpec,
    batch: PyTree,
    reader: OneRunReader,
    shared: Sequence[int],
    weights: Tensor,
    *,
    grads: bool,
    check: Check,
) -> OneRunResult | None:
    """One run of a batch of both. The parameters `shared` are read at its end; None if the program
    went another way than expected, where samples could be told by their company."""
    single = [i for i in range(len(leaves)) if i not in shared]
    readers = [None if i in shared else reader for i in range(len(leaves))]
    taken = run(
        model_fn,
        leaves,
        spec,
        batch,
        [Prepared(readers, degree=2)],
        grads=single if grads else (),
        collect=shared,
        scale=weights,
        check=check,
    )
    if _depends_on_other_samples(taken.trace):
        return None
    dots, out = list(taken.values[0]), list(taken.grads)
    for i in shared:
        bundle = sorted(taken.factors[i], key=lambda f: isinstance(f, OneHot))  # added to the rest
        dots[i], total = _read(reader, bundle, grads=grads)
        if total is not None:
            out[i] = total.view_as(leaves[i])
    return OneRunResult(taken.losses, out, dots)


def _depends_on_other_samples(trace: Trace) -> bool:
    return trace.statistics or trace.reads


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(known(x.numel()) for x in tensors)


def _alike(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether batches differ in nothing but their numbers of samples. What is expanded along the
    samples would be written out; leaves that are one tensor in one batch are to be one in both."""
    pairs = list(zip(ours, theirs, strict=True))
    tied = [len(set(map(id, x))) for x in (ours, theirs)]
    return tied == [len({(id(x), id(y)) for x, y in pairs})] * 2 and all(
        (x.dtype, x.device, x.ndim) == (y.dtype, y.device, y.ndim)
        and symbolic(x) == symbolic(y)
        and x.stride(0) != 0
        and all(map(same_size, x.shape[1:], y.shape[1:]))
        for x, y in pairs
    )


def _joined(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[Tensor]:
    """One batch of both. Leaves that are one tensor stay one."""
    joined: dict[int, Tensor] = {}
    for x, y in zip(ours, theirs, strict=True):
        if id(x) not in joined:
            joined[id(x)] = torch.cat([x, y])
    return [joined[id(x)] for x in ours]


def _needs_no_waiting(uses: Sequence[UseShape]) -> bool:
    """Whether a parameter is read in no more memory than a backward pass takes: it has one use, or
    what has to wait for the others is little."""
    large = [x for x in uses if x.kind != "OneHot"]
    few = len(large) <= 1 and len(uses) <= WAITING_USES
    return len(uses) == 1 or (few and all(x.direct for x in uses))


def _read(reader: OneRunReader, bundle: Bundle, *, grads: bool) -> tuple[Tensor, Tensor | None]:
    """`<g_i, u>` and `sum_i g_i` of a parameter's uses, taken together."""
    against = reader.for_train_rows(bundle, grads=grads)
    total = RunningTotal() if grads else None
    dots: list[Tensor] = []
    for factor in (bundles.take(f, slice(reader.n)) for f in bundle):
        us = [against.u.view(factor.shape)] if isinstance(against, DotReader) else []
        if total is not None:
            dots += total.add(factor, us, reader.contract_dtype)
        else:
            dots += dots_and_total(
                factor, us, with_total=False, contract_dtype=reader.contract_dtype
            )[0]
        if not us:
            dots.append(against.read(factor))
    return add_up(dots), None if total is None else total.value
