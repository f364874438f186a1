"""Models and sums whose errors are measured in several precisions: by the tests, and for
`docs/precision.md`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import ghostfunc as gf

VOCABULARY = 40


@dataclass(frozen=True)
class Setting:
    """A dtype of the parameters, and of autocast inside the loss."""

    parameters: torch.dtype
    autocast: torch.dtype | None = None

    def __str__(self) -> str:
        own = name_of(self.parameters)
        return own if self.autocast is None else f"{own}, autocast to {name_of(self.autocast)}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


HALF = (torch.bfloat16, torch.float16)
SETTINGS = [
    *(Setting(dtype) for dtype in (torch.float64, torch.float32, *HALF)),
    *(Setting(torch.float32, dtype) for dtype in HALF),
]


def language_model(setting: Setting, scale: float = 1.0) -> tuple[Any, dict[str, Tensor]]:
    """A small GPT-2 whose losses are `scale` times the mean over a sample's tokens."""
    config = hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = hf.GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
    module = module.to(setting.parameters)

    def loss(module: nn.Module, ids: Tensor) -> Tensor:
        enabled = setting.autocast is not None
        with torch.autocast("cpu", dtype=setting.autocast or torch.bfloat16, enabled=enabled):
            logits = module(input_ids=ids, use_cache=False).logits[:, :-1]
        if logits.dtype in HALF:
            logits = logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return scale * losses.view(len(ids), -1).mean(1)

    return gf.from_module(module, loss)


def exact_language_model(setting: Setting) -> tuple[Any, dict[str, Tensor]]:
    """The same with the same, rounded parameters, run in float64."""
    model_fn, params = language_model(Setting(torch.float64))
    rounded = language_model(setting)[1]
    return model_fn, {k: rounded[k].double() for k in params}


def tokens(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (n, 48), generator=generator)


def relative(got: Tensor, want: Tensor) -> float:
    """The largest error of any sample, relative to the largest value."""
    return float((got.double() - want).abs().max() / want.abs().max())


# --- sums alone -------------------------------------------------------------------------------

POSITIONS, FEATURES = 512, 6
Gradient = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sum:
    """An op whose cotangent is part of the batch, so that its true gradients are known exactly.

    Attributes:
        op: `op(w, x)`, `[n, t, d]`; `shape`, that of the parameter.
        gradient: `gradient(x, b)`, every sample's, in the dtype of its arguments.
    """

    op: Callable[[Tensor, Tensor], Tensor]
    shape: tuple[int, ...]
    gradient: Gradient
    ids: bool = False

    def model_fn(self, params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        x, b = batch
        return (self.op(params["w"], x).float() * b.float()).sum((1, 2))

    def params(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"w": torch.randn(self.shape, generator=torch.Generator().manual_seed(0)).to(dtype)}

    def batch(self, n: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (n, POSITIONS, FEATURES)
        b = (1 + torch.randn(shape, generator=generator)).to(dtype)
        if self.ids:
            return torch.randint(self.shape[0], shape[:2], generator=generator), b
        return (1 + torch.randn(shape, generator=generator)).to(dtype), b

    def grads(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The truth: sums of these factors in float64."""
        x, b = batch
        return self.gradient(x if self.ids else x.double(), b.double())


def _scattered(ids: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ntr,ntd->nrd", F.one_hot(ids, 5).to(b.dtype), b)


SUMS = {
    "linear": Sum(
        lambda w, x: F.linear(x, w), (FEATURES, FEATURES), lambda x, b: b.mT.contiguous() @ x
    ),
    "embedding": Sum(lambda w, ids: F.embedding(ids, w), (5, FEATURES), _scattered, ids=True),
    "scale": Sum(lambda w, x: w * x, (FEATURES,), lambda x, b: (x * b).sum(1)),
    "bias": Sum(lambda w, x: x + w, (FEATURES,), lambda x, b: b.sum(1)),
}
