"""Pairs of answers, rewards and advantages, held against a loop over plain autograd."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from hf_trainers import bert, gpt2, llama
from torch import Tensor, nn
from transformers import GPT2ForSequenceClassification

import ghostfunc as gf

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
Batch = dict[str, Tensor]


def pairs(n: int, seed: int, length: int = 9) -> Batch:
    """Prompts of three tokens, answers of unequal lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (n, 2, length), generator=generator)
    ids[:, 1, :3] = ids[:, 0, :3]
    lengths = torch.randint(5, length + 1, (n, 2, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    completion = mask * (torch.arange(length) >= 3)
    return {"input_ids": ids * mask, "attention_mask": mask, "completion_mask": completion}


def logp(model: nn.Module, ids: Tensor, mask: Tensor, completion: Tensor) -> Tensor:
    """The log-probability of one answer, written out."""
    logits = model(input_ids=ids[None], attention_mask=mask[None]).logits[0]
    steps = [
        logits[t - 1].log_softmax(-1)[ids[t]] for t in range(1, len(ids)) if completion[t] == 1
    ]
    return torch.stack(steps).sum()


def delta(model: nn.Module, reference: nn.Module, pair: Batch, per_token: bool) -> Tensor:
    out = []
    for row in (0, 1):
        given = [pair[k][row] for k in ("input_ids", "attention_mask", "completion_mask")]
        with torch.no_grad():
            still = logp(reference, *given)
        ratio = logp(model, *given) - still
        out.append(ratio / given[2].sum() if per_token else ratio)
    return out[0] - out[1]


PAIR: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda d: -F.logsigmoid(0.3 * d),
    "hinge": lambda d: (1 - 0.3 * d).relu(),
    "ipo": lambda d: (d - 1 / 0.6) ** 2,
}


def gradients(model: nn.Module, batch: Batch, loss: Callable[[Batch], Tensor]) -> Tensor:
    """`[n, all parameters]`, one sample at a time."""
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(batch["input_ids"])):
        grads = torch.autograd.grad(
            loss({k: x[i] for k, x in batch.items()}), params, allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("loss_type", PAIR)
# Llama's norms and rotations are float32 in every model.
@pytest.mark.parametrize(("make", "tolerance"), [(gpt2, 1e-10), (llama, 1e-6)])
def test_pairs_equal_the_loop(
    make: Callable[[], nn.Module], tolerance: float, loss_type: str
) -> None:
    model, reference = make().double().eval(), make().double().eval().requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    train, val = pairs(4, 0), pairs(3, 1, 11)

    def loss(pair: Batch) -> Tensor:
        return PAIR[loss_type](delta(model, reference, pair, loss_type == "ipo"))

    exact = gradients(model, train, loss)
    want = exact @ gradients(model, val, loss).mean(0)
    model_fn, params = gf.hf.dpo(model, reference, beta=0.3, loss_type=loss_type)
    assert_close(gf.ghost_dot_prod(model_fn, params, train, val), want, tolerance)
    assert_close(gf.ghost_norm(model_fn, params, train), exact.norm(dim=1), tolerance)
    assert_close(gf.ghost_gram(model_fn, params, train), exact @ exact.T, tolerance)
    said = train | gf.hf.reference_logps(reference, train)
    model_fn, params = gf.hf.dpo(model, beta=0.3, loss_type=loss_type)
    assert_close(gf.ghost_norm(model_fn, params, said), exact.norm(dim=1), tolerance)
    losses = torch.stack([loss({k: x[i] for k, x in train.items()}) for i in range(4)])
    assert_close(model_fn(params, said), losses.detach(), tolerance)


def test_a_reference_without_the_adapters() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama().double(), config).double().eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    base, batch = llama().double().eval(), pairs(3, 0)
    with model.disable_adapter():
        said = gf.hf.reference_logps(model, batch)
    want = gf.hf.reference_logps(base, batch)
    assert_close(said, want, 1e-12)
    model_fn, params = gf.hf.dpo(model, beta=0.3)
    exact = gradients(model, batch, lambda x: PAIR["sigmoid"](delta(model, base, x, False)))
    assert_close(gf.ghost_norm(model_fn, params, batch | said), exact.norm(dim=1), 1e-10)


