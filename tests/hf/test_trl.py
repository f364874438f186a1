"""TRL's trainers under their default settings, with scores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import peft
import pytest
import torch
from compare import assert_close
from hf_trainers import DEFAULTS, Recording, gpt2, rows_of, scores_by_definition
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    DataCollatorWithFlattening,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

import ghostfunc as gf
from ghostfunc.hf._trl_head import chunked_log_probs

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'trl>=1.16'")
datasets = pytest.importorskip("datasets")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
WORDS = [f"w{i}" for i in range(36)]


class ScoringSFTTrainer(Recording, gf.hf.SFTMixin, trl.SFTTrainer):
    """One line."""


class ScoringDPOTrainer(Recording, gf.hf.DPOMixin, trl.DPOTrainer):
    """One line."""


class ScoringRewardTrainer(Recording, gf.hf.RewardMixin, trl.RewardTrainer):
    """One line."""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "CI"):
        monkeypatch.setenv(name, "1")


@pytest.fixture(scope="module", name="tokenizer")
def fixture_tokenizer() -> Any:
    return make_tokenizer()


def make_tokenizer() -> Any:
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    vocabulary = {w: i for i, w in enumerate([*special.values(), "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special)


def sentence(seed: int, longest: int = 8) -> str:
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(3, longest, (1,), generator=generator))
    return " ".join(WORDS[i] for i in torch.randint(0, 36, (length,), generator=generator))


def answers(n: int, seed: int) -> Any:
    rows = range(100 * seed, 100 * seed + n)
    return datasets.Dataset.from_dict(
        {
            "prompt": [sentence(i) for i in rows],
            "completion": [" " + sentence(i + 1000) for i in rows],
        }
    )


def preferences(n: int, seed: int) -> Any:
    rows = range(100 * seed, 100 * seed + n)
    return datasets.Dataset.from_dict(
        {
            "prompt": [sentence(i) for i in rows],
            "chosen": [" " + sentence(i + 2000) for i in rows],
            "rejected": [" " + sentence(i + 3000) for i in rows],
        }
    )


def rewarder() -> nn.Module:
    config = copy.deepcopy(gpt2().config)
    config.num_labels = 1
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(config)


def settings(kind: Any, path: Path, **options: Any) -> Any:
    given = {k: x for k, x in DEFAULTS.items() if k != "save_strategy"}
    return kind(output_dir=str(path), save_strategy="no", **{**given, **options})


def counts_of_labels(sample: dict[str, Tensor]) -> int:
    return int((sample["labels"][:, 1:] != -100).sum())


def one(sample: dict[str, Tensor]) -> int:
    return 1


CASES: dict[str, tuple[Any, Any, Any, Callable[[], nn.Module], Any, Any, bool]] = {
    "sft": (
        *(trl.SFTTrainer, ScoringSFTTrainer, trl.SFTConfig),
        *(gpt2, answers, counts_of_labels, True),
    ),
    "dpo": (trl.DPOTrainer, ScoringDPOTrainer, trl.DPOConfig, gpt2, preferences, one, False),
    "reward": (
        *(trl.RewardTrainer, ScoringRewardTrainer, trl.RewardConfig),
        *(rewarder, preferences, one, False),
    ),
}


def trained(
    name: str,
    tokenizer: Any,
    path: Path,
    adapters: bool,
    scoring: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Any:
    """A plain and a scoring run of a TRL trainer, which is given more arguments."""
    plain_class, ghost_class, config, make, data, _, _ = CASES[name]
    runs = []
    for kind, more in ((plain_class, {}), (ghost_class, {"score_dataset": data(5, 1), **scoring})):
        args = settings(config, path, **options)
        extra = {}
        if adapters:
            task = "SEQ_CLS" if name == "reward" else "CAUSAL_LM"
            targets = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
            extra["peft_config"] = peft.LoraConfig(r=2, task_type=task, **targets)
        elif name == "dpo":
            extra["ref_model"] = gpt2()
        trainer = kind(
            model=make(), args=args, train_dataset=data(8, 0), processing_class=tokenizer,
            **extra, **more,
        )  # fmt: skip
        trainer.train()
        runs.append(trainer)
    return runs


@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("name", CASES)
def test_fifty_steps(name: str, adapters: bool, tokenizer: Any, tmp_path: Path) -> None:
    """Two micro-batches, checkpoints of activations as by default; float32 to compare. Scores are
    those of the definition."""
    options = {"max_steps": 50, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    options |= {"logging_steps": 10}
    plain, ghost = trained(name, tokenizer, tmp_path, adapters, bf16=False, **options)
    assert ghost.args.gradient_checkpointing
    assert_close(ghost.model.state_dict(), plain.model.state_dict(), 1e-6, floor=1.0)
    assert ghost.scores.ids.tolist() == list(range(8))
    assert_close(ghost.scores.values, expected_scores(ghost, name), 1e-4)
    logs = [x for x in ghost.state.log_history if "loss" in x]
    assert len(logs) == 5
    assert all("ghost/mean_value" in x for x in logs)


DPO_LOSSES: dict[str, dict[str, Any]] = {
    **{
        kind: {"loss_type": [kind], "label_smoothing": 0.2}
        for kind in (
            *("hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard"),
            *("apo_zero", "apo_down", "discopop", "sigmoid_norm"),
        )
    },
    "several": {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.3]},
    "the same twice": {"loss_type": ["sigmoid", "sigmoid"], "loss_weights": [0.8, 0.3]},
    "ld_alpha": {"ld_alpha": 0.5},
    "forward_kl": {"loss_type": ["hinge"], "f_divergence_type": "forward_kl"},
    "js_divergence": {"loss_type": ["ipo"], "f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence"},
    "use_weighting": {"use_weighting": True, "loss_type": ["sigmoid", "nca_pair"]},
}


@pytest.mark.parametrize("case", DPO_LOSSES)
def test_losses_of_pairs(case: str, tokenizer: Any, tmp_path: Path) -> None:
    """TRL's own loss is asked about one pair at a time."""
    options = {"max_steps": 3, "gradient_accumulation_steps": 2, **DPO_LOSSES[case]}
    plain, ghost = trained("dpo", tokenizer, tmp_path, False, bf16=False, **options)
    assert_close(ghost.model.state_dict(), plain.model.state_dict(), 1e-6, floor=1.0)
    assert_close(ghost.scores.values, expected_scores(ghost, "dpo"), 1e-4)
    assert "rewards/chosen" not in ghost.state.log_history[-1]


