"""A `transformers.Trainer` that also says what every training sample did to a validation loss."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from ghostfunc._base.errors import OptionError, VerificationError
from ghostfunc._base.module import accumulate_grads, from_module
from ghostfunc._base.options import one_of
from ghostfunc._base.remembered import structure
from ghostfunc._base.trees import flatten_params
from ghostfunc._base.types import ModelFn
from ghostfunc._quantities.quantity import Dot, Quantity
from ghostfunc._taps.uses import use_shapes
from ghostfunc._transforms.factored import FactoredGrads, factored_grads
from ghostfunc._transforms.vjp import GhostVjp, ghost_vjp
from ghostfunc.hf._files import load_state, save_state, write_table
from ghostfunc.hf._numbered import SAMPLE_ID, Numbered, NumberedCollator
from ghostfunc.hf._sample_losses import SampleLoss, one_item_each, sample_loss_of
from ghostfunc.shapley import (
    Optimizer,
    Scores,
    clipped,
    directions,
    finalize,
    from_optimizer,
    init,
    sgd,
    update,
)

Form: TypeAlias = Literal["sgd", "previous_state", "exact"]

STATE_FILE = "ghost_scores.pt"
TABLE_FILE = "scores.parquet"
TOLERANCE = 1e-4


class GhostTrainer(Trainer):
    """`transformers.Trainer` with a value for every training sample.

        trainer = gf.hf.GhostTrainer(model=model, args=args, train_dataset=train,
                                     score_dataset=val)
        trainer.train()
        trainer.scores              # and <output_dir>/scores.parquet

    The weights are those that `Trainer` would train, up to rounding: the same loss with the same
    weighting (tokens weigh alike over all micro-batches of a step, as in Trainer), dropout with the
    same draws, clipping, schedule, callbacks, progress bar, checkpoints. At the first step the loss
    is compared with the one Trainer would train. The value of a sample is that of
    `gf.shapley.step`, summed over its steps: what it changed the loss of `score_dataset` by.
    NEGATIVE VALUES LOWERED THE LOSS.

    Args:
        *args, **kwargs: those of `Trainer`.
        score_dataset: a map-style dataset like `train_dataset`, or a dict of several, each a column
            of scores. Every optimizer step is scored against `per_device_eval_batch_size` samples
            of each, in order, starting over at the end. Their loss is the mean over their items
            (tokens of a language model), in evaluation mode.
        score_form: "sgd": `-lr weight <g_i, u>`, the score of plain SGD, in one pass.
            "previous_state": through the optimizer, from its moments before the step, in one pass.
            "exact": through the optimizer and the clipping, at the step's own gradient; factors of
            all micro-batches of the step are kept in memory.
        score_order: 1, or 2 for "sgd" and "exact": with the curvature of the score loss.
        sample_loss: `f(module, batch) -> [n]` for models whose loss is not known here; its mean
            over a batch must be the loss that is trained.
        id_column: the column with an integer id of every sample; by default the index in
            `train_dataset`.
        compile: run the pass of the one-pass forms as one compiled program (`torch.compile`);
            random numbers of a model with dropout are then others than without.

    The table has the columns `sample_id`, `steps` (how often it was trained on) and `value_<name>`
    per score dataset (`value_score` for a single one). Checkpoints hold the scores so far;
    `train(resume_from_checkpoint=...)` goes on with them.

    Raises:
        OptionError: what this trainer does not do: several processes or devices, fp16,
            DeepSpeed, FSDP, activation checkpointing, a compiled model, label smoothing,
            `compute_loss_func`, NEFTune, `auto_find_batch_size`.
        VerificationError: the sample losses do not add up to the loss Trainer would train.
    """

    def __init__(
        self,
        *args: Any,
        score_dataset: Any,
        score_form: Form = "sgd",
        score_order: Literal[1, 2] = 1,
        sample_loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
        id_column: str | None = None,
        compile: bool = False,
        **kwargs: Any,
    ) -> None:
        one_of("score_form", score_form, ("sgd", "previous_state", "exact"))
        if score_order not in (1, 2) or (score_order, score_form) == (2, "previous_state"):
            raise OptionError(
                f"score_order={score_order!r} with score_form={score_form!r} is not an option. Use "
                'order 1, or order 2 with "sgd" or "exact".'
            )
        if compile and (score_form == "exact" or score_order == 2):
            raise OptionError(
                "compile=True is for the forms of one pass: score_form="
                '"sgd" or "previous_state", score_order=1.'
            )
        super().__init__(*args, **kwargs)
        _refuse(self, second_order=score_order == 2)
        sets = score_dataset if isinstance(score_dataset, dict) else {"score": score_dataset}
        if not sets or any(len(dataset) == 0 for dataset in sets.values()):
            raise OptionError("score_dataset is empty; scores need at least one sample.")
        self.score_sets: dict[str, Any] = sets
        self.score_form, self.score_order = score_form, score_order
        self.id_column = id_column
        self._sample_loss: SampleLoss = (
            sample_loss_of(self.model) if sample_loss is None else one_item_each(sample_loss)
        )
        self._pass = torch.compile(_one_pass, fullgraph=True) if compile else _one_pass
        self._ghost: tuple[nn.Module, ModelFn, dict[str, Tensor]] | None = None
        self._score_state = init(len(sets))
        self._directions: dict[str, Any] | None = None
        self._books: list[tuple[Tensor, FactoredGrads]] = []
        self._looked_at: set[Hashable] = set()

    # --- what a run yields ---

    @property
    def scores(self) -> Scores:
        """The scores so far: `ids`, `values [s, sets]` (negative helps), `counts`."""
        return finalize(self._score_state)

    def save_scores(self, path: str | Path) -> None:
        """Write the table of scores as Parquet, whole or not at all."""
        facts = {
            "values": "what the sample changed the validation loss by; negative helps",
            "form": self.score_form,
            "order": self.score_order,
            "global_step": self.state.global_step,
        }
        write_table(self.scores, list(self.score_sets), facts, Path(path))

    @property
    def _output_dir(self) -> str:
        return cast(str, self.args.output_dir)

    # --- Trainer's own methods ---

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As `Trainer.train`; scores go on from the checkpoint too, and are written at the end."""
        if resume_from_checkpoint is True:
            # Without a checkpoint Trainer raises, and says so.
            resume_from_checkpoint = get_last_checkpoint(self._output_dir) or True
        if isinstance(resume_from_checkpoint, str):
            path = Path(resume_from_checkpoint) / STATE_FILE
            self._score_state = load_state(path, len(self.score_sets))
        else:
            self._score_state = init(len(self.score_sets))
        self._ghost, self._directions, self._books = None, None, []
        self._looked_at = set()
        output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self.save_scores(Path(self._output_dir) / TABLE_FILE)
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; a checkpoint gets the scores first and what marks it as whole,
        `trainer_state.json`, last."""
        if _internal_call and output_dir is not None:
            save_state(self._score_state, Path(output_dir) / STATE_FILE)
        super().save_model(output_dir, _internal_call)

    def get_train_dataloader(self) -> Any:
        """As `Trainer.get_train_dataloader`, with a number beside every sample."""
        dataset, collate = self.train_dataset, self.data_collator
        key = self.id_column or SAMPLE_ID
        self._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        # For the time of this call: validation batches carry no numbers.
        self._signature_columns = cast(Any, [*columns, key])
        self.data_collator = NumberedCollator(collate, key)
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

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of one micro-batch; adds to `.grad` and to the scores."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        ids = inputs[SAMPLE_ID].cpu()
        inputs = {k: x for k, x in inputs.items() if k != SAMPLE_ID}
        if self._ghost is None or self._ghost[0] is not model:
            self._ghost = (model, *from_module(model, self._weighted))
            self._compare_losses(model, inputs, num_items_in_batch)
        _, model_fn, params = self._ghost
        batch = self._weigh(inputs, self._items(inputs, num_items_in_batch))
        self._look_first(model_fn, params, batch)
        if self.score_form == "exact" or self.score_order == 2:
            return self._two_halves(model, model_fn, params, ids, batch)
        if self._directions is None:
            self._directions = self._score_directions(model, model_fn, params, None)
        read: dict[str, Quantity] = {name: Dot(u) for name, u in self._directions.items()}
        out = self._pass(model_fn, params, batch, read)
        accumulate_grads(model, out.grads or {})
        columns = [torch.stack(list(dots.values())).sum(0) for dots in out.values.values()]
        self._score_state = update(self._score_state, ids, torch.stack(columns, dim=1))
        if self.accelerator.sync_gradients:
            self._directions = None
        return out.losses.sum().detach()

    # --- how values are made ---

    def _look_first(
        self, model_fn: ModelFn, params: dict[str, Tensor], batch: dict[str, Any]
    ) -> None:
        """Have the model traced and proved now, so that its own draws are all that is drawn in
        training: the same as without scores."""
        leaves, spec = flatten_params(params)
        key = structure(model_fn, spec, leaves, batch, "different")
        with torch.random.fork_rng():
            if key not in self._looked_at:
                ghost_vjp(model_fn, params, batch, {}, grads=True, randomness="different")
                self._looked_at.add(key)
            use_shapes(model_fn, leaves, spec, batch, randomness="different", exact=True)

    def _two_halves(
        self,
        model: nn.Module,
        model_fn: ModelFn,
        params: dict[str, Tensor],
        ids: Tensor,
        batch: dict[str, Any],
    ) -> Tensor:
        """The gradient of all micro-batches first, then the values of all their samples."""
        book = factored_grads(model_fn, params, batch, randomness="different")
        accumulate_grads(model, book.weighted_sum(torch.ones_like(book.losses)))
        self._books.append((ids, book))
        if self.accelerator.sync_gradients:
            named = dict(model.named_parameters())
            grads = {name: named[name].grad for name in params}
            us = self._score_directions(model, model_fn, params, grads)
            for some, kept in self._books:
                columns = [kept.dot_prods(u) for u in us.values()]
                self._score_state = update(self._score_state, some, torch.stack(columns, dim=1))
            self._books = []
        return book.losses.sum().detach()

    def _score_directions(
        self,
        model: nn.Module,
        model_fn: ModelFn,
        params: dict[str, Tensor],
        grads: dict[str, Tensor | None] | None,
    ) -> dict[str, Any]:
        val_sets = {name: self._score_batch(dataset) for name, dataset in self.score_sets.items()}
        with _evaluating(model):
            return directions(
                model_fn,
                params,
                val_sets,
                optimizer=self._pure_optimizer(model),
                grads=grads,
                order=self.score_order,
            )

    def _pure_optimizer(self, model: nn.Module) -> Optimizer:
        held = cast(Any, self.optimizer).optimizer  # accelerate wraps it
        if self.score_form == "sgd":
            rates = {float(group["lr"]) for group in held.param_groups}
            if len(rates) > 1:
                raise OptionError(
                    f"The optimizer's groups have learning rates {sorted(rates)}; "
                    'score_form="sgd" needs a single one. Use "previous_state" or "exact".'
                )
            return sgd(lr=rates.pop())
        pure = from_optimizer(held, model)
        clips = self.score_form == "exact" and self.args.max_grad_norm > 0
        return clipped(pure, max_norm=self.args.max_grad_norm) if clips else pure

    def _score_batch(self, dataset: Any) -> dict[str, Any]:
        """The samples of a score dataset that this step is scored against."""
        size = min(self.args.eval_batch_size, len(dataset))
        start = self.state.global_step * size
        collate = self._get_collator_with_removed_columns(self.data_collator, description="score")
        with torch.random.fork_rng():
            # Collators may draw (masked tokens): the same draws in a resumed run.
            torch.manual_seed(self.args.seed + self.state.global_step)
            batch = collate([dataset[(start + j) % len(dataset)] for j in range(size)])
        inputs = dict(self._prepare_inputs(batch))
        inputs.pop(self.id_column or SAMPLE_ID, None)
        # `directions` takes the mean over samples; the loss is the mean over items.
        return self._weigh(inputs, self._items(inputs, None, whole=True) / size)

    def _weighted(self, module: nn.Module, batch: dict[str, Any]) -> Tensor:
        return self._sample_loss.sums(module, batch["inputs"]) * batch["weight"]

    def _weigh(self, inputs: dict[str, Tensor], items: Tensor) -> dict[str, Any]:
        n = len(self._sample_loss.items(inputs))
        return {"inputs": inputs, "weight": items.reciprocal().expand(n)}

    def _items(self, inputs: dict[str, Tensor], counted: Any, *, whole: bool = False) -> Tensor:
        """What Trainer divides the summed losses of a micro-batch by."""
        own = self._sample_loss.items(inputs).sum().float()
        if whole:
            return own
        if counted is not None and self.model_accepts_loss_kwargs:
            return torch.as_tensor(counted, device=own.device).float()
        return own * self.current_gradient_accumulation_steps

    def _compare_losses(self, model: nn.Module, inputs: dict[str, Any], counted: Any) -> None:
        """Raise unless the sample losses add up to the loss Trainer would train."""
        batch = self._weigh(inputs, self._items(inputs, counted))
        with _evaluating(model), torch.no_grad():
            ours = float(self._weighted(model, batch).sum())
            loss = self.compute_loss(model, dict(inputs), num_items_in_batch=counted)
            theirs = float(cast(Tensor, loss))
        if not self.model_accepts_loss_kwargs or counted is None:
            theirs /= self.current_gradient_accumulation_steps
        if not abs(ours - theirs) <= TOLERANCE * abs(theirs):
            raise VerificationError(
                f"The losses of the samples add up to {ours:.6g}, but Trainer would train "
                f"{theirs:.6g} on the same micro-batch: the weights would not be the same. Pass "
                "sample_loss=f with f(module, batch) -> [n] that is the model's own loss."
            )


def _one_pass(
    model_fn: ModelFn,
    params: dict[str, Tensor],
    batch: dict[str, Any],
    read: dict[str, Quantity],
) -> GhostVjp:
    """Losses, gradient and values of a micro-batch."""
    return ghost_vjp(model_fn, params, batch, read, grads=True, randomness="different")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and the same random numbers afterwards."""
    flags = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def _refuse(trainer: Trainer, *, second_order: bool) -> None:
    """Raise for settings under which scores or weights would be other than they are said to be."""
    args = trainer.args
    found: Mapping[str, bool] = {
        f"several processes or devices ({args.parallel_mode})": args.world_size > 1
        or args.n_gpu > 1,
        "fp16 (use bf16)": args.fp16,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": bool(trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled),
        "activation checkpointing": bool(args.activation_checkpointing),
        "torch_compile (GhostTrainer has compile=True)": args.torch_compile,
        "label smoothing": trainer.label_smoother is not None,
        "compute_loss_func (pass sample_loss)": trainer.compute_loss_func is not None,
        "NEFTune noise": trainer.neftune_noise_alpha is not None,
        "auto_find_batch_size": args.auto_find_batch_size,
        "use_liger_kernel": args.use_liger_kernel,
        "bf16 and score_order=2 (torch cannot take second derivatives under autocast)": args.bf16
        and second_order,
    }
    refused = [name for name, present in found.items() if present]
    if refused:
        raise OptionError(f"GhostTrainer does not train with {', '.join(refused)}.")
