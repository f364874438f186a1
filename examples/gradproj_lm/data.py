"""Samples of the domain corpus, and the model, for all scripts of this example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

import ghostfunc as gf
from examples.demo_corpus import DOMAINS, load_corpus
from examples.gradproj_lm.config import Config


def samples(config: Config) -> tuple[list[Tensor], list[Tensor]]:
    """Training samples and queries, each `[t]`, domain by domain."""
    generator = torch.Generator().manual_seed(config.data_seed)
    corpus = load_corpus(
        chunk_bytes=config.chunk_bytes,
        n_train=config.max_samples // len(DOMAINS),
        n_held_out=config.n_queries // len(DOMAINS),
        generator=generator,
    )
    train = [x for domain in corpus.train.values() for x in domain]
    return train, [x for domain in corpus.held_out.values() for x in domain]


def collate(chunks: list[Tensor]) -> dict[str, Tensor]:
    return {"input_ids": torch.stack(chunks)}


def load_model(config: Config) -> tuple[Any, dict[str, Tensor]]:
    """`(model_fn, params)` of the trained model."""
    return gf.hf.causal_lm(GPT2LMHeadModel.from_pretrained(config.model_dir).eval())