def test_losses_of_pairs_in_a_compiled_pass(tokenizer: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"loss_type": ["nca_pair", "exo_pair"], "loss_weights": [0.6, 0.4]}
    options |= {"label_smoothing": 0.2, "ld_alpha": 0.5, "use_weighting": True}
    options |= {"max_steps": 3, "bf16": False}
    plain, ghost = trained("dpo", tokenizer, tmp_path, False, {"compile": True}, **options)
    assert_close(ghost.model.state_dict(), plain.model.state_dict(), 1e-6, floor=1.0)
    assert_close(ghost.scores.values, expected_scores(ghost, "dpo"), 1e-4)


def test_compiled_pairs_of_adapters_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    """The compiler's own words would hide why."""
    with pytest.raises(gf.TransformError, match=r"go another one.* without compile=True"):
        trained("dpo", tokenizer, tmp_path, True, {"compile": True}, max_steps=1, bf16=False)


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_chosen_tokens_beside_pairs(weight: float, tokenizer: Any, tmp_path: Path) -> None:
    """TRL's "sft" is a mean over the chosen tokens of a batch, in a sum with a loss of pairs."""
    options: dict[str, Any] = {"loss_type": ["nca_pair", "sft"], "loss_weights": [weight, 0.4]}
    options |= {"max_steps": 3, "gradient_accumulation_steps": 2, "bf16": False}
    plain, ghost = trained("dpo", tokenizer, tmp_path, False, **options)
    assert_close(ghost.model.state_dict(), plain.model.state_dict(), 1e-6, floor=1.0)

    model = ghost.model.eval()
    model.activation_checkpointing_disable()
    batches, named = score_batches(ghost), dict(model.named_parameters())

    def gradient(inputs: dict[str, Tensor], *weights: float) -> Tensor:
        ghost.loss_weights = weights
        grads = torch.autograd.grad(ghost.compute_loss(model, dict(inputs)), list(named.values()))
        return torch.cat([g.flatten() for g in grads])

    expected = torch.zeros(8, 1, dtype=torch.float64)
    for seen in ghost.seen:
        model.load_state_dict(seen["weights"])
        u = gradient(batches(seen["step"])[0], weight, 0.4)
        share = max(seen["rates"].values()) / seen["micro_batches"]
        ids = seen["inputs"]["ghost_sample_id"].tolist()
        pairs = [rows_of(seen["inputs"], i, len(ids)) for i in range(len(ids))]
        tokens = [pair["completion_mask"][0, 1:].sum() for pair in pairs]
        for i, pair, own in zip(ids, pairs, tokens, strict=True):
            g = gradient(pair, weight / len(ids), 0.4 * float(own / sum(tokens)))
            expected[i] -= share * float(g @ u)
    assert_close(ghost.scores.values, expected, 1e-4)


