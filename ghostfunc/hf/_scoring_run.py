"""What a scoring run keeps and yields: the parts of a trainer that do not compute."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import Trainer

from ghostfunc._base.errors import OptionError
from ghostfunc._base.processes.ranks import Ranks
from ghostfunc.hf._checkpoints import LAST_WRITTEN
from ghostfunc.hf._divisor import Divisor
from ghostfunc.hf._health import HealthCallback
from ghostfunc.hf._kept_scores import KeptScores, recipe_of
from ghostfunc.hf._metrics import Metrics
from ghostfunc.hf._micro_batch import Book, Form, Scoring, Values
from ghostfunc.hf._numbered import SAMPLE_ID, Numbered, NumberedCollator
from ghostfunc.hf._processes import of_all
from ghostfunc.hf._score_sets import ScoreSet
from ghostfunc.hf._table import write_table
from ghostfunc.shapley import Scores, finalize

TABLE_FILE = "scores.parquet"


@dataclass
class RunState:
    """What a run needs from one micro-batch to the next."""

    metrics: Metrics
    scorings: dict[Hashable, Scoring] = field(default_factory=dict)
    divisor: Divisor | None = None
    books: list[Book] = field(default_factory=list)
    directions: dict[str, Any] | None = None
    gradients: dict[str, Any] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)
    """Of the step's gradient, by parameter, where a callback reads them."""
    pending: list[Values] = field(default_factory=list)
    """Of the step that the optimizer has not taken yet."""
    scale: float = 1.0
    """Of the losses, by a loss scaler."""

    scoring: Scoring | None = None
    """Of the step whose micro-batches come now; None before the first."""

    def begin_step(self, scoring: Scoring) -> bool:
        """Whether a micro-batch trains the parameters that the first of its step trained."""
        self.scoring = self.scoring or scoring
        return self.scoring.params.keys() == scoring.params.keys()

    def drop_step(self) -> None:
        """Forget the micro-batches of a step that the optimizer will not take."""
        self.books.clear()
        self.pending, self.directions, self.scoring, self.squares = [], None, None, {}


class ScoreKeeper(Trainer):
    """A trainer whose checkpoints, table and logs hold scores; `GhostMixin` makes them."""

    score_sets: dict[str, ScoreSet]
    score_form: Form
    score_order: Literal[1, 2]
    id_column: str | None
    _kept: KeptScores
    _run: RunState
    _ranks: Ranks | None

    @property
    def scores(self) -> Scores:
        """The scores so far: `ids`, `values [s, sets]` (negative helps), `counts`."""
        return finalize(self._kept.state)

    def save_scores(self, path: str | Path) -> None:
        """Write the table of scores as Parquet, whole or not at all."""
        facts = {
            "values": "what the sample changed the validation loss by; negative helps",
            "form": self.score_form,
            "order": self.score_order,
            "global_step": self.state.global_step,
            "scored_from_step": self._kept.scored_from,
        }
        write_table(self.scores, list(self.score_sets), facts, Path(path))

    def health_callbacks(self) -> list[HealthCallback]:
        """The callbacks that log how gradients agree."""
        return [c for c in self.callback_handler.callbacks if isinstance(c, HealthCallback)]

    def documents_in(self, sample: Any) -> int:
        """How many documents of a batch's one row the collator makes of a sample of a dataset."""
        return 1

    # --- Trainer's own methods ---

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As `Trainer.train`; scores go on from the checkpoint too, and are written at the end,
        also where an exception ends it."""
        if self._ranks is None:
            resume_from_checkpoint = self._begin(resume_from_checkpoint)
        else:
            with self._ranks.phase("beginning the run") as phase:
                resume_from_checkpoint = self._begin(resume_from_checkpoint)
                known_by = json.dumps(self._kept.recipe, sort_keys=True)
                phase.alike = f"{known_by}, resumed from {resume_from_checkpoint}"
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            if self.args.process_index == 0:
                self.save_scores(Path(cast(str, self.args.output_dir)) / TABLE_FILE)

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """Where `auto_find_batch_size` begins a training, maybe again: steps that were taken count,
        and micro-batches that no step has taken do not."""
        self._run.drop_step()
        super()._update_auto_batch_size(batch_size)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; a checkpoint gets the scores first and what marks it as whole,
        `trainer_state.json`, last."""
        if _internal_call and output_dir is not None and self.args.should_save:
            folder = Path(output_dir)
            # A folder of an earlier run is not whole while it is written over.
            (folder / LAST_WRITTEN).unlink(missing_ok=True)
            self._kept.save(folder, self.state.global_step)  # the same in every process
        super().save_model(output_dir, _internal_call)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; where a training loss is logged, what the scores were since the last
        time stands beside it."""
        if "loss" in logs:
            logs.update(self._run.metrics.taken())
            for health in self.health_callbacks():
                logs.update(health.taken())
        super().log(logs, start_time)

    def get_train_dataloader(self) -> Any:
        """As `Trainer.get_train_dataloader`, with a number beside every sample."""
        dataset, collate = self.train_dataset, self.data_collator
        key = self.id_column or SAMPLE_ID
        self._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        # For the time of this call: validation batches carry no numbers.
        self._signature_columns = cast(Any, [*columns, key])
        self.data_collator = NumberedCollator(collate, key, self.documents_in)
        if self.id_column is None and dataset is not None:
            if isinstance(dataset, torch.utils.data.IterableDataset):
                raise OptionError(
                    "An iterable train_dataset has no indices: give every sample an integer id and "
                    "name its column with id_column."
                )
            self.train_dataset = Numbered(dataset)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = dataset, collate
            self._signature_columns = columns

    def _begin(self, resume_from: str | bool | None) -> str | bool | None:
        """A run begins: nothing is scored yet, except by the checkpoint that is resumed from."""
        settings = {
            "score_form": self.score_form,
            "score_order": self.score_order,
            "id_column": self.id_column,
        }
        recipe = recipe_of(settings, self.score_sets, self.train_dataset, self.args.seed)
        self._kept = KeptScores(len(self.score_sets), recipe)
        self._run = RunState(Metrics(list(self.score_sets)))
        for health in self.health_callbacks():
            if self.args.world_size > 1:
                raise OptionError(
                    "HealthCallback knows the samples of one process; this run has "
                    f"{self.args.world_size}, whose gradients are averaged. Leave it out."
                )
            health.begin()
        if not resume_from:
            return resume_from
        folder, weights_alone = Path(cast(str, self.args.output_dir)), self.args.save_only_model
        return self._kept.resume(resume_from, folder, weights_alone=weights_alone)

    def _step_taken(self) -> None:
        """After the optimizer: values count if its step was taken (a loss scaler may skip it).

        Of fused optimizers, which skip inside their kernel, accelerate does not notice; the scaler
        then lowers its scale.
        """
        scaler = self.accelerator.scaler
        lowered = scaler is not None and scaler.get_scale() < self._run.scale
        if not (lowered or self.accelerator.optimizer_step_was_skipped):
            pending = self._run.pending
            for values in pending if self._ranks is None else [of_all(self._ranks, pending)]:
                self._kept.add(values.of_samples())
                self._run.metrics.add(values.of_samples())
            if self._run.squares:
                for health in self.health_callbacks():
                    health.add(self._run.pending, self._run.squares)
        self._run.pending = []
