"""The uses of every parameter in a run, and the shapes they have there."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field, replace

import torch

from ghostfunc._base.documents import packing_of
from ghostfunc._base.program import Program
from ghostfunc._base.remembered import STRUCTURES, Recent, memory, shapes_key
from ghostfunc._base.torch_private import known
from ghostfunc._base.trees import take, tensors_of
from ghostfunc._base.types import PyTree
from ghostfunc._factors.cost import UseShape
from ghostfunc._taps.mode import TapMode
from ghostfunc._taps.positions import recut_of
from ghostfunc._taps.use import UseOutput
from ghostfunc._trace.fitting import TracedModel, with_trace
from ghostfunc._trace.layout import StaleLayout
from ghostfunc._trace.tracked import constants

LOOKS = 256
"""Shapes of batches at which the outputs of all uses are remembered: a list as long as the model
has uses, each."""


@dataclass(frozen=True)
class Looked:
    """What the outputs of all uses look like.

    Attributes:
        typical: by trace and shapes of parameters: the elements of one batch's samples, and its
            outputs.
        exact: by the shapes of the batch as well.
    """

    typical: Recent[Hashable, tuple[int, list[UseOutput]]] = field(
        default_factory=lambda: Recent(STRUCTURES)
    )
    exact: Recent[Hashable, list[UseOutput]] = field(default_factory=lambda: Recent(LOOKS))


def use_shapes(
    program: Program, batch: PyTree, *, exact: bool
) -> tuple[TracedModel, list[list[UseShape]]]:
    """The program with its trace for `batch`, and the uses of every parameter in a run on it.

    Not `exact`, the positions may be those of a batch of another length, scaled to this one.
    """
    exact = exact or _open(batch)
    typical = memory(program.model_fn, Looked).typical
    lengths = sum(x[0].numel() for x in tensors_of(batch))

    def look(model: TracedModel) -> tuple[list[UseOutput], float]:
        if exact:
            return _outputs(model), 1.0
        key = model.trace, shapes_key(model.leaves)
        seen_lengths, seen = typical.made(key, lambda: (lengths, _outputs(model)))
        return seen, max(1, lengths) / max(1, seen_lengths)

    model, (outputs, ratio) = with_trace(look, program, batch)
    out: list[list[UseShape]] = [[] for _ in program.leaves]
    for output in outputs:
        for i, kind, shape, positions, direct in output.targets:
            scaled = known(positions) if ratio == 1 else max(1, round(positions * ratio))
            out[i].append(UseShape(kind, shape, model.n, scaled, direct))
    return model, out


def _outputs(model: TracedModel) -> list[UseOutput]:
    """All uses and what their outputs look like: those of a run on two samples, remembered by
    the exact shapes of the batch, where those are known."""
    few = min(model.n, 2)
    sizes = [x.shape[1:] for x in tensors_of(model.batch)]
    if any(isinstance(size, torch.SymInt) for shape in sizes for size in shape):
        return _look_at_outputs(model, few, take(model.batch, range(few)))
    key = model.trace, few, tuple(map(tuple, sizes)), shapes_key(model.leaves)
    exact = memory(model.model_fn, Looked).exact
    return exact.made(key, lambda: _look_at_outputs(model, few, take(model.batch, range(few))))


def _open(batch: PyTree) -> bool:
    """Whether some sizes are symbols: a compiled program for all lengths is being recorded."""
    return any(isinstance(size, torch.SymInt) for x in tensors_of(batch) for size in x.shape)


def _look_at_outputs(model: TracedModel, few: int, sample: PyTree) -> list[UseOutput]:
    try:
        return _outputs_of(model, few, sample)
    except StaleLayout:  # the first few go another way than the batch
        return _outputs_of(model, model.n, model.batch)


def _outputs_of(model: TracedModel, few: int, sample: PyTree) -> list[UseOutput]:
    tracked = constants(model.leaves, model.spec)
    few_model = replace(model, batch=sample, n=few, packing=packing_of(sample))
    recut = recut_of(few_model)
    mode = TapMode(model.trace, tracked, few, {}, {}, note_outputs=True, recut=recut)
    with mode, torch.enable_grad():
        model.model_fn(model.spec.unflatten([t.shown for t in tracked]), sample)
    mode.finish()
    return mode.outputs


def collecting_outputs(
    model: TracedModel, collect: Collection[int], *, refresh: bool
) -> dict[int, UseOutput]:
    """The uses of the parameters `collect`, by number."""
    if not collect:
        return {}
    outputs = _outputs_of(model, model.n, model.batch) if refresh else _outputs(model)
    return {
        number: output
        for number, output in enumerate(outputs)
        if any(target[0] in collect for target in output.targets)
    }
