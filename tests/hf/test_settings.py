"""GhostTrainer under Trainer's ordinary settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from compare import assert_close
from hf_trainers import (
    Recorded,
    arguments,
    bert,
    class_of,
    gpt2,
    in_order,
    labelled,
    llama,
    mixtral,
    same_training,
    scores_by_definition,
    texts,
)
from test_trained import TOKENS, lora, token_sums, tokens
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import HPSearchBackend

import ghostfunc as gf

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
DATA = {"train_dataset": texts(8, 0), "score_dataset": texts(5, 1)}


def expected(trainer: Any, *, counts: Callable[[Any], int] = tokens) -> Tensor:
    batches = in_order(DATA["score_dataset"], 4)
    return scores_by_definition(trainer, batches, counts, counted=True, averaged=False)


def ghost(args: Any, make: Callable[[], nn.Module] = gpt2, **options: Any) -> Any:
    return gf.hf.GhostTrainer(model=make(), args=args, **{**DATA, **options})


# --- checkpoints of activations ---


@pytest.mark.parametrize("make", [partial(gpt2, resid_pdrop=0.1), llama, lora()])
def test_activation_checkpoints(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    args = arguments(tmp_path, gradient_accumulation_steps=2, activation_checkpointing=True)
    trainer = same_training(make, args, 1e-6, **DATA)
    layers = [m for m in trainer.model.modules() if "gradient_checkpointing" in vars(m)]
    assert layers
    assert all(m.gradient_checkpointing for m in layers)  # as Trainer leaves them
    assert not any("forward" in vars(m) for m in layers)
    without = ghost(arguments(tmp_path, gradient_accumulation_steps=2), make)
    without.train()
    assert_close(trainer.scores.values, without.scores.values, 1e-5)


class Switching(TrainerCallback):
    """Checkpoints on for the second step, off for the third, on for the last."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **rest: Any) -> None:
        if state.global_step in (1, 3):
            model.activation_checkpointing_enable()
        else:
            model.activation_checkpointing_disable()


def test_activation_checkpoints_switched_on_and_off(tmp_path: Path) -> None:
    make, args = partial(gpt2, resid_pdrop=0.1), arguments(tmp_path, max_steps=4)
    options = {**DATA, "callbacks": [Switching()]}
    trainer = same_training(make, args, 1e-6, **options)
    without = ghost(args, make)
    without.train()
    assert_close(trainer.scores.values, without.scores.values, 1e-5)


def test_layers_run_again_in_the_backward_pass(tmp_path: Path) -> None:
    """Score samples and micro-batches run through a layer twice in a step, and not otherwise."""
    seen: dict[bool, list[int]] = {}
    for on in (False, True):
        model, runs = gpt2(), seen.setdefault(on, [])
        model.transformer.h[0].mlp.register_forward_pre_hook(
            lambda m, x, runs=runs: runs.append(len(x[0]))
        )
        args = arguments(
            tmp_path / str(on), activation_checkpointing=on, per_device_eval_batch_size=5
        )
        ghost(args, partial(lambda model: model, model)).train()
    assert seen[True].count(5) > seen[False].count(5) > 0
    assert [5, 5, 2, 2] in [seen[True][i : i + 4] for i in range(len(seen[True]))]


# --- the commonest recipe ---


def test_fifty_steps_of_lora_are_those_of_trainer(tmp_path: Path) -> None:
    """LoRA, checkpoints of activations, two micro-batches, a schedule, clipping: weights to 1e-6,
    and scores those of the definition. In bfloat16: `test_half_precision`."""
    args = arguments(
        tmp_path,
        max_steps=50,
        gradient_accumulation_steps=2,
        activation_checkpointing=True,
        warmup_steps=5,
        lr_scheduler_type="cosine",
        max_grad_norm=0.5,
    )
    trainer = same_training(lora(), args, 1e-6, **DATA)
    assert_close(trainer.scores.values, expected(trainer), 1e-4)


