"""The models and batches that are timed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """A GPT-2, and batches of n train and m validation samples of `length` tokens."""

    layers: int
    width: int
    vocabulary: int
    length: int
    n: int
    m: int

    def __str__(self) -> str:
        return (
            f"{self.layers} x {self.width}, V={self.vocabulary}, T={self.length}, "
            f"n={self.n}, m={self.m}"
        )

    def ids(self) -> Tensor:
        """Token ids of all n + m samples."""
        generator = torch.Generator().manual_seed(1)
        size = (self.n + self.m, self.length)
        return torch.randint(self.vocabulary, size, generator=generator)


SMALL = Shape(6, 384, 8000, 256, 4, 1)
CALLS_COST = Shape(4, 64, 100, 32, 8, 1)
"""Python and calls of torch are all that a step costs here, as on a GPU. One thread is timed."""

SHAPES = {
    "calls": CALLS_COST,
    "256": SMALL,
    "gpt2-small": Shape(12, 768, 50257, 256, 4, 1),
    "512": replace(SMALL, length=512, n=8),
    "1024": replace(SMALL, length=1024, n=8),
    "512-m4": replace(SMALL, length=512, n=8, m=4),
}
TINY = Shape(1, 64, 50, 16, 4, 2)
"""What `--quick` takes for all of them: to see that everything runs."""


def documents(shape: Shape) -> dict[str, list[int]]:
    """Two ways to fill rows with four documents, by name: their lengths."""
    quarter = shape.length // 4
    short, middle = max(2, shape.length // 80), max(2, shape.length // 20)
    rest = shape.length - short - middle - shape.length // 6
    return {
        "uneven documents": [short, middle, shape.length // 6, rest],
        "even documents": [quarter] * 4,
    }


def gpt2(shape: Shape) -> GPT2LMHeadModel:
    """Hugging Face's GPT-2, its head tied to its embedding."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.width // 64,
        vocab_size=shape.vocabulary,
        n_positions=shape.length,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        qkv = self.qkv(self.norms[0](x)).view(n, t, 3, self.heads, -1).transpose(1, 3)
        attended = F.scaled_dot_product_attention(*qkv.unbind(2), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class UntiedGPT(nn.Module):
    """What Opacus can clip: linear layers, a head of its own, positions that come with the batch
    (it counts samples on the first axis of every input)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.length, shape.width)
        self.blocks = nn.Sequential(*(_Block(shape.width) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(places))))


def untied_gpt(shape: Shape) -> UntiedGPT:
    torch.manual_seed(0)
    return UntiedGPT(shape)


def token_means(logits: Tensor, ids: Tensor) -> Tensor:
    """Next-token losses, `[n]`: each sample's mean."""
    flat = logits[:, :-1].flatten(0, 1)
    losses = F.cross_entropy(flat, ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1)


def gpt2_loss(module: nn.Module, ids: Tensor) -> Tensor:
    return token_means(module(input_ids=ids, use_cache=False).logits, ids)


def untied_loss(module: nn.Module, ids: Tensor) -> Tensor:
    return token_means(module(ids), ids)
