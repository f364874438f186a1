"""`--score influence`: the target's direction through an inverse curvature made of the pool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from ghostfunc._base.types import PyTree
from ghostfunc.cli._data import content_of
from ghostfunc.cli._inputs import Inputs
from ghostfunc.cli._options import Curvature, Score
from ghostfunc.curvature import EKFAC, ekfac, load
from ghostfunc.data._batches import group
from ghostfunc.data._parts import Parts

KEPT = 20
"""How many times a pass over the batches is written to disk, at most."""

STATE, DONE = "state.safetensors", "ekfac.safetensors"


class Batches(Sequence[PyTree]):
    """Batches of some samples of the pool, by length under the token budget; the longest first."""

    def __init__(self, inputs: Inputs, samples: Sequence[int]) -> None:
        self._inputs = inputs
        lengths = [len(inputs.pool.tokens[i]) for i in samples]
        groups = group(lengths, inputs.token_budget, None)
        self._samples = [[samples[at] for at in members] for members in groups]

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, at: int) -> PyTree: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[PyTree]: ...
    def __getitem__(self, at: int | slice) -> PyTree:
        if isinstance(at, slice):
            return [self._inputs.batch(samples) for samples in self._samples[at]]
        return self._inputs.batch(self._samples[at])


def chosen(count: int, of: int) -> list[int]:
    """`count` of so many samples, evenly spaced; all if there are no more."""
    count = min(count, of)
    return [i * of // count for i in range(count)]


def made(inputs: Inputs, batches: Sequence[PyTree], options: Curvature, **more: Any) -> EKFAC:
    """The curvature of the batches' mean loss."""
    model = inputs.model
    return ekfac(
        model.model_fn,
        model.params,
        batches,
        fisher=options.fisher,
        likelihood=model.likelihood if options.fisher == "sampled" else None,
        draws=options.draws,
        seed=options.seed,
        max_side=options.max_side,
        diagonal=options.diagonal,
        **more,
    )


def influence_direction(inputs: Inputs, options: Score, u: PyTree, run: Path) -> PyTree:
    """`(C + damping I)^-1 u`. The curvature is kept in the folder of the run: a run that was
    stopped goes on with what is there."""
    curvature = _resumed(inputs, options, run / "curvature")
    asked = options.curvature
    return curvature.solve(u, asked.damping, relative=asked.relative_damping)


def _resumed(inputs: Inputs, options: Score, folder: Path) -> EKFAC:
    asked = options.curvature
    recipe = {
        "pool": content_of(options.pool),
        "rows": len(inputs.pool),
        "max_length": inputs.model.max_length,
        "token_budget": inputs.token_budget,
        "curvature_rows": asked.curvature_rows,
        "fisher": asked.fisher,
        "draws": asked.draws,
        "seed": asked.seed,
        "max_side": asked.max_side,
        "diagonal": list(asked.diagonal),
    }
    Parts(folder, recipe)  # refuses the folder of another run
    done = folder / DONE
    if done.exists():
        return load(done, inputs.model.params)
    batches = Batches(inputs, chosen(asked.curvature_rows, len(inputs.pool)))
    curvature = made(
        inputs,
        batches,
        asked,
        checkpoint=folder / STATE,
        checkpoint_every=max(1, len(batches) // KEPT),
        progress=not options.quiet,
    )
    curvature.save(done)
    (folder / STATE).unlink(missing_ok=True)
    return curvature