def rewarder() -> nn.Module:
    config = copy.deepcopy(gpt2().config)
    config.num_labels = 1
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(config).double().eval()


@pytest.mark.parametrize("center", [0.0, 0.1])
@pytest.mark.parametrize("margin", [False, True])
def test_rewards_equal_the_loop(center: float, margin: bool) -> None:
    model, batch = rewarder(), pairs(4, 0)
    del batch["completion_mask"]
    if margin:
        batch["margin"] = torch.linspace(0, 1, 4, dtype=torch.float64)

    def loss(pair: Batch) -> Tensor:
        chosen, rejected = (
            model(
                input_ids=pair["input_ids"][i : i + 1],
                attention_mask=pair["attention_mask"][i : i + 1],
            ).logits[0, 0]
            for i in (0, 1)
        )
        gap = chosen - rejected - (pair["margin"] if margin else 0)
        return -F.logsigmoid(gap) + center * (chosen + rejected) ** 2

    exact = gradients(model, batch, loss)
    model_fn, params = gf.hf.reward_pairs(model, center_rewards_coefficient=center)
    assert_close(gf.ghost_gram(model_fn, params, batch), exact @ exact.T, 1e-10)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_advantages_equal_the_loop(old: bool, beta: float) -> None:
    model, batch = gpt2().double().eval(), {k: x[:, 0] for k, x in pairs(4, 0).items()}
    batch["advantages"] = torch.tensor([1.0, -0.5, 0.3, -2.0], dtype=torch.float64)
    noise = torch.randn(4, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if old:
        batch["old_per_token_logps"] = noise - 3.6
    if beta:
        batch["ref_per_token_logps"] = noise.flip(0) - 3.6

    def loss(one: Batch) -> Tensor:
        ids, mask = one["input_ids"], one["attention_mask"]
        logits = model(input_ids=ids[None], attention_mask=mask[None]).logits[0]
        terms = []
        for t in range(1, 9):
            if one["completion_mask"][t] == 0:
                continue
            lp = logits[t - 1].log_softmax(-1)[ids[t]]
            ratio = (lp - (one["old_per_token_logps"][t] if old else lp.detach())).exp()
            gain = torch.min(ratio * one["advantages"], ratio.clamp(0.8, 1.3) * one["advantages"])
            gap = one["ref_per_token_logps"][t] - lp if beta else lp * 0
            terms.append(-gain + beta * (gap.exp() - gap - 1))
        return torch.stack(terms).mean()

    exact = gradients(model, batch, loss)
    model_fn, params = gf.hf.grpo(model, beta=beta, epsilon_high=0.3)
    assert_close(gf.ghost_gram(model_fn, params, batch), exact @ exact.T, 1e-10)


def test_what_is_refused() -> None:
    model, batch = gpt2(), pairs(3, 0)
    with pytest.raises(gf.OptionError, match=r"parameters that require a gradient.*requires_grad_"):
        gf.hf.dpo(model, gpt2())
    with pytest.raises(gf.OptionError, match="the model itself"):
        gf.hf.dpo(model, model)
    with pytest.raises(gf.OptionError, match="beta=0 must be a positive number"):
        gf.hf.dpo(model, beta=0)
    with pytest.raises(gf.OptionError, match="'sigmoid', 'hinge', 'ipo'"):
        gf.hf.dpo(model, loss_type="exo")  # type: ignore[arg-type]
    with pytest.raises(gf.OptionError, match="must not be negative"):
        gf.hf.grpo(model, epsilon=-1)
    model_fn, params = gf.hf.dpo(model)
    for given, said in (
        (batch, "no ref_chosen_logps or ref_rejected_logps"),
        (with_logps(batch) | {"input_ids": batch["input_ids"][:, 0]}, "[n, 2, T], a chosen"),
        ({k: x for k, x in with_logps(batch).items() if k != "completion_mask"}, "no 'completion_"),
    ):
        with pytest.raises(gf.BatchError, match=re.escape(said)):
            model_fn(params, given)
    model_fn, params = gf.hf.grpo(model)
    with pytest.raises(gf.BatchError, match="no 'advantages'"):
        model_fn(params, {k: x[:, 0] for k, x in batch.items()})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: gf.hf.dpo(m, beta="a"), "beta='a' must be a finite number"),
        (lambda m: gf.hf.dpo(m, beta=float("inf")), "beta=inf must be a finite number"),
        (lambda m: gf.hf.dpo(m, "gpt2"), "a str; expected a model"),
        (lambda m: gf.hf.grpo(m, epsilon=float("nan")), "epsilon=nan must be a finite number"),
        (lambda m: gf.hf.reward_pairs(m, center_rewards_coefficient=-1), "must not be negative"),
    ],
)
def test_options_that_are_no_numbers(make: Any, said: str) -> None:
    with pytest.raises(gf.OptionError, match=said):
        make(gpt2())


