"""Projected gradients of a Hugging Face language model, and what they say of a query.

Makes a small GPT-2 with random weights (put your own in its place), projects the gradients of a few
sentences of tokens, and ranks them by their cosine with a query, in memory. `gradproj_lm/` does the
same with a store on disk, a trained model and real text.

    python examples/ghost_proj_lm.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import ghostfunc as gf


def main() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=4,
            n_embd=128,
            n_head=4,
            vocab_size=1000,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    model_fn, params = gf.hf.causal_lm(model)
    projection = gf.kronecker_projection(
        params,
        rank_total=4096,
        rank_min=4,
        kind="orthonormal",
        seed=0,
        layers=["*.attn.*.weight", "*.mlp.*.weight", "*.wte.weight"],
        compress=1024,
    )
    print(f"{projection}: {sum(x.numel() for x in params.values())} parameters")

    corpus = torch.randint(0, 1000, (32, 64))
    query = corpus[7:8].clone()
    query[:, 32:] = torch.randint(0, 1000, (1, 32))  # the query begins as sample 7 does

    x = gf.ghost_project(model_fn, params, {"input_ids": corpus}, projection)
    q = gf.ghost_project(model_fn, params, {"input_ids": query}, projection)
    cosines = F.cosine_similarity(q, x)
    values, ids = cosines.topk(3)
    for value, i in zip(values.tolist(), ids.tolist(), strict=True):
        print(f"sample {i:2d}: cosine {value:.3f}")


if __name__ == "__main__":
    main()