@pytest.mark.parametrize("options", [{"ld_alpha": 0.5}, {"loss_type": ["sigmoid", "sft"]}])
def test_a_last_batch_of_one_pair(options: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    given = {"per_device_train_batch_size": 7, "max_steps": 4, "bf16": False, **options}
    plain, ghost = trained("dpo", tokenizer, tmp_path, False, **given)
    assert ghost.state.global_step == 4
    assert_close(ghost.model.state_dict(), plain.model.state_dict(), 1e-6, floor=1.0)
    assert ghost.scores.ids.tolist() == list(range(8))


def test_chosen_tokens_alone(tokenizer: Any, tmp_path: Path) -> None:
    options = {"loss_type": ["sft"], "ld_alpha": 0.5, "max_steps": 2, "bf16": False}
    plain, ghost = trained("dpo", tokenizer, tmp_path, False, **options)
    assert_close(ghost.model.state_dict(), plain.model.state_dict(), 1e-6, floor=1.0)


@pytest.mark.parametrize("kind", ["nca_pair", "discopop"])
def test_losses_of_pairs_in_bf16(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    options = {"max_steps": 6, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    plain, ghost = trained("dpo", tokenizer, tmp_path, False, **options, loss_type=[kind])
    for k, x in plain.model.state_dict().items():
        assert torch.equal(ghost.model.state_dict()[k], x), k
    assert_close(ghost.scores.values, expected_scores(ghost, "dpo"), 3e-2)


@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "lora"])
def test_padding_free(adapters: bool, tokenizer: Any, tmp_path: Path) -> None:
    """All samples of a batch are documents of one row: values are those of padded rows."""
    options = {"max_steps": 4, "gradient_accumulation_steps": 2, "bf16": False, "max_length": None}
    _, padded = trained("sft", tokenizer, tmp_path, adapters, **options)
    plain, ghost = trained("sft", tokenizer, tmp_path, adapters, **options, padding_free=True)
    assert_close(ghost.model.state_dict(), plain.model.state_dict(), 1e-6, floor=1.0)
    assert_close(ghost.scores.values, padded.scores.values, 1e-4)


@pytest.mark.parametrize(
    "more",
    [{}, {"packing": True, "max_length": 16}, {"bf16": True}, {"label_smoothing_factor": 0.1}],
)
def test_dynamic_fine_tuning(more: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    """Tokens weigh by their probability, which is no function of the weights there."""
    options = {"max_steps": 3, "gradient_accumulation_steps": 2, "loss_type": "dft", "bf16": False}
    plain, ghost = trained("sft", tokenizer, tmp_path, False, **{**options, **more})
    exact = 0.0 if more.get("bf16") else 1e-6
    assert_close(ghost.model.state_dict(), plain.model.state_dict(), exact, floor=1.0)
    packed = more.get("packing", False)
    want = scores_of_rows(ghost) if packed else expected_scores(ghost, "sft")
    assert_close(ghost.scores.values, want, 3e-2 if more.get("bf16") else 1e-4)


def test_rows_of_packed_texts_are_samples(tokenizer: Any, tmp_path: Path) -> None:
    options = {"max_steps": 2, "bf16": False, "packing": True, "max_length": 16}
    plain, ghost = trained("sft", tokenizer, tmp_path, False, **options, packing_strategy="wrapped")
    assert_close(ghost.model.state_dict(), plain.model.state_dict(), 1e-6, floor=1.0)
    assert ghost.scores.values.abs().min() > 0


def test_a_loss_of_tokens_that_is_not_known(tokenizer: Any, tmp_path: Path) -> None:
    trainer = ScoringSFTTrainer(
        model=gpt2(), args=settings(trl.SFTConfig, tmp_path, bf16=False),
        train_dataset=answers(8, 0), score_dataset=answers(5, 1), processing_class=tokenizer,
    )  # fmt: skip
    trainer.args.loss_type = "other"  # of a TRL to come
    with pytest.raises(gf.OptionError, match=r"loss_type='other'; it knows nll, dft"):
        trainer.sample_loss()


@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize(("strategy", "longest"), [("bfd", 16), ("bfd_split", 11)])
def test_rows_of_documents(
    strategy: str, longest: int, adapters: bool, tokenizer: Any, tmp_path: Path
) -> None:
    """Rows of several documents become one row: a sample's value is that of its documents."""
    options = {"max_steps": 4, "gradient_accumulation_steps": 2, "bf16": False, "packing": True}
    options |= {"max_length": longest, "packing_strategy": strategy}
    plain, ghost = trained("sft", tokenizer, tmp_path, adapters, **options)
    assert {len(row["seq_lengths"]) for row in ghost.train_dataset} >= {1, 2}
    assert_close(ghost.model.state_dict(), plain.model.state_dict(), 1e-6, floor=1.0)
    assert_close(ghost.scores.values, scores_of_rows(ghost), 1e-4)
    ids = [seen["inputs"]["ghost_sample_id"][0] for seen in ghost.seen]
    rows = torch.cat([x.unique() for x in ids])
    assert len(torch.cat(ids)) > len(rows)
    assert ghost.scores.counts.tolist() == rows.bincount().tolist()


@pytest.mark.parametrize("more", [{"score_form": "exact"}, {"log_gradients": True}])
def test_rows_of_documents_in_other_forms(
    more: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    """Values are those of the documents as samples."""
    found = []
    for packing in (True, False):
        args = settings(
            *(trl.SFTConfig, tmp_path), bf16=False, packing=packing, max_length=22, max_steps=2,
            per_device_train_batch_size=8, per_device_eval_batch_size=8, logging_steps=1,
        )  # fmt: skip
        trainer = ScoringSFTTrainer(
            model=gpt2(), args=args, train_dataset=answers(8, 0), score_dataset=answers(5, 1),
            processing_class=tokenizer, callbacks=[gf.hf.HealthCallback()], **more,
        )  # fmt: skip
        trainer.train()
        logs = [x for x in trainer.state.log_history if "ghost/mean_value" in x]
        found.append((trainer.scores.values.sum(0), logs[0]["health/noise_scale"]))
    assert_close(found[0][0], found[1][0], 1e-4)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-3)


def test_rows_whose_documents_are_not_known(tokenizer: Any, tmp_path: Path) -> None:
    """A collator that makes one document of every row is held against `seq_lengths`."""
    args = settings(trl.SFTConfig, tmp_path, bf16=False, packing=True, max_length=22)
    trainer = ScoringSFTTrainer(
        model=gpt2(), args=args, train_dataset=answers(8, 0), score_dataset=answers(5, 1),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.data_collator = DataCollatorWithFlattening()
    with pytest.raises(gf.BatchError, match=r"in which 3 documents begin.*seq_lengths"):
        trainer.train()


def test_a_row_of_one_sample(tokenizer: Any, tmp_path: Path) -> None:
    """The last batch of an epoch, in which nothing is to be told apart."""
    options = {"max_steps": 2, "bf16": False, "padding_free": True, "max_length": None}
    options |= {"per_device_train_batch_size": 7}
    plain, ghost = trained("sft", tokenizer, tmp_path, False, **options)
    assert_close(ghost.model.state_dict(), plain.model.state_dict(), 1e-6, floor=1.0)
    assert ghost.scores.counts.tolist() == [1] * 8


def scores_of_rows(ghost: Any) -> Tensor:
    """By the definition, from TRL's own loss of one packed row at a time."""
    model, batches = ghost.model.eval(), score_batches(ghost)
    model.activation_checkpointing_disable()
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}

    def gradient(inputs: dict[str, Tensor], counted: Any = None) -> Tensor:
        loss = ghost.compute_loss(model, dict(inputs), num_items_in_batch=counted)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(named.values()))])

    total = torch.zeros(len(ghost.train_dataset), 1, dtype=torch.float64)
    for seen in ghost.seen:
        model.load_state_dict(seen["weights"])
        u, rate = gradient(batches(seen["step"])[0]), max(seen["rates"].values())
        for i in seen["inputs"]["ghost_sample_id"].unique().tolist():
            g = gradient(ghost.data_collator([ghost.train_dataset[i]]), seen["counted"])
            total[i] -= rate * float(g @ u)
    return total


