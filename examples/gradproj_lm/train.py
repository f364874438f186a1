"""Train a small byte-level GPT-2 on the domain corpus, for the other scripts to project."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import ghostfunc as gf
from examples.demo_corpus import VOCAB_SIZE
from examples.gradproj_lm.config import parse
from examples.gradproj_lm.data import collate, samples

BATCH = 16


def main() -> None:
    config = parse(__doc__)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_positions=config.chunk_bytes,
            n_embd=96,
            n_layer=3,
            n_head=3,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    )
    model_fn, params = gf.hf.causal_lm(model)
    train, _ = samples(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(config.train_steps):
        batch = collate([train[i] for i in torch.randint(len(train), (BATCH,))])
        loss = model_fn(dict(model.named_parameters()), batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == config.train_steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")
    model.save_pretrained(config.model_dir)
    print(f"{sum(x.numel() for x in params.values())} parameters in {config.model_dir}")


if __name__ == "__main__":
    main()