# --- compiled ---


def test_torch_compile_is_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = torch.compile

    def eager_backend(function: Any = None, **options: Any) -> Any:
        calls.append(function)
        return real(function, **{**options, "backend": "aot_eager"})

    monkeypatch.setattr(torch, "compile", eager_backend)
    plain = ghost(arguments(tmp_path))
    plain.train()
    trainer = ghost(arguments(tmp_path, torch_compile=True, torch_compile_backend="aot_eager"))
    trainer.train()
    assert any(getattr(f, "__name__", "") == "one_pass" for f in calls)
    assert_close(trainer.scores.values, plain.scores.values, 1e-4)
    assert_close(trainer.model.state_dict(), plain.model.state_dict(), 1e-4)
    exact = [
        ghost(arguments(tmp_path, max_steps=1), score_form="exact", compile=on)
        for on in (False, True)
    ]
    for trainer in exact:
        trainer.train()
    assert_close(exact[1].scores.values, exact[0].scores.values, 1e-4)
    assert_close(exact[1].model.state_dict(), exact[0].model.state_dict(), 1e-6)


# --- a loss scaler ---


class Scaled(Trainer):
    """fp16's scaler without fp16, which processors do not train in: it skips the second step."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.state.global_step == 1 and not self.skipped:
            self.skipped = True
            next(p for p in model.parameters() if p.grad is not None).grad[0] = torch.inf
        self.accelerator.scaler.unscale_(self.optimizer.optimizer)  # as accelerate does in fp16
        return super()._clip_grad_norm(model)

    skipped = False


class ScaledGhost(gf.hf.GhostMixin, Scaled):
    """The same with scores."""


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("form", ["sgd", "exact"])
def test_a_loss_scaler_and_a_step_that_it_skips(form: str, optim: str, tmp_path: Path) -> None:
    """A fused optimizer skips inside its kernel."""
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=5, optim=optim)
    plain, scored = gpt2(), gpt2()
    Scaled(model=plain, args=args, train_dataset=DATA["train_dataset"]).train()
    trainer = ScaledGhost(model=scored, args=args, **DATA, score_form=form)
    trainer.train()
    assert_close(scored.state_dict(), plain.state_dict(), 1e-6, floor=1.0)
    assert trainer.accelerator.scaler.get_scale() == 2.0**11
    unscaled = ghost(args, score_form=form)
    seen: list[list[int]] = []
    taken = unscaled._step_taken

    def without_second() -> None:
        seen.append([i for v in unscaled._run.pending for i in v.ids.tolist()])
        if len(seen) == 2:
            unscaled._run.pending = []
        taken()

    unscaled.callback_handler.callbacks[-1]._tell = without_second
    total = int(trainer.scores.counts.sum())
    unscaled.train()
    assert total == int(unscaled.scores.counts.sum()) == sum(map(len, seen)) - len(seen[1])


# --- optimizers, runs of one trainer, score sets ---


class TwoRates(Recorded):
    """Biases at ten times the learning rate."""

    def create_optimizer(self, model: Any = None) -> Any:
        biases = [p for k, p in self.model.named_parameters() if k.endswith("bias")]
        others = [p for k, p in self.model.named_parameters() if not k.endswith("bias")]
        groups = [{"params": others, "lr": 1e-3}, {"params": biases, "lr": 1e-2}]
        self.optimizer = torch.optim.AdamW(groups, eps=1e-4)
        return self.optimizer


class WithoutBiases(Recorded):
    """An optimizer of some trainable parameters: the others stay where they are."""

    def create_optimizer(self, model: Any = None) -> Any:
        some = [p for k, p in self.model.named_parameters() if not k.endswith("bias")]
        self.optimizer = torch.optim.SGD(some, lr=1e-2)
        return self.optimizer


class Signs(torch.optim.Optimizer):
    """An optimizer of one's own."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                p.sub_(group["lr"] * p.grad.sign())


