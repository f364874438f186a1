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

from ghostfunc import _bundles
from ghostfunc._bundles import Bundle
from ghostfunc._capture import same_size, symbolic
from ghostfunc._cost import Meeting
from ghostfunc._errors import NonFiniteLossError
from ghostfunc._factors import add_up, wide
from ghostfunc._functorch import in_transform
from ghostfunc._quantities import BesideReader, DotReader, Prepared
from ghostfunc._several import RunningTotal, dots_and_total
from ghostfunc._tree import ParamSpec, batch_size, flatten, unflatten
from ghostfunc._types import ContractDtype, ModelFn, PyTree
from ghostfunc._vjp import meetings, run, traced

SHARE = 4
"""Train samples per validation sample, at least. Activations of both live at one time, which is
what a plain step over all of them takes; two runs take as much as the larger."""


class Together(NamedTuple):
    """Losses `[n]` of the train samples, the gradient of their mean, and for every parameter
    `<g_i, u>`, `[n]`."""

    losses: Tensor
    grads: list[Tensor]
    dots: list[Tensor]


def together(
    model_fn: ModelFn,
    leaves: Sequence[Tensor],
    spec: ParamSpec,
    train: PyTree,
    val: PyTree,
    *,
    mean: bool,
    grads: bool,
    contract_dtype: ContractDtype,
) -> Together | None:
    """Scores, and the training gradient if it is wanted, from one run; None where that takes two,
    or more memory than it is worth."""
    n, m = batch_size(train), batch_size(val)
    if n < SHARE * m or in_transform() or any(wide(x).dtype != x.dtype for x in leaves):
        return None
    batch = _joined(train, val)
    if batch is None:
        return None
    uses = meetings(model_fn, leaves, spec, train, randomness="error", exact=False)
    if not all(map(_read_in_passing, uses)):
        return None
    traced(model_fn, leaves, spec, val, randomness="error")  # proves it, and blames what is its own
    shared = [i for i, met in enumerate(uses) if len(met) > 1]
    single = [i for i in range(len(leaves)) if i not in shared]
    reader = BesideReader(n, contract_dtype)
    ours, theirs = 1 / n if grads else 1.0, 1 / m if mean else 1.0
    try:
        taken = run(
            model_fn,
            leaves,
            spec,
            batch,
            [Prepared([None if i in shared else reader for i in range(len(leaves))], degree=2)],
            grads=single if grads else (),
            collect=shared,
            scale=torch.tensor([ours] * n + [theirs] * m, dtype=torch.float64),
        )
    except NonFiniteLossError:
        return None  # two runs say whose it is
    dots, out = list(taken.values[0]), list(taken.grads)
    for i in shared:
        dots[i], total = _read(reader, taken.factors[i], grads=grads)
        if total is not None:
            out[i] = total.view_as(leaves[i])
    return Together(taken.losses[:n], out, [x / ours for x in dots])


def _joined(train: PyTree, val: PyTree) -> PyTree | None:
    """Both batches as one; None unless they differ in nothing but their numbers of samples. Leaves
    that are one tensor stay one."""
    ours, treedef = flatten(train)
    theirs, other = flatten(val)
    if treedef != other or not all(map(_alike, ours, theirs)):
        return None
    joined: dict[tuple[int, int], Tensor] = {}
    pairs = list(zip(ours, theirs, strict=True))
    keys = [(id(x), id(y)) for x, y in pairs]
    if not len(set(keys)) == len(set(map(id, ours))) == len(set(map(id, theirs))):
        return None
    for key, pair in zip(keys, pairs, strict=True):
        if key not in joined:
            joined[key] = torch.cat(pair)
    return unflatten(treedef, [joined[key] for key in keys])


def _alike(x: Tensor, y: Tensor) -> bool:
    return (
        (x.dtype, x.device, x.ndim) == (y.dtype, y.device, y.ndim)
        and symbolic(x) == symbolic(y)
        and all(map(same_size, x.shape[1:], y.shape[1:]))
    )


def _read_in_passing(uses: Sequence[Meeting]) -> bool:
    """Whether a parameter is read in no more memory than a backward pass takes: it has one use, or
    what has to wait for the others is little."""
    large = [x for x in uses if x.kind != "OneHot"]
    return len(uses) == 1 or (len(large) <= 1 and all(x.direct for x in uses))


def _read(reader: BesideReader, bundle: Bundle, *, grads: bool) -> tuple[Tensor, Tensor | None]:
    """`<g_i, u>` and `sum_i g_i` of a parameter's uses, taken together."""
    against = reader.opposite(bundle, grads=grads)
    total = RunningTotal() if grads else None
    dots: list[Tensor] = []
    for factor in (_bundles.take(f, slice(reader.n)) for f in bundle):
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
