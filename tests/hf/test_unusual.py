"""What would make a GhostTrainer's weights or scores others than Trainer's: followed or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from compare import assert_close
from hf_trainers import (
    Recorded,
    arguments,
    gpt2,
    in_order,
    llama,
    same_training,
    scores_by_definition,
    t5,
    texts,
)
from test_trained import small, token_mean, tokens
from torch import Tensor, nn
from transformers import BertForPreTraining, Trainer, TrainerCallback

import ghostfunc as gf

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
DATA = {"train_dataset": texts(8, 0), "score_dataset": texts(5, 1)}


ON_QUERIES: dict[str, Any] = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def ghost(path: Path, model: nn.Module | None = None, **options: Any) -> Any:
    args = options.pop("args", {"max_steps": 2})
    given = {"model": gpt2() if model is None else model, **DATA, **options}
    return gf.hf.GhostTrainer(args=arguments(path, **args), **given)


# --- out of memory ---


class OutOfMemory:
    """Memory runs out in the middle of the third step, at the fifth micro-batch."""

    calls = 0

    def training_step(self, model: Any, inputs: Any, count: Any = None) -> Tensor:
        self.calls += 1
        if self.calls == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return super().training_step(model, inputs, count)  # type: ignore[misc, no-any-return]


class PlainOutOfMemory(OutOfMemory, Trainer):
    """Begins again with smaller batches, from the weights after two steps."""


class GhostOutOfMemory(OutOfMemory, Recorded):
    """The same with scores."""


@pytest.mark.parametrize("form", ["sgd", "exact"])
def test_auto_find_batch_size(form: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, auto_find_batch_size=True, gradient_accumulation_steps=2)
    plain = gpt2()
    PlainOutOfMemory(model=plain, args=args, train_dataset=DATA["train_dataset"]).train()
    trainer = GhostOutOfMemory(model=gpt2(), args=args, **DATA, score_form=form)
    trainer.train()
    assert_close(trainer.model.state_dict(), plain.state_dict(), 1e-6, floor=1.0)
    assert trainer.scores.counts.sum() == 8 + 3 * 4  # an epoch of 3 a batch, three steps of 2
    if form == "sgd":
        del trainer.seen[3]  # its step was not taken
        batches = in_order(DATA["score_dataset"], 4)
        want = scores_by_definition(trainer, batches, tokens, counted=True, averaged=False)
        assert_close(trainer.scores.values, want, 1e-4)


def test_score_samples_out_of_memory(tmp_path: Path) -> None:
    """Smaller training batches would not help."""

    def tight(module: nn.Module, args: Any, inputs: Any) -> None:
        if not module.training and len(inputs["input_ids"]) == 4 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    model = gpt2()
    model.register_forward_pre_hook(tight, with_kwargs=True)
    trainer = ghost(tmp_path, model, args={"auto_find_batch_size": True})
    with pytest.raises(gf.OptionError, match=r"score_batch_size.*\(now 4\)"):
        trainer.train()


# --- optimizers ---


class TwoModes(torch.optim.SGD):
    """As optimizers without a schedule: they step in train mode alone."""

    training = False

    def train(self) -> None:
        self.training = True

    def step(self, *args: Any, **options: Any) -> Any:
        assert self.training
        return super().step(*args, **options)


def test_optimizers_are_put_into_train_mode(tmp_path: Path) -> None:
    model = gpt2()
    optimizer = TwoModes(model.parameters(), lr=0.1)
    ghost(tmp_path, model, optimizers=(optimizer, None)).train()
    assert optimizer.training


def test_maximized_losses(tmp_path: Path) -> None:
    """The step goes the other way, and so do values."""
    values = []
    for maximize in (False, True):
        model = gpt2()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, maximize=maximize)
        trainer = ghost(tmp_path, model, args={"max_steps": 1}, optimizers=(optimizer, None))
        trainer.train()
        values.append(trainer.scores.values)
    assert_close(values[1], -values[0], 1e-6)


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_gradients_are_refused(hook: str, tmp_path: Path) -> None:
    model = gpt2()
    getattr(model.transformer.wte.weight, hook)(lambda g: None)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(gf.OptionError, match=r"'transformer.wte.weight' has hooks"):
        ghost(tmp_path, model).train()
    assert_close([p.detach() for p in model.parameters()], before, 0.0)


# --- callbacks ---


class OtherMemory(TrainerCallback):
    """Weights get other memory, as when they are loaded or averaged by `.data`."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **rest: Any) -> None:
        if state.global_step == 1:
            weight = model.transformer.wte.weight
            weight.data = weight.data.clone() * 1.1


