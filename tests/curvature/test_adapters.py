"""The adapters for others' benchmarks run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")


def test_date_lm(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    import ghostfunc as gf
    from examples.date_lm import score

    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    ids = torch.randint(16, (7, 6))
    rows = [{"input_ids": x, "attention_mask": [1] * 6, "labels": x} for x in ids.tolist()]
    scores = score(str(tmp_path), rows[:2], rows[2:], batch_size=3)
    assert scores.shape == (5,)
    # With a large damping all directions count alike, and scores are dot products.
    model_fn, params = gf.hf.causal_lm(model.eval())
    large = score(str(tmp_path), rows[:2], rows[2:], damping=1e6)
    dots = gf.ghost_dot_prod(
        model_fn, params, {"input_ids": ids[2:]}, {"input_ids": ids[:2]}, per_param=True
    )
    means = gf.curvature.ekfac(
        model_fn, params, [{"input_ids": ids[2:]}],
        likelihood=gf.hf.causal_lm_likelihood(model),
    ).report().rows  # fmt: skip
    expected = sum(dots[row.path] / (1e6 * row.mean) for row in means)
    torch.testing.assert_close(large, expected, rtol=1e-2, atol=0.0)
