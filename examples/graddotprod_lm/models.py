"""GPT-2 in its sizes, from configuration: weights are drawn, not downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import GPT2Config, GPT2LMHeadModel


@dataclass(frozen=True)
class Architecture:
    """Sizes of a GPT-2; a sample is `positions` tokens."""

    layers: int
    width: int
    heads: int
    positions: int
    vocab_size: int
    eos: int


ARCHITECTURES = {
    "GPT2-Small": Architecture(12, 768, 12, 1024, 50257, 50256),
    "GPT2-Medium": Architecture(24, 1024, 16, 1024, 50257, 50256),
    "GPT2-Large": Architecture(36, 1280, 20, 1024, 50257, 50256),
    "GPT2-Tiny": Architecture(2, 64, 4, 64, 257, 256),
}
"""GPT2-Tiny reads the bytes of `prepare_data.py --tokenizer bytes`."""


def build_model(architecture: str, seed: int) -> GPT2LMHeadModel:
    """A new model without dropout, so that a sample's loss and gradient are its own."""
    a = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    config = GPT2Config(
        loss_type="ForCausalLM",
        vocab_size=a.vocab_size,
        n_positions=a.positions,
        n_embd=a.width,
        n_layer=a.layers,
        n_head=a.heads,
        bos_token_id=a.eos,
        eos_token_id=a.eos,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config).train()
