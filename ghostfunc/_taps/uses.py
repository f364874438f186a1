"""The uses of every parameter in a run, and the shapes they have there."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ghostfunc._base.compilable import known
from ghostfunc._base.remembered import memory, shapes_key
from ghostfunc._base.trees import ParamSpec, take, tensors_of
from ghostfunc._base.types import ModelFn, PyTree, Randomness
from ghostfunc._factors.cost import Meeting
from ghostfunc._taps.mode import TapMode
from ghostfunc._taps.tap import Site
from ghostfunc._trace.find import Traced, on_trace
from ghostfunc._trace.layout import StaleLayout
from ghostfunc._trace.tracked import constants


def meetings(
    model_fn: ModelFn,
    leaves: Sequence[Tensor],
    spec: ParamSpec,
    batch: PyTree,
    *,
    randomness: Randomness,
    exact: bool,
) -> list[list[Meeting]]:
    """The uses of every parameter in a run on `batch`.

    Not `exact`, the positions may be those of a batch of another length, scaled to this one.
    """
    exact = exact or _open(batch)
    remembered = memory(model_fn)
    lengths = sum(x[0].numel() for x in tensors_of(batch))

    def look(model: Traced) -> tuple[list[Site], float]:
        key = ("sites", model.trace, shapes_key(model.leaves))
        if exact:
            return _sites(model), 1.0
        if key not in remembered:
            remembered[key] = (lengths, _sites(model))
        seen_lengths, seen = remembered[key]
        return seen, lengths / seen_lengths

    model, (sites, ratio) = on_trace(look, model_fn, leaves, spec, batch, randomness)
    out: list[list[Meeting]] = [[] for _ in leaves]
    for site in sites:
        for i, kind, shape, positions, direct in site.targets:
            scaled = known(positions) if ratio == 1 else max(1, round(positions * ratio))
            out[i].append(Meeting(kind, shape, model.n, scaled, direct))
    return out


def _sites(model: Traced) -> list[Site]:
    """All uses and what their outputs look like: those of a run on two samples, remembered by
    the exact shapes of the batch, where those are known."""
    few = min(model.n, 2)
    sample = take(model.batch, range(few))
    if _open(sample):
        return _look_at_sites(model, few, sample)
    remembered = memory(model.model_fn)
    key = ("sites", model.trace, shapes_key((model.leaves, sample)))
    if key not in remembered:
        remembered[key] = _look_at_sites(model, few, sample)
    return remembered[key]


def _open(batch: PyTree) -> bool:
    """Whether some sizes are symbols: a compiled program for all lengths is being recorded."""
    return any(isinstance(size, torch.SymInt) for x in tensors_of(batch) for size in x.shape)


def _look_at_sites(model: Traced, few: int, sample: PyTree) -> list[Site]:
    try:
        return _sites_of(model, few, sample)
    except StaleLayout:  # the first few go another way than the batch
        return _sites_of(model, model.n, model.batch)


def _sites_of(model: Traced, few: int, sample: PyTree) -> list[Site]:
    tracked = constants(model.leaves, model.spec)
    mode = TapMode(model.trace, tracked, few, {}, {}, note_sites=True)
    with mode, torch.enable_grad():
        model.model_fn(model.spec.unflatten([t.shown for t in tracked]), sample)
    mode.finish()
    return mode.sites


def collecting_sites(model: Traced, collect: Collection[int], *, anew: bool) -> dict[int, Site]:
    """The uses of the parameters `collect`, by number."""
    if not collect:
        return {}
    sites = _sites_of(model, model.n, model.batch) if anew else _sites(model)
    return {
        number: site
        for number, site in enumerate(sites)
        if any(target[0] in collect for target in site.targets)
    }
