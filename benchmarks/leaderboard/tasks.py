"""Three models, the samples they are trained on, and the queries they are asked about."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghostfunc as gf
from ghostfunc.curvature import Likelihood
from ghostfunc.unrolled import Micro, Optimizer, Training

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A model with its data.

    Attributes:
        module: at the start of training; peers load the trained parameters into it.
        model_fn, params: the same for ghostfunc; the loss is a mean over the labels of a sample.
        likelihood: how that loss is made of logits.
        train, queries: `x` and integer labels `y`.
        steps, optimizer: of the training.
        texts: the samples as text, for BM25; None for images.
        subsets: how many models are trained on random parts of the data.
    """

    name: str
    module: nn.Module
    model_fn: Any
    params: dict[str, Tensor]
    likelihood: Likelihood
    train: Batch
    queries: Batch
    steps: list[Micro]
    optimizer: Optimizer
    texts: tuple[list[str], list[str]] | None
    subsets: int

    @property
    def n(self) -> int:
        return len(self.train["y"])

    def training(self, weights: Tensor | None = None) -> Training:
        return Training(
            self.model_fn, self.params, self.steps, optimizer=self.optimizer, weights=weights
        )

    def batches(self, size: int = 64) -> list[Batch]:
        pieces = zip(*(x.split(size) for x in self.train.values()), strict=True)
        return [dict(zip(self.train, piece, strict=True)) for piece in pieces]


def losses(module: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy per sample: the mean over its labels."""
    z, y = module(batch["x"]), batch["y"]
    flat = F.cross_entropy(z.flatten(0, -2), y.flatten(), reduction="none")
    return flat.view(len(y), -1).mean(1)


def _task(
    name: str,
    module: nn.Module,
    train: Batch,
    queries: Batch,
    optimizer: Optimizer,
    *,
    count: int,
    batch: int,
    seed: int,
    subsets: int,
    texts: tuple[list[str], list[str]] | None = None,
) -> Task:
    model_fn, params = gf.from_module(module, losses)
    outputs, _ = gf.from_module(module, lambda m, b: m(b["x"]))
    g = torch.Generator().manual_seed(seed)
    steps: list[Micro] = []
    while len(steps) < count:  # whole epochs, in a new order each
        for ids in torch.randperm(len(train["y"]), generator=g).split(batch):
            steps.append(Micro(ids, {k: x[ids] for k, x in train.items()}))
    likelihood = gf.curvature.softmax(outputs, lambda b: b["y"])
    return Task(
        name, module, model_fn, params, likelihood, train, queries, steps[:count], optimizer, texts,
        subsets,
    )  # fmt: skip


def cosine(peak: float, steps: int) -> Callable[[int], float]:
    """A warm-up over a tenth of the steps, and a cosine down to zero."""

    def lr(step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, steps // 10))
        return peak * warm * (1 + math.cos(math.pi * step / steps)) / 2

    return lr


def _digits(n: int, m: int, seed: int, *, image: bool) -> tuple[Batch, Batch]:
    """scikit-learn's digits; a tenth of the training labels are wrong."""
    from sklearn.datasets import load_digits

    data, g = load_digits(), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.target), generator=g)
    x = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    x = x.view(-1, 1, 8, 8) if image else x
    y = torch.tensor(data.target)[order]
    off = torch.rand(n, generator=g) < 0.1
    wrong = (y[:n] + torch.randint(1, 10, (n,), generator=g)) % 10
    rest = slice(n, n + m)
    return {"x": x[:n], "y": torch.where(off, wrong, y[:n])}, {"x": x[rest], "y": y[rest]}


def mlp(seed: int, *, quick: bool) -> Task:
    """(a) A multilayer perceptron on digits."""
    torch.manual_seed(seed)
    steps = 120
    module = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    return _task(
        "MLP on digits",
        module,
        *_digits(400, 12 if quick else 30, seed, image=False),
        gf.unrolled.sgd(lr=cosine(0.2, steps), momentum=0.9, weight_decay=1e-3),
        count=steps,
        batch=100,
        seed=seed,
        subsets=64 if quick else 128,
    )


def conv(seed: int, *, quick: bool) -> Task:
    """(b) A small convolutional network on digits."""
    torch.manual_seed(seed)
    steps = 100
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    return _task(
        "conv net on digits",
        module,
        *_digits(300, 12 if quick else 30, seed, image=True),
        gf.unrolled.sgd(lr=cosine(0.1, steps), momentum=0.9, weight_decay=1e-3),
        count=steps,
        batch=100,
        seed=seed,
        subsets=16 if quick else 48,
    )


class Block(nn.Module):
    """A block of GPT-2, its projections as linear layers."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n, t, d = x.shape
        parts = self.qkv(self.ln1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        scores = (q @ k.mT / (d // self.heads) ** 0.5).masked_fill(mask, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, d)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


class ByteGPT2(nn.Module):
    """GPT-2 of bytes: learned positions, pre-norm blocks, a head tied to the embedding."""

    def __init__(self, d: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, d), nn.Embedding(length, d)
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(layers))
        self.ln = nn.LayerNorm(d)
        self.register_buffer("mask", torch.ones(length, length, dtype=torch.bool).triu(1))
        for p in (self.wte.weight, self.wpe.weight):
            nn.init.normal_(p, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        t = ids.shape[1]
        x = self.wte(ids) + self.wpe(torch.arange(t, device=ids.device))
        for block in self.blocks:
            x = block(x, self.mask[:t, :t])
        return F.linear(self.ln(x), self.wte.weight)


def gpt2(seed: int, *, quick: bool) -> Task:
    """(c) A GPT-2 of bytes on six kinds of text that Python carries."""
    from demo_corpus import load_corpus

    length, per_domain, asked, steps = 48, 32, 1 if quick else 2, 90
    g = torch.Generator().manual_seed(seed)
    corpus = load_corpus(chunk_bytes=length + 1, n_train=per_domain, n_held_out=asked, generator=g)
    torch.manual_seed(seed)
    chunks = torch.cat(list(corpus.train.values())), torch.cat(list(corpus.held_out.values()))
    train, queries = ({"x": c[:, :-1], "y": c[:, 1:]} for c in chunks)
    texts = tuple([bytes(x.tolist()).decode(errors="replace") for x in c] for c in chunks)
    return _task(
        "byte GPT-2 on text",
        ByteGPT2(32, 2, 2, length),
        train,
        queries,
        # Smooth in the weights of the samples: see docs/leaderboard.md.
        gf.unrolled.adamw(lr=cosine(3e-3, steps), weight_decay=0.01, eps=1e-4),
        count=steps,
        batch=32,
        seed=seed,
        subsets=12 if quick else 32,
        texts=texts,  # type: ignore[arg-type]
    )


TASKS: dict[str, Callable[..., Task]] = {"mlp": mlp, "conv": conv, "gpt2": gpt2}
