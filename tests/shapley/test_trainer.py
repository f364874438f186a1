"""GhostTrainer trains as Trainer does, and knows what every sample did."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from compare import assert_close
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

import ghostfunc as gf

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
SIZES = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0}


def gpt2(dropout: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=16, **SIZES, **drops)
    )


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=40,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def texts(n: int, seed: int) -> list[dict[str, Tensor]]:
    """Twelve tokens each, of which unequal numbers are labelled."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (n, 12), generator=generator)
    skipped = torch.randint(0, 8, (n, 1), generator=generator)
    labels = ids.masked_fill(torch.arange(12) < skipped, -100)
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def labelled(n: int, seed: int) -> list[dict[str, Any]]:
    return [
        {"input_ids": item["input_ids"], "labels": int(item["input_ids"].sum()) % 3}
        for item in texts(n, seed)
    ]


def arguments(path: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        # Adam divides by the gradient's size: `eps` keeps it from dividing noise by noise.
        "adam_epsilon": 1e-4,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(path), **{**defaults, **options})


def ghost(model: Any, args: TrainingArguments, **options: Any) -> Any:
    options = {"train_dataset": texts(20, 0), "score_dataset": texts(5, 1), **options}
    return gf.hf.GhostTrainer(model=model, args=args, **options)


@pytest.mark.parametrize("form", ["sgd", "previous_state", "exact"])
def test_fifty_steps_with_scores_are_fifty_plain_steps(form: str, tmp_path: Path) -> None:
    """float32, dropout, two micro-batches, an odd last batch, clipping that bites, decay,
    a schedule."""
    args = arguments(tmp_path, max_steps=50, gradient_accumulation_steps=2, max_grad_norm=0.5)
    plain, scored = gpt2(0.1), gpt2(0.1)
    start = gpt2(0.1).state_dict()
    Trainer(model=plain, args=args, train_dataset=texts(20, 0)).train()
    trainer = ghost(scored, args, score_form=form)
    trainer.train()
    assert_close(scored.state_dict(), plain.state_dict(), 1e-6, floor=1.0)
    assert any((start[k] - v).abs().max() > 0.1 for k, v in plain.state_dict().items())
    assert trainer.scores.ids.tolist() == list(range(20))


def test_a_classifier_trains_as_it_would(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=10)
    plain, scored = bert(), bert()
    Trainer(model=plain, args=args, train_dataset=labelled(20, 0)).train()
    options = {"train_dataset": labelled(20, 0), "score_dataset": labelled(4, 1)}
    ghost(scored, args, **options).train()
    assert_close(scored.state_dict(), plain.state_dict(), 1e-6, floor=1.0)


def test_bf16_is_as_close_as_its_rounding(tmp_path: Path) -> None:
    args = arguments(tmp_path, bf16=True)
    plain, scored = gpt2(), gpt2()
    Trainer(model=plain, args=args, train_dataset=texts(20, 0)).train()
    trainer = ghost(scored, args)
    trainer.train()
    assert_close(scored.state_dict(), plain.state_dict(), 2e-3, floor=1.0)
    wide = ghost(gpt2(), arguments(tmp_path))
    wide.train()
    assert_close(trainer.scores.values, wide.scores.values, 0.1)


