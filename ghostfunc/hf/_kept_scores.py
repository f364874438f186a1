"""The scores of a run: added up, kept in checkpoints, taken over from them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ghostfunc._base.errors import OptionError
from ghostfunc.hf._checkpoints import flaw_of, newest_whole
from ghostfunc.hf._fingerprint import fingerprint, seeded
from ghostfunc.hf._micro_batch import Values
from ghostfunc.hf._score_sets import ScoreSet
from ghostfunc.hf._state import STATE_FILE, Saved, check_recipe, load_state, save_state
from ghostfunc.shapley import init, update

KNOWN_BY = 256
"""How many samples a dataset is known by in a checkpoint, from all over it."""


def recipe_of(
    settings: Mapping[str, Any], sets: Mapping[str, ScoreSet], train: Any, seed: int
) -> dict[str, Any]:
    """What scores are made by: runs that differ in it are not added up."""
    with seeded(seed):
        recipe = dict(settings)
        recipe["score_dataset"] = {name: _known(dataset) for name, dataset in sets.items()}
        if settings["id_column"] is None and train is not None:  # samples are known by position
            recipe["train_dataset"] = _known(ScoreSet("train", train))
    return recipe


def _known(dataset: ScoreSet) -> str:
    return fingerprint(dataset.first(KNOWN_BY), dataset.length)


class KeptScores:
    """The state of a run's scores.

    Attributes:
        state: of `gf.shapley`.
        recipe: how they are made.
        scored_from: the step since which samples are scored: 0, or that of the plain Trainer's
            checkpoint that the run was resumed from.
    """

    def __init__(self, num_sets: int, recipe: dict[str, Any]) -> None:
        self.state, self.recipe, self.scored_from = init(num_sets), recipe, 0

    def add(self, values: Values) -> None:
        """The samples of a micro-batch whose step was taken."""
        self.state = update(self.state, values.ids, values.columns)

    def save(self, folder: Path, step: int) -> None:
        """Into a checkpoint."""
        facts = {"global_step": step, "scored_from_step": self.scored_from}
        save_state(Saved(self.state, self.recipe, facts), folder / STATE_FILE)

    def resume(self, wanted: str | bool, output_dir: Path, *, weights_alone: bool) -> str | bool:
        """Take over the scores of the checkpoint to resume from; returns its folder.

        Raises:
            OptionError: it is not whole, or its scores were made in another way.
        """
        if isinstance(wanted, str):
            path = Path(wanted)
            flaw = flaw_of(path, weights_alone=True)
            if flaw is not None:
                raise OptionError(
                    f"{path} is no whole checkpoint: {flaw}. train(resume_from_checkpoint=True) "
                    "takes the newest whole one of output_dir."
                )
        else:
            newest, passed = newest_whole(output_dir, weights_alone=weights_alone)
            said = "; ".join(f"{name} ({flaw})" for name, flaw in passed.items())
            if newest is None and passed:
                raise OptionError(
                    f"No checkpoint in {output_dir} is whole: {said}. Start a new run."
                )
            if newest is None:
                return True  # Trainer raises, and says so
            path = newest
            if passed:
                warnings.warn(f"Resuming from {path.name}; passed over: {said}.", stacklevel=3)
        self._take_over(path)
        return str(path)

    def _take_over(self, folder: Path) -> None:
        path = folder / STATE_FILE
        if path.exists():
            saved = load_state(path)
            check_recipe(saved, self.recipe, path)
            self.state = dict(saved.state)
            self.scored_from = int(saved.facts["scored_from_step"])
            return
        self.scored_from = int(folder.name.rpartition("-")[2])
        warnings.warn(
            f"{folder.name} has no scores (a plain Trainer wrote it): samples are scored from step "
            f"{self.scored_from} on.",
            stacklevel=4,
        )
