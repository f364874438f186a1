"""Curvatures of Hugging Face models, with labels drawn from their own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ghostfunc as gf

transformers = pytest.importorskip("transformers")


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double().eval()


def tokens(n: int) -> dict[str, Tensor]:
    mask = torch.ones(n, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return {"input_ids": torch.randint(11, (n, 6)), "attention_mask": mask}


def test_a_language_model_with_a_tied_head_and_padding() -> None:
    model = gpt2()
    model_fn, params = gf.hf.causal_lm(model)
    likelihood = gf.hf.causal_lm_likelihood(model)
    batches = [tokens(3), tokens(4)]
    made = gf.curvature.ekfac(model_fn, params, batches, likelihood=likelihood)
    rows = {row.path: row for row in made.report().rows}
    assert rows["transformer.wte.weight"].sides == "11* x 8"
    assert rows["transformer.h.0.attn.c_attn.weight"].sides == "8 x 24"
    assert all(row.trace > 0 for row in rows.values())


def test_the_trace_is_the_mean_square_of_the_gradients() -> None:
    model_fn, params = gf.hf.causal_lm(gpt2())
    batch = tokens(5)
    made = gf.curvature.ekfac(model_fn, params, [batch], fisher="empirical")
    norms = gf.ghost_norm(model_fn, params, batch, per_param=True)
    for row in made.report().rows:
        assert row.trace == pytest.approx(float(norms[row.path].square().mean()), rel=1e-9)


def test_the_exact_fisher_is_the_ggn() -> None:
    model = gpt2()
    model_fn, params = gf.hf.causal_lm(model)
    likelihood = gf.hf.causal_lm_likelihood(model)
    name = "transformer.ln_f.bias"  # one dense block, so EK-FAC is exact there
    batch = tokens(2)
    made = gf.curvature.ekfac(model_fn, params, [batch], fisher="exact", likelihood=likelihood)
    u = {k: torch.zeros_like(x) for k, x in params.items()}
    u[name] = torch.randn_like(u[name])
    ggn = gf.curvature.ggn(model_fn, params, [batch], likelihood=likelihood)
    torch.testing.assert_close(made.matvec(u)[name], ggn.matvec(u)[name], rtol=1e-8, atol=1e-12)


def test_classifiers_and_masked_language_models() -> None:
    options: Any = {
        "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 8, "num_labels": 3,
    }  # fmt: skip
    config = transformers.BertConfig(**options)
    classifier = transformers.BertForSequenceClassification(config).double().eval()
    masked = transformers.BertForMaskedLM(config).double().eval()
    labels = torch.where(torch.rand(4, 6) < 0.5, torch.randint(11, (4, 6)), -100)
    labels[:, 0] = 1
    for (model_fn, params), likelihood, y in (
        (
            gf.hf.sequence_classification(classifier),
            gf.hf.classification_likelihood(classifier),
            torch.randint(3, (4,)),
        ),
        (gf.hf.masked_lm(masked), gf.hf.masked_lm_likelihood(masked), labels),
    ):
        batch = {**tokens(4), "labels": y}
        made = gf.curvature.ekfac(model_fn, params, [batch], likelihood=likelihood)
        assert made.samples == 4
        assert sum(row.trace for row in made.report().rows) > 0