def test_weights_that_move_to_other_memory(tmp_path: Path) -> None:
    options = {**DATA, "callbacks": [OtherMemory()]}
    trainer = same_training(gpt2, arguments(tmp_path), 1e-6, **options)
    batches = in_order(DATA["score_dataset"], 4)
    want = scores_by_definition(trainer, batches, tokens, counted=True, averaged=False)
    assert_close(trainer.scores.values, want, 1e-4)


class FreezingMidStep(TrainerCallback):
    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any, **rest: Any) -> None:
        model.transformer.wte.weight.requires_grad_(requires_grad=False)


@pytest.mark.parametrize("form", ["sgd", "exact"])
def test_freezing_between_micro_batches_is_refused(form: str, tmp_path: Path) -> None:
    args = {"gradient_accumulation_steps": 2}
    trainer = ghost(tmp_path, args=args, callbacks=[FreezingMidStep()], score_form=form)
    with pytest.raises(gf.OptionError, match="between two micro-batches"):
        trainer.train()


# --- losses and steps of one's own ---


class ScheduledLoss(gf.hf.GhostTrainer):
    """A loss that is the model's at the first step alone."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **options)
        return loss * (1 + self.state.global_step)


def test_a_loss_that_changes_later(tmp_path: Path) -> None:
    trainer = ScheduledLoss(model=gpt2(), args=arguments(tmp_path), **DATA)
    with pytest.raises(gf.VerificationError, match="weights or scores would be others"):
        trainer.train()
    assert trainer.state.global_step == 1


class OwnStep(Trainer):
    def training_step(self, *args: Any, **options: Any) -> Any:
        return super().training_step(*args, **options) / 2


class Behind(gf.hf.GhostMixin, OwnStep):
    """Its step would not run."""


def test_a_training_step_behind_the_mixin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(gf.OptionError, match=r"OwnStep.training_step would not run"):
        Behind(model=gpt2(), args=arguments(tmp_path), **DATA)


@pytest.mark.parametrize("row", [lambda x: {"labels": x["labels"]}, lambda x: {}])
def test_training_rows_without_input(row: Callable[[Any], Any], tmp_path: Path) -> None:
    short = [row(x) for x in texts(8, 0)]
    with pytest.raises(gf.BatchError, match=r"training batch has no 'input_ids'"):
        ghost(tmp_path, train_dataset=short).train()


def tiny_losses(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = module(input_ids=batch["input_ids"]).logits
    return logits.logsumexp(-1).mean(1) * module.tiny


class OwnLoss(gf.hf.GhostTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        return tiny_losses(model, inputs).mean()


@pytest.mark.parametrize(("tiny", "logged"), [(1e-22, False), (1e-3, True)])
def test_norms_that_underflow_are_not_logged(tiny: float, logged: bool, tmp_path: Path) -> None:
    model: Any = gpt2()
    model.tiny = tiny
    args = arguments(tmp_path, max_steps=1, logging_steps=1)
    trainer = OwnLoss(model=model, args=args, **DATA, sample_loss=tiny_losses, log_gradients=True)
    trainer.train()
    (log,) = (x for x in trainer.state.log_history if "loss" in x)
    assert ("ghost/norm_q50" in log) == logged
    assert log.get("ghost/norm_q50", 1.0) > 0


# --- which samples a batch has ---


@pytest.mark.parametrize("number", ["doc-6", None, 1.5, float("nan"), 2**64])
def test_ids_that_are_no_integers(number: Any, tmp_path: Path) -> None:
    named = [{**x, "idx": number} for x in texts(8, 0)]
    with pytest.raises(gf.BatchError, match=r"idx=.* expected an integer.*leave id_column out"):
        ghost(tmp_path, train_dataset=named, id_column="idx").train()


class OwnLoader(gf.hf.GhostTrainer):
    """Gives batches by a loader of its own."""

    def get_train_dataloader(self) -> Any:
        loader = torch.utils.data.DataLoader(
            self.train_dataset, batch_size=3, collate_fn=self.data_collator
        )
        return self.accelerator.prepare(loader)


@pytest.mark.parametrize(
    ("column", "number", "said"),
    [
        (None, int, r"does not say which samples.*id_column \(now None\)"),
        ("other", int, r"does not say which samples.*id_column \(now 'other'\)"),
        ("idx", float, r"'idx' of a training batch is \[3\] of torch.float"),
    ],
)
def test_loaders_without_ids(column: Any, number: Any, said: str, tmp_path: Path) -> None:
    rows = [{**x, "idx": number(i)} for i, x in enumerate(texts(8, 0))]
    args = arguments(tmp_path, max_steps=2)
    given = {"train_dataset": rows, "score_dataset": texts(5, 1), "id_column": column}
    with pytest.raises(gf.BatchError, match=said):
        OwnLoader(model=gpt2(), args=args, **given).train()


def test_a_loader_of_ones_own(tmp_path: Path) -> None:
    rows = [{**x, "idx": 100 + i} for i, x in enumerate(texts(8, 0))]
    given = {"train_dataset": rows, "score_dataset": texts(5, 1)}
    trainer = OwnLoader(model=gpt2(), args=arguments(tmp_path), **given, id_column="idx")
    trainer.train()
    sequential = {"max_steps": 3, "train_sampling_strategy": "sequential"}
    usual = ghost(tmp_path, train_dataset=rows, args=sequential)
    usual.train()
    assert trainer.scores.ids.tolist() == list(range(100, 108))
    assert_close(trainer.scores.values, usual.scores.values, 1e-6)


def test_what_all_samples_share(tmp_path: Path) -> None:
    """One row for all, and arguments that are not given."""

    def shared(features: list[Any]) -> dict[str, Any]:
        out = {k: torch.stack([f[k] for f in features]) for k in features[0]}
        return {**out, "position_ids": torch.arange(12)[None], "attention_mask": None}

    trainers = [ghost(tmp_path, data_collator=f) for f in (shared, None)]
    for trainer in trainers:
        trainer.train()
    assert_close(trainers[0].scores.values, trainers[1].scores.values, 1e-6)
    flagged = ghost(tmp_path, data_collator=lambda f: {**shared(f), "use_cache": False})
    with pytest.raises(gf.BatchError, match=r"'use_cache' of the batch .* False. Leave it out"):
        flagged.train()


# --- samples without labels ---


@pytest.mark.parametrize("form", ["sgd", "exact"])
def test_a_first_micro_batch_without_labels(form: Any, tmp_path: Path) -> None:
    """Trainer divides by the items of all micro-batches; so do we, from the second on."""
    blank = [{**x, "labels": torch.full_like(x["labels"], -100)} for x in texts(2, 2)]
    args = arguments(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
    )
    data = {"train_dataset": blank + texts(6, 0), "score_dataset": texts(5, 1)}
    trainer = same_training(gpt2, args, 1e-6, **data, score_form=form)
    assert trainer.scores.values[:2].tolist() == [[0.0], [0.0]]
    if form == "sgd":
        batches = in_order(data["score_dataset"], 4)
        want = scores_by_definition(trainer, batches, tokens, counted=True, averaged=False)
        assert_close(trainer.scores.values, want, 1e-4)


def test_a_score_sample_without_labels_by_itself(tmp_path: Path) -> None:
    score = texts(5, 1)
    score[1] = {**score[1], "labels": torch.full_like(score[1]["labels"], -100)}
    trainers = [ghost(tmp_path, score_dataset=score, score_batch_size=size) for size in (None, 1)]
    for trainer in trainers:
        trainer.train()
    assert_close(trainers[1].scores.values, trainers[0].scores.values, 1e-5)


# --- losses that are not what they look like ---


def nearly_a_mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A mean over labelled tokens, and one over all: they are as good as equal in a model that
    knows nothing yet."""
    penalty = outputs.logits.logsumexp(-1).square().mean()
    return token_mean(outputs, labels) + 0.01 * penalty


