"""A scoring function in DATE-LM's form: a checkpoint, a reference and a training set to scores.

    python -m examples.date_lm

Run it from the root, with the extra `hf`: it scores random sequences at a tiny random checkpoint.
https://github.com/DataAttributionEval/DATE-LM
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ghostfunc as gf

Dataset = Sequence[dict[str, Any]]


def score(
    checkpoint: str,
    reference: Dataset,
    train: Dataset,
    *,
    batch_size: int = 8,
    damping: float = 0.1,
    layers: Sequence[str] = (),
) -> Tensor:
    """Influence of every training sample on the mean reference loss, by EK-FAC: `[n]`.

    Args:
        checkpoint: a directory or name that `AutoModelForCausalLM` loads.
        reference, train: rows with `input_ids`, `attention_mask` and `labels` of one length.
        damping: relative to each parameter's mean eigenvalue.
        layers: patterns of parameters to leave out of the curvature, such as large heads.

    Returns:
        Higher scores are of samples that lower the reference loss.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    model_fn, params = gf.hf.causal_lm(model)
    batches = [collate(train, i, batch_size) for i in range(0, len(train), batch_size)]
    curvature = gf.curvature.ekfac(
        model_fn, params, batches, likelihood=gf.hf.causal_lm_likelihood(model), identity=layers
    )
    wanted = collate(reference, 0, len(reference))
    u = gf.direction(model_fn, params, wanted, chunk_size=batch_size)
    u = curvature.solve(u, damping, relative=True)
    return torch.cat([gf.ghost_dot_prod(model_fn, params, b, direction=u) for b in batches])


def collate(rows: Dataset, start: int, count: int) -> dict[str, Tensor]:
    """Some rows as tensors."""
    some = [rows[i] for i in range(start, min(start + count, len(rows)))]
    names = ("input_ids", "attention_mask", "labels")
    return {name: torch.tensor([row[name] for row in some]) for name in names}


def main() -> None:
    """Score random sequences at a random checkpoint."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    ids = torch.randint(64, (20, 12)).tolist()
    rows = [{"input_ids": x, "attention_mask": [1] * 12, "labels": x} for x in ids]
    with tempfile.TemporaryDirectory() as directory:
        LlamaForCausalLM(config).save_pretrained(directory)
        scores = score(directory, rows[:4], rows[4:])
    print(f"{len(scores)} scores, the best is sample {int(scores.argmax())}")


if __name__ == "__main__":
    main()
