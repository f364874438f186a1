"""Scores of images with captions: dict batches with `pixel_values` through LLaVA.

A tiny `LlavaForConditionalGeneration` with random weights learns to name the colour of an image.
One caption in eight of the training images names another colour. Captions of a few clean images
score every training sample at every step; the samples whose captions are wrong should come last.

    python -m examples.graddotprod_lm.llava
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import ghostfunc as gf
from examples.graddotprod_lm.evaluate import estimate_loss
from examples.graddotprod_lm.world import World

Batch = dict[str, Tensor]

COLOURS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]])
SIZE, PATCH = 16, 8
PATCHES = (SIZE // PATCH) ** 2
BOS, EOS, IMAGE, IT_IS, FIRST_COLOUR = 0, 1, 2, 3, 4
"""Tokens; colour c is `FIRST_COLOUR + c`."""
N_TRAIN, N_CLEAN, N_TEST = 256, 32, 64
STEPS, BATCH = 120, 32


def build_model() -> LlavaForConditionalGeneration:
    """Two layers of each: an image encoder and a language model."""
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=SIZE, patch_size=PATCH, projection_dim=32)
    text = LlamaConfig(
        **sizes,
        vocab_size=FIRST_COLOUR + len(COLOURS),
        max_position_embeddings=32,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
    )
    return LlavaForConditionalGeneration(config)


def draw(n: int, *, wrong: float, generator: torch.Generator) -> tuple[Batch, Tensor]:
    """`n` images of one colour each with noise, their captions, and whether these are wrong."""
    colour = torch.randint(len(COLOURS), (n,), generator=generator)
    lies = torch.rand(n, generator=generator) < wrong
    shift = torch.randint(1, len(COLOURS), (n,), generator=generator)
    named = torch.where(lies, (colour + shift) % len(COLOURS), colour)
    noise = torch.randn(n, 3, SIZE, SIZE, generator=generator)
    before = torch.tensor([BOS, *[IMAGE] * PATCHES, IT_IS]).expand(n, -1)
    caption = torch.stack([FIRST_COLOUR + named, torch.full((n,), EOS)], 1)
    batch = {
        "pixel_values": COLOURS[colour][:, :, None, None] + 0.3 * noise,
        "input_ids": torch.cat([before, caption], 1),
        "attention_mask": torch.ones(n, before.shape[1] + 2, dtype=torch.long),
        "labels": torch.cat([torch.full_like(before, -100), caption], 1),
    }
    return batch, lies


def rows(batch: Batch, index: Tensor) -> Batch:
    return {name: x[index] for name, x in batch.items()}


class Outcome(NamedTuple):
    """What a training came to.

    Attributes:
        test_loss: on other clean captions.
        auroc: how often a wrong caption has a lower score than a right one.
    """

    test_loss: float
    auroc: float


def train_and_score(steps: int) -> Outcome:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = build_model()
    train, lies = draw(N_TRAIN, wrong=1 / 8, generator=generator)
    clean, _ = draw(N_CLEAN, wrong=0.0, generator=generator)
    test, _ = draw(N_TEST, wrong=0.0, generator=generator)
    model_fn, params = gf.hf.causal_lm(model)
    few, fewer = rows(train, torch.arange(4)), rows(clean, torch.arange(2))
    gf.verify(model_fn, params, few, fewer, vectorize=False, check=True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scores = torch.zeros(N_TRAIN)
    for _ in range(steps):
        index = torch.randperm(N_TRAIN, generator=generator)[:BATCH]
        step = gf.ghost_value_and_grad(model_fn, params, rows(train, index), clean)
        for name, p in model.named_parameters():
            p.grad = step.grads[name]
        optimizer.step()
        scores.index_add_(0, index, step.dot_prods)

    inputs = {k: v for k, v in test.items() if k != "labels"}
    alone = World(0, 1, torch.device("cpu"))
    loss = estimate_loss(model, [(inputs, test["labels"])], alone, dtype="float32")
    return Outcome(loss, float(roc_auc_score(lies.numpy(), -scores.numpy())))


def main() -> None:
    outcome = train_and_score(STEPS)
    print(f"loss on clean captions {outcome.test_loss:.3f}")
    print(f"AUROC of wrong captions by low scores {outcome.auroc:.2f}")


if __name__ == "__main__":
    main()