def test_a_loss_that_agrees_by_chance(tmp_path: Path) -> None:
    with pytest.raises(gf.VerificationError, match="Trainer's loss of random outputs"):
        ghost(tmp_path, compute_loss_func=nearly_a_mean).train()


def test_a_model_with_a_loss_of_its_own(tmp_path: Path) -> None:
    """Its class has no known loss, and `loss_function` is there all the same."""
    with pytest.raises(gf.OptionError, match=r"does not know the loss of BertForPreTraining"):
        ghost(tmp_path, small(BertForPreTraining))


def test_smoothing_without_the_decoders_input(tmp_path: Path) -> None:
    args = {"label_smoothing_factor": 0.1}
    with pytest.raises(gf.BatchError, match=r"decoder_input_ids: DataCollatorForSeq2Seq"):
        ghost(tmp_path, t5(), args=args).train()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
def test_a_penalty_on_weights(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(
        init_r=3,
        target_r=2,
        target_modules=["c_attn"],
        total_step=10,
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    with pytest.raises(gf.VerificationError, match=r"a penalty on weights .*AdaLoRA"):
        ghost(tmp_path, peft.get_peft_model(gpt2(), config)).train()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    "config",
    [
        peft.C3AConfig(block_size=4, **ON_QUERIES),
        peft.LoraConfig(velora_config=peft.VeloraConfig(num_groups=4), **ON_QUERIES),
    ],
    ids=["c3a", "velora"],
)
def test_adapters_whose_gradients_are_their_own(config: Any, tmp_path: Path) -> None:
    """What their `torch.autograd.Function` returns is not the gradient of its values."""
    with pytest.raises(gf.UntrackedUseError, match=r'mode="ghost" alone: .*such as LoRA'):
        ghost(tmp_path, peft.get_peft_model(llama(), config)).train()
