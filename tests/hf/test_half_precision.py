"""In half precision, GhostTrainer trains the weights that Trainer trains, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hf_trainers import (
    Recorded,
    arguments,
    bert,
    gpt2,
    in_order,
    llama,
    scores_by_definition,
    texts,
)
from test_trained import classes, lora, tokens
from torch import nn
from transformers import Trainer

import ghostfunc as gf

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
DATA = {"train_dataset": texts(8, 0), "score_dataset": texts(5, 1)}
EVERYTHING = {
    "max_steps": 50,
    "activation_checkpointing": True,
    "warmup_steps": 5,
    "lr_scheduler_type": "cosine",
}


def both(make: Callable[[], nn.Module], path: Path, data: Any = None, **given: Any) -> Any:
    """Train without scores and with them; returns the weights' largest difference and the trainer
    with scores."""
    data, scoring = data or DATA, {k: given.pop(k) for k in list(given) if k.startswith("score_")}
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "bf16": True, **given}
    args = arguments(path, **options)
    plain = make()
    Trainer(model=plain, args=args, train_dataset=data["train_dataset"]).train()
    trainer = gf.hf.GhostTrainer(model=make(), args=args, **data, **scoring)
    trainer.train()
    expected = plain.state_dict()
    start = make().state_dict()
    assert any((start[k] - x).abs().max() > 1e-4 for k, x in expected.items())
    found = trainer.model.state_dict()
    return max(float((found[k] - x).abs().max()) for k, x in expected.items()), trainer


def half(make: Callable[[], nn.Module]) -> nn.Module:
    return make().bfloat16()


CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "lora, checkpoints, accumulation, schedule": (lora(), texts, EVERYTHING),
    "gpt2, dropout": (partial(gpt2, resid_pdrop=0.1), texts, {}),
    "llama": (llama, texts, {}),
    "llama, exact": (llama, texts, {"score_form": "exact"}),
    "llama in bfloat16": (partial(half, llama), texts, {"bf16": False}),
    "classes": (bert, classes, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_every_bit_of_the_weights(name: str, tmp_path: Path) -> None:
    make, data, options = CASES[name]
    sets = {"train_dataset": data(8, 0), "score_dataset": data(5, 1)}
    assert both(make, tmp_path, sets, **options)[0] == 0.0


def test_scores_are_as_near_as_the_loops(tmp_path: Path) -> None:
    """The loop over samples rounds every gradient; scores differ from it by no more than it differs
    from float32 itself."""
    found: dict[bool, Any] = {}
    args = arguments(tmp_path, gradient_accumulation_steps=2, bf16=True)
    trainer = Recorded(model=lora()(), args=args, **DATA)
    trainer.train()
    for rounded in (True, False):
        if not rounded:
            trainer.model = lora()()
        found[rounded] = scores_by_definition(
            trainer, in_order(DATA["score_dataset"], 4), tokens, counted=True, averaged=False
        )
    noise = (found[True] - found[False]).abs().max()
    assert 0 < noise < 0.05 * found[False].abs().max()
    assert (trainer.scores.values - found[True]).abs().max() < 0.5 * noise


def test_second_order(tmp_path: Path) -> None:
    """Of one step, to bfloat16's rounding those of float32, which the first order is not."""
    values = {}
    for order, bf16 in ((2, True), (2, False), (1, False)):
        args = arguments(tmp_path, max_steps=1, learning_rate=0.5, bf16=bf16)
        trainer = gf.hf.GhostTrainer(model=llama(), args=args, **DATA, score_order=order)
        trainer.train()
        values[order, bf16] = trainer.scores.values
    size, wanted = values[2, False].abs().max(), values[2, False]
    assert (values[2, True] - wanted).abs().max() < 0.03 * size
    assert (values[1, False] - wanted).abs().max() > 0.1 * size
