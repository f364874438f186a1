"""`F.multi_head_attention_forward` and what is built on it, in every layout, with every option."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_modules import check_module

import ghostfunc as gf
from ghostfunc.testing import Case, check_rule

FLAGS = list(itertools.product((False, True), repeat=2))


def padding(n: int, generator: torch.Generator) -> Tensor:
    """A mask of keys that leaves at least the first."""
    lengths = torch.randint(1, 5, (n, 1), generator=generator)
    return torch.arange(4) >= lengths


@pytest.mark.parametrize(("batch_first", "bias"), FLAGS)
@pytest.mark.parametrize(("add_bias_kv", "add_zero_attn"), FLAGS)
@pytest.mark.parametrize("form", ["self", "key is value", "separate", "three widths"])
def test_multi_head_attention(
    batch_first: bool, bias: bool, add_bias_kv: bool, add_zero_attn: bool, form: str
) -> None:
    widths = {"kdim": 3, "vdim": 5} if form == "three widths" else {}
    module = nn.MultiheadAttention(
        8,
        2,
        bias=bias,
        add_bias_kv=add_bias_kv,
        add_zero_attn=add_zero_attn,
        batch_first=batch_first,
        **widths,
    )

    def run(module: nn.Module, x: Any) -> Tensor:
        def lay(y: Tensor) -> Tensor:
            return y if batch_first else y.transpose(0, 1)

        q, k, v = (lay(x[i]) for i in "qkv")
        if form == "self":
            k = v = q
        elif form == "key is value":
            v = k
        mask = x["mask"] if form != "self" else None
        out, weights = module(q, k, v, key_padding_mask=mask, need_weights=bias)
        out = lay(out).flatten(1)
        return out if weights is None else torch.cat([out, weights.flatten(1)], 1)

    samples = {
        "q": (3, 8),
        "k": (4, widths.get("kdim", 8)),
        "v": (4, widths.get("vdim", 8)),
        "mask": padding,
    }
    check_module(module, samples, run, F.multi_head_attention_forward)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_masks(causal: bool) -> None:
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    check_module(
        nn.MultiheadAttention(8, 2, batch_first=True),
        {"x": (4, 8)},
        lambda m, x: m(*[x["x"]] * 3, attn_mask=mask, is_causal=causal, need_weights=False)[0],
        F.multi_head_attention_forward,
    )


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize(("batch_first", "norm_first"), FLAGS)
def test_transformer(batch_first: bool, norm_first: bool) -> None:
    module = nn.Transformer(8, 2, 1, 1, 16, batch_first=batch_first, norm_first=norm_first).eval()

    def run(module: nn.Module, x: Any) -> Tensor:
        if batch_first:
            return module(x["source"], x["target"])
        return module(x["source"].transpose(0, 1), x["target"].transpose(0, 1)).transpose(0, 1)

    samples = {"source": (4, 8), "target": (3, 8)}
    check_module(module, samples, run, F.multi_head_attention_forward)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_inference_fast_path_does_not_bypass_the_taps() -> None:
    """In eval mode and without gradients, torch runs the layer as one fused op."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    module = nn.TransformerEncoder(layer, 2).double().eval()
    x = {
        "x": torch.randn(3, 4, 8).double(),
        "mask": padding(3, torch.Generator().manual_seed(0)),
    }
    model_fn, params = gf.from_module(
        module, lambda m, b: m(b["x"], src_key_padding_mask=b["mask"])[:, 0].sin().sum(1)
    )
    expected = gf.per_sample_grads(model_fn, params, x, vectorize=False)
    with torch.no_grad():
        grads = gf.per_sample_grads(model_fn, params, x, mode="ghost")
    for k, g in grads.items():
        assert torch.allclose(g, expected[k], atol=1e-12), k


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 3), (1, 2, 3, 3), (2, 1, 3), (1, 1, 1, 3)])
def test_a_learned_attention_mask(shape: Any) -> None:
    def call(p: Any, x: Any) -> Tensor:
        q, k, v = x["q"], x["k"], x["v"]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=p["bias"], scale=0.3)

    samples = dict.fromkeys("qkv", (2, 3, 4))
    check_rule(F.scaled_dot_product_attention, [Case(call, {"bias": shape}, samples)])


def test_learned_queries_and_keys() -> None:
    def queries(p: Any, x: Any) -> Tensor:
        return F.scaled_dot_product_attention(p["q"], x["x"], x["x"])

    def keys(p: Any, x: Any) -> Tensor:
        k = p["k"].expand(len(x["x"]), -1, -1, -1)
        return F.scaled_dot_product_attention(x["x"], k, k.sin())

    check_rule(
        F.scaled_dot_product_attention, [Case(queries, {"q": (1, 2, 5, 4)}, {"x": (2, 3, 4)})]
    )
    check_rule(Tensor.expand, [Case(keys, {"k": (2, 5, 4)}, {"x": (2, 3, 4)})])
