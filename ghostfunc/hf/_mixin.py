"""A `transformers.Trainer` whose training step also scores its samples, as a mixin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from accelerate.utils.memory import should_reduce_batch_size  # type: ignore[import-untyped]
from torch import Tensor, nn

from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import one_of
from ghostfunc._base.processes.ranks import Exchange
from ghostfunc._base.processes.sharding import reshard
from ghostfunc._base.torch_private import hooks_within, uncompiled
from ghostfunc.hf._blocks import warn_of_blocks
from ghostfunc.hf._divisor import TOLERANCE, Divisor, divisor_of, loss_of
from ghostfunc.hf._kept_scores import KeptScores
from ghostfunc.hf._memory import checkpointed, checkpoints_as_remat
from ghostfunc.hf._metrics import Metrics, StepTaken
from ghostfunc.hf._micro_batch import Form, Known, Pieces, Scoring, evaluating, trainable
from ghostfunc.hf._numbered import SAMPLE_ID, taken_ids, taken_places
from ghostfunc.hf._processes import average, averaging, inside, ranks_of
from ghostfunc.hf._pure_step import pure_step
from ghostfunc.hf._score_sets import ScoreSet, collated, score_sets
from ghostfunc.hf._scoring_run import RunState, ScoreKeeper
from ghostfunc.hf._settings import (
    KNOWN,
    is_sharded,
    library_of,
    refuse_missing_input,
    refuse_of_shards,
    refuse_own_step,
    refuse_settings,
)
from ghostfunc.hf._trained_loss import SampleLoss, one_item_each, trained_loss


class GhostMixin(ScoreKeeper):
    """Scores for any trainer that is a `transformers.Trainer`: `class Mine(GhostMixin, Theirs)`.

    Arguments, results and errors are those of `gf.hf.GhostTrainer`, which is
    `GhostMixin` before `Trainer`. A trainer with a loss of its own overrides `sample_loss`.

    Attributes:
        several_processes: whether this trainer runs under torchrun and accelerate.
    """

    several_processes: ClassVar[bool] = True

    def __init__(
        self,
        *args: Any,
        score_dataset: Any,
        score_form: Form = "sgd",
        score_order: Literal[1, 2] = 1,
        score_batch_size: int | None = None,
        sample_loss: SampleLoss | Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
        id_column: str | None = None,
        compile: bool = False,
        log_gradients: bool = False,
        **kwargs: Any,
    ) -> None:
        _check_options(score_form, score_order, score_batch_size)
        refuse_own_step(type(self), GhostMixin)
        sets = score_sets(score_dataset)
        super().__init__(*args, **self.with_score_sets(args, kwargs, sets))
        self.score_sets = self.prepared_score_sets(sets)
        refuse_settings(self, several_processes=self.several_processes)
        refuse_of_shards(
            self,
            {
                'score_form="exact"': score_form == "exact",
                "score_order=2": score_order == 2,
                "log_gradients": log_gradients,
                "compile": compile,
            },
        )
        self._ranks = ranks_of(self)
        self.score_form, self.score_order = score_form, score_order
        self._together, self.id_column = score_batch_size, id_column
        self._compiled = compile or self.args.torch_compile
        after_gradient = score_form == "exact" or score_order == 2
        self._after_gradient, self._log_gradients = after_gradient, log_gradients
        self._overridden_loss = library_of(type(self).compute_loss) not in KNOWN
        self._given_loss = sample_loss
        self._loss = self.sample_loss()
        self._kept = KeptScores(len(self.score_sets), {})
        self._run = RunState(Metrics(list(self.score_sets)))
        self.add_callback(StepTaken(self._step_taken))

    # --- for trainers with a loss of their own ---

    def sample_loss(self) -> SampleLoss:
        """The loss that this trainer trains, as sums and counts per sample."""
        given = self._given_loss
        if given is None:
            smoother = self.label_smoother  # of the beginning: trials do not change it
            smoothing = 0.0 if smoother is None else float(smoother.epsilon)
            return trained_loss(cast(nn.Module, self.model), smoothing, self.compute_loss_func)
        return given if isinstance(given, SampleLoss) else one_item_each(given)

    def with_score_sets(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], sets: dict[str, ScoreSet]
    ) -> dict[str, Any]:
        """The trainer's own keyword arguments; score datasets may be put among them."""
        return kwargs

    def prepared_score_sets(self, sets: dict[str, ScoreSet]) -> dict[str, ScoreSet]:
        """The score datasets as the trainer's collator takes them."""
        return sets

    def inputs_of(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The collated batch with whatever else `sample_loss` takes."""
        return dict(inputs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of one micro-batch; adds to `.grad` and to the scores. After the
        last of a step, `.grad` is the mean over all processes."""
        module = uncompiled(inside(model))
        reshard(module)  # what an evaluation left whole
        if self._ranks is None or is_sharded(self):
            return self._micro_batch(module, inputs, num_items_in_batch, None)
        with self._ranks.phase(f"training, after {self.state.global_step} steps") as phase:
            last = self.accelerator.sync_gradients
            exchange = averaging(phase, module, self.args.world_size) if last else None
            return self._micro_batch(module, inputs, num_items_in_batch, exchange)

    def _micro_batch(
        self,
        module: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Any,
        exchange: Exchange | None,
    ) -> Tensor:
        makes_models: Any = self.model_init
        if makes_models is not None and self._run.divisor is None:  # a run begins with another one
            self._loss = self.sample_loss()
        module.train()
        cast(Any, self.optimizer).train()  # those without a schedule train at other weights
        if self._given_loss is None:
            refuse_missing_input(module, inputs)
        inputs = dict(self._prepare_inputs(inputs))
        known = Known(taken_ids(inputs, self.id_column), taken_places(inputs))
        n = len(known.ids)
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else float(scaler.scale(torch.ones((), device="cpu")))
        self._run.scale = scale
        given = self.inputs_of(module, inputs)
        # What calls the trainer's own methods comes first: they may switch checkpoints on and off.
        last = self.accelerator.sync_gradients
        needed = last if self._after_gradient else self._run.directions is None
        pieces = self._score_pieces(module) if needed or self._run.divisor is None else {}
        scoring = self._scoring_of(module, given, inputs, n, num_items_in_batch, pieces)
        if not self._run.begin_step(scoring):
            raise OptionError(
                "Parameters were frozen or unfrozen between two micro-batches of one step, and "
                "values are of the step as a whole. Let callbacks do that in on_step_begin."
            )
        batch = scoring.training_batch(
            given, n, num_items_in_batch, self.current_gradient_accumulation_steps, scale
        )
        with checkpoints_as_remat(module):
            scoring.look(batch)
            losses = self._losses_and_values(scoring, known, batch, pieces, scale, exchange)
        return losses.sum().detach() / scale

    # --- how values are made ---

    def _losses_and_values(
        self,
        scoring: Scoring,
        known: Known,
        batch: dict[str, Any],
        pieces: Pieces,
        scale: float,
        exchange: Exchange | None,
    ) -> Tensor:
        run, last = self._run, self.accelerator.sync_gradients
        if not self._after_gradient:
            if run.directions is None:
                run.directions = self._directions_at(scoring, pieces, None)
            losses, values = scoring.one_pass(known, batch, run.directions, scale)
            run.pending.append(values)
        else:
            losses = scoring.keep(known, batch, run.books)
        if exchange is not None:
            average(exchange, scoring.module)
        if self._after_gradient and last:
            named = dict(scoring.module.named_parameters())
            grads = {k: cast(Tensor, named[k].grad) / scale for k in scoring.params}
            us = self._directions_at(scoring, pieces, grads)
            run.pending += scoring.kept_values(run.books, us, scale)
        if last:
            run.squares = scoring.squares(scale) if scoring.spread else {}
            if self._log_gradients:
                run.metrics.cosines(scoring.module, run.gradients)
            run.directions = run.scoring = None
        return losses

    def _directions_at(
        self, scoring: Scoring, pieces: Pieces, grads: dict[str, Tensor] | None
    ) -> dict[str, Any]:
        step = pure_step(self, scoring.module, self.score_form)
        try:
            with evaluating(scoring.module):
                if self._log_gradients:
                    self._run.gradients = scoring.gradients(pieces)
                return scoring.directions(pieces, step, grads)
        except RuntimeError as error:
            if not self.args.auto_find_batch_size or self._run.books:
                raise
            if not should_reduce_batch_size(error):
                raise
            raise OptionError(
                "The samples of score_dataset do not fit into memory, and auto_find_batch_size "
                "makes training batches smaller: set score_batch_size, or a smaller "
                f"per_device_eval_batch_size (now {self.args.per_device_eval_batch_size})."
            ) from error

    def _score_pieces(self, module: nn.Module) -> Pieces:
        """The samples of every score dataset that this step is scored against."""
        step, size, together = self.state.global_step, self.args.eval_batch_size, self._together
        collate = self._get_collator_with_removed_columns(self.data_collator, description="score")
        out = {}
        for name, dataset in self.score_sets.items():
            samples, seed = dataset.samples(step, size), self.args.seed + step
            parts = []
            how = (collate, seed, together, name, self.documents_in)
            for collated_batch, n in collated(samples, *how):
                inputs = dict(self._prepare_inputs(collated_batch))
                inputs.pop(self.id_column or SAMPLE_ID, None)
                with evaluating(module):
                    parts.append((self.inputs_of(module, inputs), n))
            out[name] = parts
        return out

    def _scoring_of(
        self,
        module: nn.Module,
        given: dict[str, Tensor],
        inputs: dict[str, Any],
        n: int,
        counted: Any,
        pieces: Pieces,
    ) -> Scoring:
        """The `Scoring` of what is trained now; at the first step held against Trainer's losses.

        What is frozen, hooked or checkpointed in the course of a run makes another program of the
        module: it gets a function of its own, whose trace is made before the pass that counts.
        """
        run = self._run
        health = bool(self.health_callbacks())
        first = run.scoring is None
        way = (id(module), checkpointed(module), hooks_within(module), trainable(module), health)
        if way not in run.scorings:
            scoring = run.scorings[way] = Scoring(
                module=module,
                loss=self._loss,
                divisor=run.divisor,
                order=self.score_order,
                mixed=self.accelerator.mixed_precision != "no",
                compiled=self._compiled,
                norms=self._log_gradients,
                spread=health,
                processes=self.args.world_size,
            )
        scoring = run.scorings[way]
        empty = not scoring.items_of(given, n)
        if empty and counted and run.divisor is None and not is_sharded(self):
            # It says nothing of what is divided by; the next micro-batch may.
            scoring.divisor = Divisor(counted=True, averaged=False)
        elif run.divisor is None:
            scoring.look_at_rows([(given, n)], "the first micro-batch")
            warn_of_blocks(module, given, n)
            with evaluating(module):
                run.divisor = self._hold_against_trainer(scoring, given, n, inputs, counted, pieces)
            first = False
        # A loss of the user's own may change in the course of a training.
        if first and self._overridden_loss and not empty:
            with evaluating(module):
                self._hold_against_trainer(scoring, given, n, inputs, counted, {})
        scoring.divisor = run.divisor or scoring.divisor
        scoring.follow()
        return scoring

    def _hold_against_trainer(
        self,
        scoring: Scoring,
        given: dict[str, Tensor],
        n: int,
        inputs: dict[str, Any],
        counted: Any,
        pieces: Pieces,
    ) -> Divisor:
        """Raise unless the samples' losses add up to Trainer's, in training and in score sets.
        Returns what Trainer divides by."""

        def loss_with(
            number: Any, of: Mapping[str, Any] = inputs, module: nn.Module = scoring.module
        ) -> float:
            with torch.no_grad():
                return loss_of(self, module, of, number)

        def numbered(part: Mapping[str, Any]) -> Any:
            if self.compute_loss_func is None:
                return None
            if self._ranks is not None:  # nobody asks the others here: a process may have failed
                n = len(next(iter(part.values()))) // self._loss.rows
                samples: Any = self._loss.by_sample(part, n)
                return self._loss.counts(samples).sum() * self._ranks.size
            return self.get_batch_samples(iter([part]), 1, self.args.device)[1]  # it may need it

        return scoring.hold(
            given,
            n,
            pieces,
            loss_with,
            lambda tolerance: divisor_of(self, loss_with, counted, tolerance),
            counted,
            self.current_gradient_accumulation_steps,
            numbered,
            TOLERANCE[self.accelerator.mixed_precision],
        )


def _check_options(form: object, order: object, batch_size: object) -> None:
    one_of("score_form", form, ("sgd", "previous_state", "exact"))
    if order not in (1, 2) or (order, form) == (2, "previous_state"):
        raise OptionError(
            f"score_order={order!r} with score_form={form!r} is not an option. Use "
            'order 1, or order 2 with "sgd" or "exact".'
        )
    if batch_size is None:
        return
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise OptionError(f"score_batch_size must be a positive integer; got {batch_size!r}.")
