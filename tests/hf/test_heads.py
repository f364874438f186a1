"""Classifiers train what their own heads train, by `problem_type`, `num_labels` and labels."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_trainers import bert, gpt2, texts, vit
from torch import Tensor, nn
from transformers import GPT2ForSequenceClassification

import ghostfunc as gf

N = 4


def gpt2_classes(**options: Any) -> nn.Module:
    config = gpt2(**options).config
    config.num_labels = options.get("num_labels", 3)
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(config)


def inputs_of(module: nn.Module) -> dict[str, Tensor]:
    if type(module).__name__.startswith("ViT"):
        return {"pixel_values": torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": torch.stack([x["input_ids"] for x in texts(N, 0)])}


def losses_of(module: nn.Module, labels: Tensor) -> Tensor:
    made = gf.hf.image_classification if "ViT" in type(module).__name__ else None
    model_fn, params = (made or gf.hf.sequence_classification)(module)
    return model_fn(params, inputs_of(module) | {"labels": labels})


def own_losses(module: nn.Module, labels: Tensor) -> Tensor:
    """The model's own loss of one sample at a time; what it notes in its config is forgotten."""
    inputs = inputs_of(module)
    out = []
    for i in range(N):
        fresh = copy.deepcopy(module)
        sample = {k: x[i : i + 1] for k, x in inputs.items()}
        out.append(fresh(**sample, labels=labels[i : i + 1]).loss)
    return torch.stack(out)


INTEGERS, RATINGS = torch.tensor([0, 2, 1, 2]), torch.tensor([0.5, -1.0, 2.0, 0.1])
SEVERAL = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.3]])
MULTI, ONE = "multi_label_classification", "single_label_classification"

TAKEN: dict[str, tuple[dict[str, Any], Tensor]] = {
    "classes": ({}, INTEGERS),
    "classes, a column": ({}, INTEGERS[:, None]),
    "classes, said": ({"problem_type": ONE}, INTEGERS),
    "one output, floats": ({"num_labels": 1}, RATINGS),
    "one output, a column": ({"num_labels": 1}, RATINGS[:, None]),
    "one output, integers": ({"num_labels": 1}, INTEGERS),
    "one output, integers, a column": ({"num_labels": 1}, INTEGERS[:, None]),
    "several outputs": ({"problem_type": "regression"}, SEVERAL * 3),
    "several labels": ({}, SEVERAL),
    "several labels, said": ({"problem_type": MULTI}, SEVERAL),
    "several labels, doubles": ({"problem_type": MULTI}, SEVERAL.double()),
    "one label of several": ({"problem_type": MULTI, "num_labels": 1}, SEVERAL[:, :1]),
}


@pytest.mark.parametrize("case", TAKEN)
@pytest.mark.parametrize("make", [bert, vit, gpt2_classes])
def test_the_loss_is_the_models_own(make: Callable[..., nn.Module], case: str) -> None:
    options, labels = TAKEN[case]
    module = make(**options).eval()
    torch.testing.assert_close(losses_of(module, labels), own_losses(module, labels))
    batch = inputs_of(module) | {"labels": labels}
    mean = copy.deepcopy(module)(**batch).loss
    torch.testing.assert_close(losses_of(module, labels).mean(), mean)
    assert module.config.problem_type == options.get("problem_type")  # nothing is noted


@pytest.mark.parametrize("case", ["several labels", "one output, integers", "several outputs"])
def test_scores_of_heads(case: str) -> None:
    options, labels = TAKEN[case]
    module = bert(**options).eval().double()
    labels = labels.double() if labels.is_floating_point() else labels
    batch = inputs_of(module) | {"labels": labels}
    model_fn, params = gf.hf.sequence_classification(module)
    gram = gf.ghost_gram(model_fn, params, batch)
    grads = []
    for i in range(N):
        sample = {k: x[i : i + 1] for k, x in batch.items()}
        fresh = copy.deepcopy(module)
        loss = fresh(**sample).loss
        grads.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, fresh.parameters())])
        )
    g = torch.stack(grads)
    torch.testing.assert_close(gram, g @ g.T, rtol=1e-9, atol=1e-12)


REFUSED: dict[str, tuple[dict[str, Any], Tensor, str]] = {
    "a class for a regression of three": ({"problem_type": "regression"}, RATINGS, "[4, 3]; got"),
    "floats for classes": ({"problem_type": ONE}, RATINGS, "of torch.int64; got [4] of torch.f"),
    "small integers": ({}, INTEGERS.int(), "of torch.int64; got [4] of torch.int32"),
    "one float for three labels": ({}, RATINGS, "[4, 3] of a floating-point dtype; got [4] of"),
    "integers for labels": ({"problem_type": MULTI}, SEVERAL.long(), "floating-point dtype; got"),
    "booleans": ({}, SEVERAL.bool(), "num_labels=3 and labels of torch.bool"),
    "three ratings for one output": ({"num_labels": 1}, SEVERAL, "[4] or [4, 1]; got [4, 3]"),
    "a class distribution": ({"problem_type": ONE}, SEVERAL, "[4] or [4, 1] of torch.int64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_labels_that_the_head_refuses(case: str) -> None:
    options, labels, said = REFUSED[case]
    module = bert(**options)
    with pytest.raises(gf.BatchError, match=re.escape(said)):
        losses_of(module, labels)
    inputs = inputs_of(module)
    with warnings.catch_warnings():  # torch warns of labels that it stretches over the batch
        warnings.simplefilter("error")
        with pytest.raises((RuntimeError, ValueError, UserWarning)):
            module(**inputs, labels=labels).loss.backward()


def test_a_sample_without_a_label_has_no_loss() -> None:
    module = bert()
    model_fn, params = gf.hf.sequence_classification(module)
    batch = inputs_of(module) | {"labels": torch.tensor([0, -100, 1, 2])}
    with pytest.raises(gf.NonFiniteLossError, match=r"losses\[1\] = nan"):
        gf.ghost_norm(model_fn, params, batch)


def test_a_problem_that_does_not_exist() -> None:
    module = bert()
    vars(module.config)["problem_type"] = "ranking"
    with pytest.raises(gf.OptionError, match="problem_type='ranking'"):
        gf.hf.sequence_classification(module)


def test_a_module_without_config() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bert()

        def forward(self, **inputs: Tensor) -> Any:
            return self.inner(**inputs)

    module, labels = Plain().eval(), INTEGERS
    torch.testing.assert_close(losses_of(module, labels), own_losses(module.inner, labels))