@pytest.mark.parametrize(
    ("name", "cut", "said"),
    [
        ("completion_mask", lambda x: x[..., :-1], r"completion_mask must be \[3, 2, \d+\] as"),
        ("ref_chosen_logps", lambda x: x[:, None], r"ref_chosen_logps must be \[3\], .* \[3, 1\]"),
        ("ref_rejected_logps", lambda x: x[:2], r"ref_rejected_logps must be \[3\], .* \[2\]"),
    ],
)
def test_columns_of_other_shapes(name: str, cut: Any, said: str) -> None:
    model_fn, params = gf.hf.dpo(gpt2())
    batch = with_logps(pairs(3, 0))
    with pytest.raises(gf.BatchError, match=said):
        model_fn(params, {**batch, name: cut(batch[name])})


def test_rewards_and_advantages_of_other_shapes() -> None:
    batch = pairs(3, 0)
    ids = {"input_ids": batch["input_ids"]}
    for model, said in ((gpt2(), r"GPT2LMHeadModel are \[6, "), (bert(), r"are \[6, 3\]")):
        model_fn, params = gf.hf.reward_pairs(model)
        with pytest.raises(gf.BatchError, match=f"{said}.*num_labels=1"):
            model_fn(params, ids)
    model_fn, params = gf.hf.reward_pairs(bert(num_labels=1))
    with pytest.raises(gf.BatchError, match=r"margin must be \[3\], .* got \[3, 1\]"):
        model_fn(params, {**ids, "margin": torch.zeros(3, 1)})
    model_fn, params = gf.hf.grpo(gpt2())
    rows = {k: batch[k][:, 0] for k in ("input_ids", "completion_mask")}
    for advantages in (torch.zeros(3, 1), torch.zeros(rows["input_ids"].shape)):
        with pytest.raises(gf.BatchError, match=r"advantages must be \[3\]"):
            model_fn(params, {**rows, "advantages": advantages})


def with_logps(batch: Batch) -> Batch:
    return batch | dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), torch.zeros(3))


def test_rows_that_do_not_divide() -> None:
    loss = gf.hf.SampleLoss(lambda m, b: b, lambda b: b, rows=2)
    got: Any = loss.by_sample({"x": torch.arange(6).float()}, 3)
    assert got["x"].tolist() == [[0, 3], [1, 4], [2, 5]]
    alone = {"rows": torch.ones(2, 7), "places": torch.ones(1, 7), "reference": torch.ones(1)}
    found: Any = loss.by_sample(alone, 1)
    shapes = {name: list(x.shape) for name, x in found.items()}
    assert shapes == {"rows": [1, 2, 7], "places": [1, 2, 7], "reference": [1]}
    with pytest.raises(gf.BatchError, match=r"made 5 rows of 'x' from 3 samples; .* 2 rows per"):
        loss.by_sample({"x": torch.zeros(5)}, 3)
    with pytest.raises(gf.BatchError, match="'x' of the batch is no tensor"):
        loss.by_sample({"x": "text"}, 3)
