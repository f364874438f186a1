"""The trace that fits a batch: one that is remembered, or a new one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from ghostfunc._base.errors import WAYS_OUT, ControlFlowError
from ghostfunc._base.purity import not_captured
from ghostfunc._base.remembered import memory, structure
from ghostfunc._base.torch_private import symbolic, wrapped
from ghostfunc._base.trees import ParamSpec, batch_size, tensors_of
from ghostfunc._base.types import ModelFn, PyTree, Randomness
from ghostfunc._trace.layout import StaleLayout
from ghostfunc._trace.make import pairs_to_trace, trace_model
from ghostfunc._trace.trace import Trace

T = TypeVar("T")


MAX_TRACES = 8
"""Ways through one model that are remembered."""


@dataclass(frozen=True)
class TracedModel:
    """A model function with its trace, ready to be run on one batch.

    Made by `with_trace`.
    """

    model_fn: ModelFn
    leaves: list[Tensor]
    spec: ParamSpec
    batch: PyTree
    n: int
    trace: Trace


def with_trace(
    use: Callable[[TracedModel], T],
    model_fn: ModelFn,
    leaves: Sequence[Tensor],
    spec: ParamSpec,
    batch: PyTree,
    randomness: Randomness,
) -> tuple[TracedModel, T]:
    """`use` a trace that fits this batch: one of those remembered, or a new one."""
    leaves = [_plain(x) for x in leaves]
    n = batch_size(batch)
    traces: list[Trace] = memory(model_fn).setdefault(
        structure(model_fn, spec, leaves, batch, randomness), []
    )
    for trace in list(traces):
        model = TracedModel(model_fn, leaves, spec, batch, n, trace)
        try:
            result = use(model)
        except StaleLayout:
            continue  # control flow went another way: perhaps one that was traced before
        _remember(traces, trace)
        return model, result
    if any(map(symbolic, tensors_of(batch))):
        raise not_captured()
    observed = ""
    for pair in pairs_to_trace(model_fn, leaves, spec, batch):
        trace = trace_model(model_fn, leaves, spec, batch, randomness, pair)
        model = TracedModel(model_fn, leaves, spec, batch, n, trace)
        try:
            result = use(model)
        except StaleLayout as stale:
            observed = str(stale)
            continue
        _remember(traces, trace)
        return model, result
    raise ControlFlowError(
        "model_fn does not call the same ops each time it runs on this batch "
        f"({observed}): its control flow depends on its data. {WAYS_OUT}"
    )


def _remember(traces: list[Trace], trace: Trace) -> None:
    """Put the trace of the last run first. Other threads may do so at the same time."""
    traces[:] = [trace, *(x for x in list(traces) if x is not trace)][:MAX_TRACES]


def trace_of(
    model_fn: ModelFn,
    leaves: Sequence[Tensor],
    spec: ParamSpec,
    batch: PyTree,
    *,
    randomness: Randomness,
) -> Trace:
    """A trace of the model, made now if there is none."""
    return with_trace(lambda model: model.trace, model_fn, leaves, spec, batch, randomness)[1]


def _plain(x: Tensor) -> Tensor:
    """A parameter without the caller's autograd history, but inside the caller's transforms."""
    return x.detach() if x.requires_grad and not wrapped(x) else x