@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("name", CASES)
def test_default_settings(name: str, adapters: bool, tokenizer: Any, tmp_path: Path) -> None:
    """bf16 and checkpoints of activations: weights are the plain trainer's, bit by bit."""
    options = {"max_steps": 20, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    plain, ghost = trained(name, tokenizer, tmp_path, adapters, **options)
    assert ghost.args.bf16
    assert ghost.args.gradient_checkpointing
    for k, x in plain.model.state_dict().items():
        assert torch.equal(ghost.model.state_dict()[k], x), k
    assert_close(ghost.scores.values, expected_scores(ghost, name), 3e-2)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("squares", [False, True])
def test_the_head_as_an_op(softcap: float | None, biased: bool, squares: bool) -> None:
    torch.manual_seed(0)
    n, t, d, v = 3, 5, 4, 11
    params = {"w": torch.randn(v, d)} | ({"bias": torch.randn(v)} if biased else {})
    batch = {"h": torch.randn(n, t, d), "y": torch.randint(v, (n, t))}

    def model_fn(p: Any, x: Any) -> Tensor:
        hidden, targets = x["h"].flatten(0, 1), x["y"].flatten()
        options = (0.7, 32768, softcap, 1.3, torch.float32, squares)
        said = chunked_log_probs(hidden, p["w"], p.get("bias"), targets, *options)
        return -said[:, 0].view(len(x["h"]), -1).sum(1)

    found = gf.per_sample_grads(model_fn, params, batch, mode="ghost")
    for i in range(n):
        leaves = {k: x.clone().requires_grad_() for k, x in params.items()}
        loss = model_fn(leaves, {k: x[i : i + 1] for k, x in batch.items()})[0]
        expected = torch.autograd.grad(loss, list(leaves.values()))
        for x, g in zip(found.values(), expected, strict=True):
            assert_close(x[i], g, 1e-5)


def score_batches(ghost: Any) -> Callable[[int], list[dict[str, Tensor]]]:
    """What a step is scored against, collated."""
    dataset, collate = ghost.score_sets["score"].dataset, ghost.data_collator
    size = min(4, len(dataset))
    chosen = lambda step: [dataset[(step * size + j) % len(dataset)] for j in range(size)]  # noqa: E731
    return lambda step: [dict(collate(chosen(step)))]


def expected_scores(ghost: Any, name: str) -> Tensor:
    """By the definition, from TRL's own loss of one sample at a time."""
    *_, counts, counted = CASES[name]
    given = {"counted": counted, "averaged": not counted}
    return scores_by_definition(ghost, score_batches(ghost), counts, **given)


def score_error(ghost: Any, name: str) -> str:
    """The largest error of a run's scores, in words."""
    want = expected_scores(ghost, name)
    return f"{float((ghost.scores.values - want).abs().max() / want.abs().max()):.0e}"


def test_what_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    data = {"train_dataset": preferences(8, 0), "score_dataset": preferences(5, 1)}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"loss_type": ["sigmoid", "aot"]}, r"loss_type='aot' is no sum over pairs"),
        ({"loss_type": "aot_unpaired"}, r"loss_type='aot_unpaired' .* three random pairs"),
        ({"loss_type": ["sigmoid", "sft"], "use_weighting": True}, r"with 'sft' .*no loss of its"),
    ]
    for options, said in cases:
        args = settings(trl.DPOConfig, tmp_path, **options)
        with pytest.raises(gf.OptionError, match=said):
            ScoringDPOTrainer(
                model=gpt2(), ref_model=gpt2(), args=args, processing_class=tokenizer, **data
            )