OPTIMIZERS: dict[str, tuple[type[Recorded], dict[str, Any], int]] = {
    "two rates": (TwoRates, {}, 2),
    "some parameters": (WithoutBiases, {}, 2),
    "a class": (
        Recorded,
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9})},
        1,
    ),
    "one's own": (Recorded, {"optimizer_cls_and_kwargs": (Signs, {"lr": 1e-3})}, 1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_that_a_user_makes(kind: str, tmp_path: Path) -> None:
    trainer_class, options, rates = OPTIMIZERS[kind]
    trainer = trainer_class(model=gpt2(), args=arguments(tmp_path), **DATA, **options)
    trainer.train()
    assert len({*trainer.seen[0]["rates"].values()}) == rates
    assert_close(trainer.scores.values, expected(trainer), 1e-4)


def test_optimizers_that_cannot_be_scored_by(tmp_path: Path) -> None:
    own = {"optimizer_cls_and_kwargs": (Signs, {"lr": 1e-3})}
    with pytest.raises(gf.OptionError, match=r'by the step .*Signs.* score_form="sgd" takes'):
        ghost(arguments(tmp_path), score_form="exact", **own).train()
    with pytest.raises(gf.ParamsError, match=r"bias' of GPT2LMHeadModel is trainable but not in"):
        WithoutBiases(
            model=gpt2(), args=arguments(tmp_path), **DATA, score_form="previous_state"
        ).train()

    class OfAnother(gf.hf.GhostTrainer):
        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = torch.optim.SGD(gpt2().parameters(), lr=1e-2)
            return self.optimizer

    with pytest.raises(gf.ParamsError, match="None of the 16 trainable parameters"):
        OfAnother(model=gpt2(), args=arguments(tmp_path), **DATA).train()


def test_every_run_of_model_init_has_a_model_and_a_loss_of_its_own(tmp_path: Path) -> None:
    made: list[nn.Module] = []

    def make() -> nn.Module:
        made.append(bert() if len(made) < 2 else bert(problem_type="regression", num_labels=1))
        return made[-1]

    data = {"train_dataset": labelled(8, 0, class_of), "score_dataset": labelled(5, 1, class_of)}
    trainer = Recorded(model_init=make, args=arguments(tmp_path), **data)
    batches = in_order(data["score_dataset"], 4)

    def check() -> None:
        want = scores_by_definition(trainer, batches, lambda _: 1, counted=False, averaged=True)
        assert_close(trainer.scores.values, want, 1e-4)

    trainer.train()
    check()
    trainer.seen.clear()
    for part in ("train_dataset", "score_dataset"):
        for sample in data[part]:
            sample["labels"] = float(sample["labels"])
    trainer.train()
    check()
    assert len(made) == 3


def test_trials_of_a_search_are_runs_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `hyperparameter_search` does, without the library that draws."""
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    trainer = Recorded(model_init=lambda: gpt2(), args=arguments(tmp_path), **DATA)
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    for number, batch_size in enumerate((3, 2)):
        rate = 1e-2 / (1 + number)
        params = {"learning_rate": rate, "per_device_train_batch_size": batch_size}
        trainer.seen.clear()
        trainer.train(trial=SimpleNamespace(number=number, params=params))
        assert trainer.seen[0]["rates"]["transformer.wte.weight"] == rate
        scores = trainer.scores
        assert len(scores.ids) == min(8, 3 * batch_size)
        assert_close(scores.values, expected(trainer)[scores.ids], 1e-4)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(DATA["score_dataset"])


class Lines:
    """Iterable, no torch dataset."""

    def __iter__(self) -> Iterator[Any]:
        return iter(DATA["score_dataset"])


def test_iterable_score_sets(tmp_path: Path) -> None:
    indexed = ghost(arguments(tmp_path))
    indexed.train()
    sets = {"stream": Stream(), "lines": Lines(), "indexed": DATA["score_dataset"]}
    trainer = ghost(arguments(tmp_path), score_dataset=sets)
    trainer.train()
    for column in trainer.scores.values.T:
        assert_close(column, indexed.scores.values[:, 0], 1e-6)
    with pytest.raises(gf.OptionError, match=r"score_dataset is empty \('a'\)"):
        ghost(arguments(tmp_path), score_dataset={"a": []})
    with pytest.raises(gf.OptionError, match="score_dataset 'score' is a generator"):
        ghost(arguments(tmp_path), score_dataset=(x for x in texts(3, 0)))


def ragged(n: int, seed: int) -> list[Any]:
    return [
        {k: v[-(6 + 2 * (i % 3)) :] for k, v in x.items()} for i, x in enumerate(texts(n, seed))
    ]


def test_ragged_score_sets(tmp_path: Path) -> None:
    score = ragged(5, 1)
    with pytest.raises(gf.BatchError, match=r"collator that pads, or score_batch_size=1\. It"):
        ghost(arguments(tmp_path), score_dataset=score).train()
    trainer = Recorded(
        model=gpt2(), args=arguments(tmp_path), **{**DATA, "score_dataset": score},
        score_batch_size=1,
    )  # fmt: skip
    trainer.train()

    def batches(step: int) -> list[dict[str, Tensor]]:
        chosen = [score[(step * 4 + j) % 5] for j in range(4)]
        width = max(len(x["input_ids"]) for x in chosen)
        fill = {"input_ids": 0, "labels": -100}
        pad = nn.functional.pad
        padded = {
            k: torch.stack([pad(x[k], (0, width - len(x[k])), value=v) for x in chosen])
            for k, v in fill.items()
        }
        return [padded]  # causal: what follows changes nothing

    want = scores_by_definition(trainer, batches, tokens, counted=True, averaged=False)
    assert_close(trainer.scores.values, want, 1e-4)


# --- what is noticed ---


def test_token_sums_alone_weigh_scores_otherwise(tmp_path: Path) -> None:
    """They pass for the training loss, which is divided by all tokens, and not for score sets."""
    with pytest.raises(gf.VerificationError, match=r"batch of score_dataset 'score'.*SampleLoss"):
        ghost(arguments(tmp_path), lora(), sample_loss=token_sums).train()
    both = [ghost(arguments(tmp_path), lora(), sample_loss=x) for x in (None, TOKENS)]
    for trainer in both:
        trainer.train()
    assert_close(both[0].scores.values, both[1].scores.values, 1e-6)


def test_rows_without_samples(tmp_path: Path) -> None:
    def flat(features: list[Any]) -> dict[str, Tensor]:
        return {k: torch.cat([f[k] for f in features])[None] for k in features[0]}

    with pytest.raises(gf.BatchError, match="made 1 rows of 'input_ids' from 3 samples"):
        ghost(arguments(tmp_path), data_collator=flat).train()


def test_labels_all_ignored(tmp_path: Path) -> None:
    blank = [{**x, "labels": torch.full_like(x["labels"], -100)} for x in texts(8, 0)]
    with pytest.raises(gf.BatchError, match="single item in the first micro-batch"):
        ghost(arguments(tmp_path), train_dataset=blank).train()
    with pytest.raises(gf.BatchError, match="single item in the samples of score_dataset 'score'"):
        ghost(arguments(tmp_path), score_dataset=blank).train()


def test_missing_columns(tmp_path: Path) -> None:
    """In a score set, and labels in the training set."""
    for name in ("input_ids", "labels"):
        short = [{k: v for k, v in x.items() if k != name} for x in texts(8, 0)]
        with pytest.raises(gf.BatchError, match=rf"score_dataset 'score' has no '{name}'"):
            ghost(arguments(tmp_path), score_dataset=short).train()
    with pytest.raises(gf.BatchError, match="labels"):
        ghost(arguments(tmp_path), train_dataset=short).train()


def test_a_routers_load_balancing_loss(tmp_path: Path) -> None:
    """It is of all tokens of a batch at once; without it, experts train as they are shipped."""
    balanced = partial(mixtral, output_router_logits=True, router_aux_loss_coef=0.1)
    with pytest.raises(gf.VerificationError, match=r"load balancing loss.*output_router_logits"):
        ghost(arguments(tmp_path), balanced).train()


# --- logged ---


def test_scores_are_logged(tmp_path: Path) -> None:
    args = arguments(tmp_path, logging_steps=2, gradient_accumulation_steps=2, max_steps=4)
    trainer = ghost(args, log_gradients=True)
    trainer.train()
    logs = [x for x in trainer.state.log_history if "loss" in x]
    assert [x["step"] for x in logs] == [2, 4]
    names = {k for k in logs[0] if k.startswith("ghost/")}
    assert names == {
        "ghost/harmful_share",
        "ghost/mean_value",
        *(f"ghost/norm_q{q}" for q in (10, 50, 90)),
        "ghost/cosine",
    }
    one = ghost(arguments(tmp_path, max_steps=1, logging_steps=1), log_gradients=True)
    one.train()
    (log,) = (x for x in one.state.log_history if "loss" in x)
    values = one.scores.values[:, 0]
    assert log["ghost/mean_value"] == pytest.approx(float(values.mean()))
    assert log["ghost/harmful_share"] == pytest.approx(float((values > 0).double().mean()))
    model = gpt2()
    ids = one.scores.ids.tolist()
    count = sum(tokens({"labels": DATA["train_dataset"][i]["labels"][None]}) for i in ids)

    def gradient(samples: list[Any], weight: Callable[[Any], float]) -> Tensor:
        total = 0.0
        for x in samples:
            batch = {k: v[None] for k, v in x.items()}
            total = total + weight(batch) * model(**batch).loss
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, model.parameters())])

    train = [DATA["train_dataset"][i] for i in ids]
    shares = [gradient([x], lambda b: tokens(b) / count) for x in train]
    g, norms = torch.stack(shares).sum(0), torch.stack([x.norm() for x in shares])
    score = DATA["score_dataset"][:4]
    total = sum(tokens({"labels": x["labels"][None]}) for x in score)
    u = gradient(score, lambda b: tokens(b) / total)
    assert log["ghost/norm_q50"] == pytest.approx(float(norms.median()), rel=1e-4)
    assert log["ghost/cosine"] == pytest.approx(float(g @ u / g.norm() / u.norm()), rel=1e-4)


def test_quantised_frozen_bases(tmp_path: Path) -> None:
    """A frozen Function on integer weights, as of bitsandbytes, under LoRA: exact."""
    make = quantised
    trainer = same_training(make, arguments(tmp_path), 1e-6, **DATA)
    assert_close(trainer.scores.values, expected(trainer), 1e-4)


class Dequantised(torch.autograd.Function):
    """`x @ (q - zero) scale` of uint8 q: the input's gradient alone exists."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(q, scale)
        return x @ ((q.float() - 128) * scale)

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor, None, None]:
        q, scale = ctx.saved_tensors
        return b @ ((q.float() - 128) * scale).mT, None, None


class Quantised(nn.Module):
    """A linear layer `[in, out]` kept in eight bits."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        scale = weight.abs().max() / 127
        self.register_buffer("q", (weight / scale + 128).round().to(torch.uint8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return Dequantised.apply(x, self.q, self.scale) + self.bias


def quantised() -> nn.Module:
    model = lora()()
    for layer in model.modules():  # the adapters stay as they are around it
        if isinstance(layer, peft.tuners.lora.Linear):
            base = layer.base_layer
            layer.base_layer = Quantised(base.weight.detach(), base.bias.detach())
    return model
