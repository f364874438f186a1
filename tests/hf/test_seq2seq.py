"""Encoder-decoder models: their labels are the decoder's targets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compare import assert_close
from hf_trainers import gpt2, t5
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

import ghostfunc as gf


def pairs(n: int, seed: int, length: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (n, 9), generator=generator)
    labels = torch.randint(3, 40, (n, length), generator=generator)
    lengths = torch.randint(3, length + 1, (n, 1), generator=generator)
    mask = (torch.arange(9) < torch.randint(5, 10, (n, 1), generator=generator)).long()
    labels = labels.masked_fill(torch.arange(length) >= lengths, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    widths = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = BartConfig(**sizes, **widths, **heads, **special, decoder_start_token_id=2)
    return BartForConditionalGeneration(config)


# T5's softmax is float32 in every model.
@pytest.mark.parametrize(("make", "tolerance"), [(t5, 1e-6), (bart, 1e-10)])
def test_scores_of_targets(make: Callable[[], nn.Module], tolerance: float) -> None:
    module = make().eval().double()
    model_fn, params = gf.hf.seq2seq_lm(module)
    train, val = pairs(4, 0), pairs(3, 1, length=5)

    def gradients(batch: dict[str, Tensor]) -> Tensor:
        rows = []
        for i in range(len(batch["labels"])):
            loss = module(**{k: x[i : i + 1] for k, x in batch.items()}).loss
            grads = torch.autograd.grad(loss, list(module.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]))
        return torch.stack(rows)

    expected = gradients(train) @ gradients(val).mean(0)
    assert_close(gf.ghost_dot_prod(model_fn, params, train, val), expected, tolerance)
    given = train | {
        "decoder_input_ids": module.prepare_decoder_input_ids_from_labels(train["labels"])
    }
    torch.testing.assert_close(model_fn(params, given), model_fn(params, train))


def test_each_is_told_where_it_belongs() -> None:
    with pytest.raises(gf.OptionError, match=r"encoder-decoder.*Use gf\.hf\.seq2seq_lm\(model\)"):
        gf.hf.causal_lm(t5())
    with pytest.raises(gf.OptionError, match=r"no encoder-decoder.*gf\.hf\.causal_lm"):
        gf.hf.seq2seq_lm(gpt2())
    model_fn, params = gf.hf.seq2seq_lm(t5())
    with pytest.raises(gf.BatchError, match="no 'labels'"):
        model_fn(params, {"input_ids": torch.ones(2, 3, dtype=torch.long)})
