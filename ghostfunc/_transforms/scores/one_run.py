"""Train and validation samples in one run, where they are alike.

Batches that differ only in their numbers of samples are one batch, put one after the other. Then
the validation gradient comes up in the very backward pass that it is needed in: `<g_i, u>` is read,
parameter by parameter, between the first samples and the others.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ghostfunc._base.documents import Documents
from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import NonFiniteLossError
from ghostfunc._base.losses import FiniteLosses, check_losses, close
from ghostfunc._base.processes.pieces import summed_and_cut
from ghostfunc._base.program import Program
from ghostfunc._base.purity import lend
from ghostfunc._base.refusals import Refusals
from ghostfunc._base.remembered import SHAPES, Recent, memory, shapes_key, structure
from ghostfunc._base.torch_private import divide_all, in_transform, known, same_size, symbolic
from ghostfunc._base.trees import batch_size, flatten, tensors_of, unflatten
from ghostfunc._base.types import Check, ContractDtype, PyTree
from ghostfunc._factors import bundles
from ghostfunc._factors.beside_total import RunningTotal, dots_and_total
from ghostfunc._factors.bundles import Bundle
from ghostfunc._factors.contract import add_up
from ghostfunc._factors.cost import UseShape
from ghostfunc._factors.factor import OneHot
from ghostfunc._quantities.quantity import Prepared
from ghostfunc._quantities.readers import DotReader, OneRunReader
from ghostfunc._taps.run import run
from ghostfunc._taps.use_shapes import use_shapes
from ghostfunc._trace.trace import Trace

TRAIN_PER_VAL = 4
"""Train samples per validation sample, at least. Activations of both live at one time, which is
what a plain step over all of them takes; two runs take as much as the larger."""

COPIED_ELEMENTS = 1 << 20
"""Elements of a batch that may be copied in any case; of models with more parameters, as many."""

WAITING_USES = 4
"""Uses of a parameter whose factors may have to wait for each other."""


@dataclass(frozen=True)
class OneRuns:
    """Which batches share a run.

    Attributes:
        found: by structure and shapes: of batches that do the parameters with several uses, of
            others why they do not.
    """

    found: Recent[Hashable, list[int] | str] = field(default_factory=lambda: Recent(SHAPES))


@dataclass(frozen=True)
class Sharing:
    """Batches that may share a run, and what is wanted of it.

    Attributes:
        mean: whether `u` is the gradient of the mean validation loss, and not of the sum.
        grads: whether the training gradient is wanted, too.
    """

    program: Program
    train: PyTree
    val: PyTree
    mean: bool
    grads: bool
    per_param: bool
    contract_dtype: ContractDtype
    check: Check
    check_finite: bool

    @property
    def key(self) -> Hashable:
        """What tells two batches that differ in size alone from others."""
        return key_of(self.program, self.train, self.val)


class OneRunResult(NamedTuple):
    """Losses of the train samples `[n]`, the gradient of their mean, and `<g_i, u>`, `[n]`, for
    every parameter or one in all."""

    losses: Tensor
    grads: list[Tensor]
    dots: list[Tensor]


def reason_for_two_runs(program: Program, train: PyTree, val: PyTree) -> str | None:
    """Why train and validation samples take a run each; None if they share one.

    Two runs are needed when a sample's computation may depend on which other samples are in its
    batch, and when one run would take more memory than a training step over all rows.
    """
    if in_transform():
        return "a torch.func transform is active"
    if (difference := difference_of(train, val)) is not None:
        return f"the batches differ in {difference}"
    found = memory(program.model_fn, OneRuns).found.get(key_of(program, train, val))
    found = shared_or_why_not(program, train, val) if found is None else found
    return found if isinstance(found, str) else None


def key_of(program: Program, train: PyTree, val: PyTree) -> Hashable:
    """What tells two batches that differ in size alone from others."""
    return structure(program, train), shapes_key((train, val, program.leaves))


def shared_or_why_not(
    program: Program, train: PyTree, val: PyTree, *, least: int = TRAIN_PER_VAL
) -> list[int] | str:
    """The parameters with several uses, of batches that share a run; of others why they do not.
    There are to be at least as many train samples per validation sample."""
    n, m = batch_size(train), batch_size(val)
    if n < least * m:
        return f"one run is for at least {least} train samples per validation sample"
    if program.randomness != "error":
        return "samples draw random numbers"
    if any(wide(x).dtype != x.dtype for x in program.leaves):
        return "parameters in half precision have their validation gradient added up in float32"
    copied = sum(known(x.numel()) for x in tensors_of((train, val)))
    if copied > max(COPIED_ELEMENTS, sum(known(x.numel()) for x in program.leaves)):
        return "one run would copy batches that are larger than the model"
    model, uses = use_shapes(program, train, exact=False)
    if (company := company_of(model.trace)) is not None:
        return company
    for name, met in zip(program.spec.names, uses, strict=True):
        if not _needs_no_waiting(met):
            return f"parameter {name!r} has several uses whose factors would wait for each other"
    return [i for i, met in enumerate(uses) if len(met) > 1]


def in_one_run(asked: Sharing) -> OneRunResult | None:
    """Scores, and the training gradient if it is wanted, from one run; None where there is a reason
    for two."""
    program, train, val = asked.program, asked.train, asked.val
    if in_transform() or difference_of(train, val) is not None:
        return None
    found_before = memory(program.model_fn, OneRuns).found
    n, m = batch_size(train), batch_size(val)
    alone: Tensor | None = None
    shared = found_before.get(asked.key)
    if shared is None:
        shared = found_before.put(asked.key, shared_or_why_not(program, train, val))
        if isinstance(shared, list) and m == 1 and asked.check == "never":  # else the proof runs it
            alone = _losses(program, val)  # code may treat one in its own way
    if isinstance(shared, str):
        return None
    scales = 1 / n if asked.grads else 1.0, 1 / m if asked.mean else 1.0
    readers = [OneRunReader(n, asked.contract_dtype)] * len(program.leaves)
    try:
        found = run_joined(asked, readers, shared, scales)
    except NonFiniteLossError:
        return None  # two runs raise, and say whose loss it is
    company = company_of(found.trace)
    if alone is not None and not close(found.losses[n:], alone):
        company = "the validation sample has another loss by itself"
    if company is not None:
        # The joined batch took another way than either batch by itself.
        found_before.put(asked.key, company)
        return None
    return found.of_train(n, scales[0], per_param=asked.per_param)


def _weights(n: int, m: int, scales: tuple[float, float], device: torch.device) -> Tensor:
    """What the losses of both batches are multiplied by, `[n + m]`."""
    weights = torch.full((n + m,), scales[0], dtype=torch.float64, device=device)
    weights[n:].fill_(scales[1])
    return weights


@torch.enable_grad()
def _losses(program: Program, batch: PyTree) -> Tensor:
    """The losses of a plain run, `[n]`."""
    with Refusals():
        losses = program.losses(lend(program.leaves), batch)
    return check_losses(losses, batch_size(batch)).detach()


class Found(NamedTuple):
    """`OneRunResult` of all rows, not scaled yet, and the trace that the run followed."""

    losses: Tensor
    grads: list[Tensor]
    dots: list[Tensor]
    trace: Trace

    def of_train(self, n: int, scale: float, *, per_param: bool) -> OneRunResult:
        """What there is of the first n rows, whose losses were multiplied by `scale`."""
        dots = self.dots if per_param else [add_up(self.dots)]
        unscaled = dots if scale == 1 else divide_all(dots, scale)
        return OneRunResult(self.losses[:n], self.grads, unscaled)


def run_joined(
    asked: Sharing,
    readers: Sequence[OneRunReader],
    shared: Sequence[int],
    scales: tuple[float, float],
) -> Found:
    """One run of a batch of both.

    Args:
        readers: one per parameter; the parameters `shared` are read at the end of the run.
        scales: what the losses of train and of validation samples are multiplied by.
    """
    program, finite = asked.program, FiniteLosses(asked.check_finite)
    n, m = batch_size(asked.train), batch_size(asked.val)
    single = [i for i in range(len(program.leaves)) if i not in shared]
    result = run(
        program,
        one_batch_of(asked.train, asked.val),
        [Prepared([None if i in shared else x for i, x in enumerate(readers)], degree=2)],
        grads=single if asked.grads else (),
        collect=shared,
        scale=_weights(n, m, scales, program.leaves[0].device),
        check=asked.check,
        summed=() if asked.per_param else (0,),
        finite=finite,
    )
    dots, out = list(result.values[0]), list(result.grads)
    for i in shared:
        # Look-ups come last: they are added to the total of the other uses.
        bundle = sorted(result.factors[i], key=lambda f: isinstance(f, OneHot))
        read, total = _read(readers[i], bundle, grads=asked.grads)
        if asked.per_param:
            dots[i] = read
        else:
            dots.append(read)
        if total is not None:
            own = summed_and_cut(program.model_fn, program.spec.names[i], total)
            out[i] = own.view_as(program.leaves[i])
    finite.look()
    return Found(result.losses, out, dots, result.trace)


def company_of(trace: Trace) -> str | None:
    """How a sample could be told by its company: two batches of one kind each are right by
    themselves, and not when mixed."""
    if trace.statistics:
        return "model_fn makes numbers of several samples"
    if trace.reads:
        return "model_fn reads values of its batch, or chooses rows by its size"
    return None


def difference_of(train: PyTree, val: PyTree) -> str | None:
    """In what batches differ besides their numbers of samples; None if in nothing."""
    (ours, treedef), (theirs, other) = flatten(train), flatten(val)
    if isinstance(train, Documents):
        return "the rows that their documents share"
    if treedef != other:
        return "structure"
    pairs = list(zip(ours, theirs, strict=True))
    tied = [len(set(map(id, x))) for x in (ours, theirs)]
    if tied != [len({(id(x), id(y)) for x, y in pairs})] * 2:
        return "which of their tensors are one"
    for x, y in pairs:
        if (x.dtype, x.device, symbolic(x)) != (y.dtype, y.device, symbolic(y)):
            return "dtype or device"
        if x.ndim != y.ndim or not all(map(same_size, x.shape[1:], y.shape[1:])):
            return "length"
        if x.stride(0) == 0:  # joined, it would be written out
            return "memory: a tensor is expanded along the samples"
    return None


def one_batch_of(train: PyTree, val: PyTree) -> PyTree:
    """One batch of both, the train samples first. Leaves that are one tensor stay one."""
    (ours, treedef), theirs = flatten(train), flatten(val)[0]
    made: dict[int, Tensor] = {}
    for x, y in zip(ours, theirs, strict=True):
        if id(x) not in made:
            made[id(x)] = torch.cat([x, y])
    return unflatten(treedef, [made[id(x)] for x in ours])


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
