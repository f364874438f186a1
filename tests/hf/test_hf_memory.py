"""Hugging Face models that keep less: rematerialized layers, and logits in pieces."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from allocations import Allocations
from compare import assert_close
from test_hf import SMALL, gpt2, llama, seeded, t5_encoder_decoder, text
from torch import nn

import ghostfunc as gf
from benchmarks.live_bytes import LiveBytes

CALLS: dict[str, Callable[..., Any]] = {
    "none": lambda f, p, train, val: gf.ghost_dot_prod(f, p, train, val, reduction="none"),
    "step": lambda f, p, train, val: gf.ghost_value_and_grad(f, p, train, val, per_param=True),
    "norm": lambda f, p, train, val: gf.ghost_norm(f, p, train),
    "loop": lambda f, p, train, val: gf.ghost_dot_prod(
        f, p, train, val, mode="materialized", vectorize=False
    ),
    "jvp": lambda f, p, train, val: gf.ghost_dot_prod(f, p, train, val, mode="jvp"),
    "direction": lambda f, p, train, val: gf.direction(f, p, val),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "llama_tied": lambda: llama(tied=True),
    "llama": lambda: llama(tied=False),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("model", MODELS)
def test_no_number_changes(model: str, call: str) -> None:
    plain, less = MODELS[model]().double(), MODELS[model]().double()
    gf.hf.enable_remat(less)
    train, val = text(4, 7, 0, "right"), text(3, 9, 1)
    want = CALLS[call](*gf.hf.causal_lm(plain), train, val)
    got = CALLS[call](*gf.hf.causal_lm(less, logit_chunks=3), train, val)
    assert_close(got, want, 1e-10)


def test_layers_in_training_mode() -> None:
    """Their dropout draws the same numbers again; transformers' own checkpoints stay off."""
    losses = []
    for enabled in (False, True):
        model = gpt2().double().train()
        if enabled:
            for layer in model.transformer.h:
                layer.gradient_checkpointing = True
            gf.hf.enable_remat(model)
        model_fn, params = gf.hf.causal_lm(model)
        step = partial(gf.ghost_value_and_grad, model_fn, params, text(4, 7, 0))
        step(direction=params, randomness="different")
        torch.manual_seed(0)
        losses.append(step(direction=params, randomness="different"))
    assert_close(losses[1], losses[0], 1e-10)


def test_an_encoder_and_a_decoder() -> None:
    model = t5_encoder_decoder()
    batch = text(4, 7, 0) | {"labels": torch.arange(4) % 3}
    batch["input_ids"][:, -1] = 2
    model_fn, params = gf.hf.sequence_classification(model)
    want = gf.ghost_norm(model_fn, params, batch)
    gf.hf.enable_remat(model)
    assert_close(gf.ghost_norm(*gf.hf.sequence_classification(model), batch), want, 1e-5)


def test_enabling_and_disabling() -> None:
    model = gpt2()
    with pytest.raises(gf.OptionError, match="has not been called"):
        gf.hf.disable_remat(model)
    gf.hf.enable_remat(model)
    with pytest.raises(gf.OptionError, match="already"):
        gf.hf.enable_remat(model)
    other = copy.deepcopy(model)
    assert other.transformer.h[0].forward.__self__ is other.transformer.h[0]
    gf.hf.disable_remat(model)
    assert "forward" not in vars(model.transformer.h[0])
    with pytest.raises(gf.OptionError, match="no layers"):
        gf.hf.enable_remat(nn.Linear(2, 2))


# --- memory -----------------------------------------------------------------------------------


def deep() -> nn.Module:
    sizes = {"vocab_size": 40, "n_positions": 64, "n_embd": 16, "n_layer": 8, "n_head": 2}
    return seeded(hf.GPT2LMHeadModel, hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def test_layers_keep_less() -> None:
    peaks = []
    train = text(8, 32, 0)
    for enabled in (True, False):
        model = deep()
        if enabled:
            gf.hf.enable_remat(model)
        model_fn, params = gf.hf.causal_lm(model)
        gf.ghost_dot_prod(model_fn, params, train, direction=params)
        with LiveBytes() as memory:
            gf.ghost_dot_prod(model_fn, params, train, direction=params)
        peaks.append(memory.peak)
    assert peaks[0] < 0.45 * peaks[1]


@pytest.mark.parametrize("call", ["scores", "step", "direction", "gradient"])
def test_logits_never_exist_as_a_whole(call: str) -> None:
    n, t, vocabulary = 4, 17, 600
    sizes = {"vocab_size": vocabulary, "n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = seeded(hf.GPT2LMHeadModel, hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    calls: dict[str, Callable[..., Any]] = {
        "scores": lambda f, p, x: gf.ghost_dot_prod(f, p, x, direction=p),
        "step": lambda f, p, x: gf.ghost_value_and_grad(f, p, x, direction=p),
        "direction": lambda f, p, x: gf.direction(f, p, x),
        "gradient": lambda f, p, x: torch.func.grad(lambda p: f(p, x).mean())(p),
    }
    batch = text(n, t, 0)
    largest = []
    for pieces in (4, None):
        model_fn, params = gf.hf.causal_lm(model, logit_chunks=pieces)
        calls[call](model_fn, params, batch)
        with Allocations(params, batch) as log:
            calls[call](model_fn, params, batch)
        largest.append(log.largest)
    logits = 4 * n * (t - 1) * vocabulary
    assert largest[0] <= logits / 4
    assert largest[1] >= logits


def test_any_number_of_pieces() -> None:
    model = gpt2().double()
    batch = text(3, 6, 0, "left")
    want = gf.hf.causal_lm(model)
    want = want[0](want[1], batch)
    for pieces in (1, 2, 5, 50):
        model_fn, params = gf.hf.causal_lm(model, logit_chunks=pieces)
        assert_close(model_fn(params, batch), want, 1e-12)


@pytest.mark.parametrize("pieces", [0, -1, 2.0, True])
def test_bad_numbers_of_pieces_are_refused(pieces: Any) -> None:
    with pytest.raises(gf.OptionError, match="logit_chunks must be a positive integer"):
        gf.hf.causal_lm(gpt2(), logit_chunks=pieces)


def test_a_head_with_a_soft_cap_is_refused() -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = seeded(hf.Gemma2ForCausalLM, hf.Gemma2Config(**SMALL, **heads))
    with pytest.raises(gf.OptionError, match="soft cap"):
        gf.hf.causal_lm(model, logit_chunks=2)
