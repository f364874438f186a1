"""HealthCallback's numbers beside gradients formed one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import ghostfunc as gf

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=16, **sizes, **off)
    )


def texts(n: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (n, 8), generator=generator)
    skipped = torch.randint(0, 5, (n, 1), generator=generator)
    labels = ids.masked_fill(torch.arange(8) < skipped, -100)
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def arguments(path: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "max_steps": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 4,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(path), **{**defaults, **options})


def weighed(ids: list[int]) -> Tensor:
    """Every sample's share of the step's gradient, times their number: `[N, elements]`."""
    model, data = gpt2().double(), texts(20, 0)
    items = sum(int((data[i]["labels"] != -100).sum()) for i in ids)  # as Trainer counts them
    rows = []
    for i in ids:
        logits = model(input_ids=data[i]["input_ids"][None]).logits[0, :-1]
        loss = F.cross_entropy(logits, data[i]["labels"][1:], reduction="sum") / items
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]) * len(ids))
    return torch.stack(rows)


@pytest.mark.parametrize("form", ["sgd", "exact"])
@pytest.mark.parametrize("size", [3, 1])
def test_the_numbers_of_a_step_are_those_of_its_samples(
    form: str, size: int, tmp_path: Path
) -> None:
    health = gf.hf.HealthCallback(layers=True)
    trainer = gf.hf.GhostTrainer(
        model=gpt2(),
        args=arguments(tmp_path, per_device_train_batch_size=size, max_grad_norm=0.1),
        train_dataset=texts(20, 0),
        score_dataset=texts(4, 1),
        score_form=form,
        callbacks=[health],
    )
    trainer.train()
    last = health.last
    assert last is not None
    ids = [int(i) for i in last.ids]
    g = weighed(ids)
    n = len(g)
    assert n == 2 * size
    products = (g @ g.mT).fill_diagonal_(0)
    largest = float(g.square().sum(1).max())
    assert last.norms.tolist() == pytest.approx(g.norm(dim=1).tolist(), rel=1e-4)
    assert last.noise == pytest.approx(float(g.var(0, correction=1).sum()), rel=1e-4)
    assert last.signal == pytest.approx(float(products.sum() / (n * (n - 1))), abs=1e-4 * largest)
    logged = trainer.state.log_history[0]
    assert logged["health/noise_scale"] == last.noise_scale
    assert logged["health/largest_id"] == ids[int(g.norm(dim=1).argmax())]
    assert logged["health/transformer.h.0.mlp.c_fc/norm_max"] > 0
    if size == 1:
        assert "health/conflicting" not in logged
        return
    within = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))
    assert last.conflicting == float(((products * within).sum(1) < 0).double().mean())


def test_steps_are_pooled_between_logs(tmp_path: Path) -> None:
    health = gf.hf.HealthCallback()
    trainer = gf.hf.GhostTrainer(
        model=gpt2(),
        args=arguments(tmp_path, max_steps=4, logging_steps=2),
        train_dataset=texts(20, 0),
        score_dataset=texts(4, 1),
        callbacks=[health],
        log_gradients=True,
    )
    trainer.train()
    logged = [x for x in trainer.state.log_history if "loss" in x]
    assert len(logged) == 2
    for x in logged:
        assert x["health/noise_scale"] == pytest.approx(x["health/noise"] / x["health/signal"])
        # The other metrics are of weighted gradients, not multiplied by the number of samples.
        assert 5.5 < x["health/norm_q50"] / x["ghost/norm_q50"] < 6.5


def test_a_plain_trainer_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(
        model=gpt2(),
        args=arguments(tmp_path),
        train_dataset=texts(6, 0),
        callbacks=[gf.hf.HealthCallback()],
    )
    with pytest.raises(gf.OptionError, match="GhostMixin"):
        trainer.train()