class Recorded(gf.hf.GhostTrainer):
    """Keeps every micro-batch with the weights it was trained at."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Any] = []

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        weights = {k: p.detach().clone() for k, p in model.named_parameters()}
        rate, step = self.optimizer.param_groups[0]["lr"], self.state.global_step
        self.seen.append((inputs, weights, int(num_items_in_batch), rate, step))
        return super().training_step(model, inputs, num_items_in_batch)


def test_scores_are_those_of_the_definition(tmp_path: Path) -> None:
    """`-lr / N <g_i, u>`, g_i of token sums, N all tokens of a step, u of the mean over tokens."""
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    sets = {"one": texts(3, 1), "two": texts(5, 2)}
    trainer = Recorded(model=gpt2(), args=args, train_dataset=texts(20, 0), score_dataset=sets)
    trainer.train()

    model = gpt2().eval()
    expected = torch.zeros(20, 2)

    def gradient(loss: Tensor) -> Tensor:
        grads = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([g.flatten() for g in grads])

    train = texts(20, 0)
    assert [step for *_, step in trainer.seen] == [0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 5]
    for inputs, weights, tokens, rate, step in trainer.seen:
        model.load_state_dict(weights, strict=False)
        us = []
        for dataset in sets.values():
            size = min(4, len(dataset))
            chosen = [dataset[(step * size + j) % len(dataset)] for j in range(size)]
            batch = {k: torch.stack([x[k] for x in chosen]) for k in ("input_ids", "labels")}
            us.append(gradient(model(**batch).loss))
        for i in inputs["ghost_sample_id"].tolist():
            one = {k: x[None] for k, x in train[i].items()}
            labels = int((one["labels"][:, 1:] != -100).sum())
            g = gradient(model(**one).loss) * labels
            expected[i] += torch.stack([-rate / tokens * (g @ u) for u in us])
    assert_close(trainer.scores.values.float(), expected, 1e-4)


@pytest.mark.parametrize(("form", "order"), [("sgd", 1), ("exact", 2)])
def test_a_resumed_run_ends_with_the_same_scores(form: str, order: int, tmp_path: Path) -> None:
    options = {"score_form": form, "score_order": order}
    steps = {"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2}
    whole = ghost(gpt2(0.1), arguments(tmp_path / "whole", **steps), **options)
    whole.train()
    first = ghost(gpt2(0.1), arguments(tmp_path / "whole", **steps), **options)
    output = first.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert output.global_step == 6
    assert all(map(torch.equal, first.scores, whole.scores))
    for x, y in zip(first.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(x, y)
    assert int(first.scores.counts.sum()) == 20 + 4 * 3  # an epoch, and two steps


def test_the_table(tmp_path: Path) -> None:
    trainer = ghost(gpt2(), arguments(tmp_path, max_steps=3))
    trainer.train()
    table = pq.read_table(tmp_path / "scores.parquet")
    scores = trainer.scores
    assert table.column_names == ["sample_id", "steps", "value_score"]
    assert table["sample_id"].to_pylist() == scores.ids.tolist()
    assert table["steps"].to_pylist() == scores.counts.tolist() == [1] * 9
    assert table["value_score"].to_pylist() == scores.values[:, 0].tolist()
    facts = json.loads(table.schema.metadata[b"ghostfunc"])
    assert (facts["form"], facts["order"], facts["global_step"]) == ("sgd", 1, 3)
    assert not list(tmp_path.glob(".*"))


def test_ids_of_ones_own(tmp_path: Path) -> None:
    train = [{**item, "row": 100 + i} for i, item in enumerate(texts(6, 0))]
    args = arguments(tmp_path, max_steps=2, dataloader_num_workers=0)
    score = [{**item, "row": i} for i, item in enumerate(texts(3, 1))]
    trainer = ghost(gpt2(), args, train_dataset=train, score_dataset=score, id_column="row")
    trainer.train()
    assert trainer.scores.ids.tolist() == list(range(100, 106))
    with pytest.raises(gf.BatchError, match="no 'row' to be known by"):
        ghost(gpt2(), args, id_column="row").train()


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(texts(6, 0))


def test_what_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    for options, said in (
        ({"score_form": "adam"}, "'sgd', 'previous_state', 'exact'"),
        ({"score_order": 2, "score_form": "previous_state"}, 'order 2 with "sgd" or "exact"'),
        ({"score_dataset": []}, "score_dataset is empty"),
        ({"score_batch_size": 0}, "score_batch_size must be a positive integer"),
    ):
        with pytest.raises(gf.OptionError, match=said):
            ghost(gpt2(), args, **options)
    with pytest.raises(gf.OptionError, match=r"NEFTune noise .*leave"):
        ghost(gpt2(), arguments(tmp_path, neftune_noise_alpha=1))
    with pytest.raises(gf.OptionError, match="does not know the loss of Linear"):
        ghost(torch.nn.Linear(2, 2), args)
    with pytest.raises(gf.OptionError, match="name its column with id_column"):
        ghost(gpt2(), args, train_dataset=Stream()).train()
    with pytest.raises(gf.BatchError, match="is a tuple"):
        ghost(gpt2(), args, train_dataset=[(1, 2)] * 5).train()


def test_a_loss_that_is_not_the_models_is_noticed(tmp_path: Path) -> None:
    """A mean over each sample's own tokens weighs tokens otherwise than Trainer does."""

    def own_means(module: Any, batch: Any) -> Tensor:
        logits = module(input_ids=batch["input_ids"]).logits[:, :-1]
        return torch.stack(
            [
                torch.nn.functional.cross_entropy(x, y)
                for x, y in zip(logits, batch["labels"][:, 1:], strict=True)
            ]
        )

    with pytest.raises(
        gf.VerificationError, match=r"Trainer's loss of the first micro-batch is .*SampleLoss"
    ):
        ghost(gpt2(), arguments(tmp_path), sample_loss=own_means).train()


def test_draws_of_a_collator_do_not_depend_on_the_scores(tmp_path: Path) -> None:
    """Masked tokens are drawn by the collator, for training and for scoring."""

    class Masking:
        def __call__(self, features: list[Any]) -> dict[str, Tensor]:
            ids = torch.stack([f["input_ids"] for f in features])
            hidden = torch.rand(ids.shape) < 0.5
            return {"input_ids": ids.masked_fill(hidden, 1), "labels": ids}

    plain, scored = gpt2(), gpt2()
    args = arguments(tmp_path)
    Trainer(model=plain, args=args, train_dataset=texts(20, 0), data_collator=Masking()).train()
    ghost(scored, args, data_collator=Masking()).train()
    assert_close(scored.state_dict(), plain.state_dict(), 1e-6, floor=1.0)


def test_a_compiled_pass_trains_and_scores_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)
    runs = {}
    for compile in (False, True):
        trainer = ghost(gpt2(), arguments(tmp_path / str(compile)), compile=compile)
        trainer.train()
        weights = [p.detach() for p in trainer.model.parameters()]
        runs[compile] = [*weights, trainer.scores.values]
    assert_close(runs[True], runs[False], 1e-5)
