"""The zoo: tiny random models of Hugging Face's own classes, unmodified, with ragged batches.

One list for the tests and for the table in `docs/models.md`. Noise is added to every parameter, so
that no bias is zero and no scale one; every batch is ragged where the class allows it. All run in
float64; classes that compute parts in float32 whatever they are given are held to its digits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import ghostfunc as gf

VOCABULARY, CLASSES, WIDTH = 30, 3, 16
Batch = dict[str, Tensor]
Draw = Callable[[int, int, int], Batch]


@dataclass(frozen=True)
class Animal:
    """One model of the zoo.

    Attributes:
        make: makes the module; called under a fixed seed.
        adapt: the module as `(model_fn, params)`.
        draw: `draw(n, t, seed)` is a batch of n samples, of up to t positions where it has any.
        remarks: what is special about it, for the table.
        single: what runs in float32 whatever it is given; "" where nothing does.
        ghost: words of the error where ghost mode has no exact rule, the op's name among them.
    """

    make: Callable[[], nn.Module]
    adapt: Callable[[nn.Module], Any]
    draw: Draw
    remarks: str
    single: str = ""
    ghost: str = ""

    def build(self) -> tuple[nn.Module, Any, dict[str, Tensor]]:
        """The module, its `model_fn` and its parameters."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = self.make().eval().double()
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(torch.randn_like(p), alpha=0.2)
        return module, *self.adapt(module)

    @property
    def tolerance(self) -> float:
        return 1e-5 if self.single else 1e-10


ZOO: dict[str, Animal] = {}


# --- batches ----------------------------------------------------------------------------------


def _lengths(n: int, t: int, seed: int) -> Tensor:
    """Between half of t and t, at least one of them t."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint((t + 1) // 2, t + 1, (n, 1), generator=generator)
    lengths[-1] = t
    return lengths


def text(n: int, t: int, seed: int, *, left: bool = False) -> Batch:
    """Padded token ids with their `attention_mask`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (n, t), generator=generator)
    mask = (torch.arange(t) < _lengths(n, t, seed)).long()
    mask = mask.flip(1) if left else mask
    return {"input_ids": ids * mask, "attention_mask": mask}


def prompted(n: int, t: int, seed: int) -> Batch:
    """Padded text, whose first few tokens, a prompt of each sample's own length, have no label."""
    batch = text(n, t, seed)
    prompt = torch.arange(t) < 1 + torch.arange(n)[:, None] % 3
    labels = batch["input_ids"].masked_fill(prompt | (batch["attention_mask"] == 0), -100)
    return batch | {"labels": labels}


def left_padded(n: int, t: int, seed: int) -> Batch:
    return text(n, t, seed, left=True)


def unpadded(n: int, t: int, seed: int) -> Batch:
    """Whole samples, ragged in their labels only."""
    batch = prompted(n, t, seed)
    del batch["attention_mask"]
    return batch | {"input_ids": text(n, t, seed + 50)["input_ids"].clamp(min=4)}


def cloze(n: int, t: int, seed: int) -> Batch:
    batch = text(n, t, seed)
    hidden = (torch.arange(t) + torch.arange(n)[:, None]) % 3 == 1
    return batch | {
        "labels": batch["input_ids"].where(hidden & (batch["attention_mask"] == 1), -100)
    }


def classified(n: int, t: int, seed: int) -> Batch:
    return text(n, t, seed) | {"labels": (torch.arange(n) + seed) % CLASSES}


def translated(n: int, t: int, seed: int) -> Batch:
    """A source and a target of other lengths."""
    target = text(n, t - 2, seed + 100)
    labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
    return text(n, t, seed) | {"labels": labels}


def images(n: int, t: int, seed: int, size: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(n, 3, size, size, generator=generator).double(),
        "labels": (torch.arange(n) + seed) % CLASSES,
    }


def captioned(n: int, t: int, seed: int) -> Batch:
    """Images with padded text that ends in the end token."""
    batch = text(n, t, seed)
    ends = batch["attention_mask"].sum(1, keepdim=True) - 1
    batch["input_ids"].scatter_(1, ends, 2)
    return batch | {"pixel_values": images(n, t, seed)["pixel_values"]}


IMAGE_TOKEN, PATCHES = 3, 4


def illustrated(n: int, t: int, seed: int) -> Batch:
    """Text that holds the places of an image's patches, each sample's after its own prompt."""
    batch = text(n, t + PATCHES, seed)
    start = torch.arange(n)[:, None] % 2 + 1
    place = torch.arange(t + PATCHES)
    inside = (place >= start) & (place < start + PATCHES)
    mask = batch["attention_mask"].masked_fill(inside, 1)
    return {
        "input_ids": (batch["input_ids"] * mask).masked_fill(inside, IMAGE_TOKEN),
        "attention_mask": mask,
        "pixel_values": images(n, t, seed)["pixel_values"],
        "labels": batch["input_ids"].masked_fill(inside | (mask == 0), -100),
    }


MELS, FRAMES = 8, 16


def spoken(n: int, t: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    target = text(n, t - 2, seed)
    return {
        "input_features": torch.randn(n, MELS, FRAMES, generator=generator).double(),
        "labels": target["input_ids"].masked_fill(target["attention_mask"] == 0, -100),
    }


# --- losses -----------------------------------------------------------------------------------


def sequence_to_sequence(model: nn.Module) -> Any:
    """Each sample's mean over its own labels; the model shifts them for its decoder."""

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        labels = batch["labels"]
        logits = module(**batch, use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return losses.view(labels.shape).sum(1) / (labels != -100).sum(1)

    return gf.from_module(model, loss)


def matched(model: nn.Module) -> Any:
    """How well an image and its own text agree: CLIP's own loss compares all pairs, so one sample's
    would depend on the others."""

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        image = module.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
        tokens = {k: batch[k] for k in ("input_ids", "attention_mask")}
        caption = module.get_text_features(**tokens).pooler_output
        logit = F.cosine_similarity(image, caption) * module.logit_scale.exp()
        return F.softplus(-logit)

    return gf.from_module(model, loss)


def matched_in_a_table(model: nn.Module) -> Any:
    """The same by the model's own forward pass, which makes a table of all pairs besides."""

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        out = module(**batch)
        logit = (out.image_embeds * out.text_embeds).sum(1) * module.logit_scale.exp()
        return F.softplus(-logit)

    return gf.from_module(model, loss)


# --- the models -------------------------------------------------------------------------------

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_hidden_layers": 2}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    **HEADS,
}
GROUPED = {**SIZES, **SPECIAL, "num_key_value_heads": 2}
VISION = {"image_size": 16, "patch_size": 8, "num_channels": 3, "intermediate_size": 24}
FLOAT32_NORM = "RMS norm and softmax"


def _gpt2() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": WIDTH}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, n_layer=2, n_head=2, **SPECIAL))


def _llama(**options: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, **options))


def _mixtral(experts: str) -> nn.Module:
    config = hf.MixtralConfig(**GROUPED, num_local_experts=3, num_experts_per_tok=2)
    model = hf.MixtralForCausalLM(config)
    model.set_experts_implementation(experts)
    return model


def _qwen_moe(experts: str) -> nn.Module:
    config = hf.Qwen3MoeConfig(
        **GROUPED,
        head_dim=8,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        decoder_sparse_step=1,
    )
    model = hf.Qwen3MoeForCausalLM(config)
    model.set_experts_implementation(experts)
    return model


def _clip() -> nn.Module:
    config = hf.CLIPConfig(
        text_config={**SIZES, **SPECIAL, "projection_dim": 8},
        vision_config={**VISION, **HEADS, "hidden_size": WIDTH, "projection_dim": 8},
        projection_dim=8,
    )
    return hf.CLIPModel(config)


def _adapted(model: nn.Module, **options: Any) -> nn.Module:
    """A frozen model with low-rank adapters."""
    config = peft.LoraConfig(r=2, lora_alpha=4, **options)
    with warnings.catch_warnings():  # peft reads an attribute that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.get_peft_model(model, config)


causal, masked = gf.hf.causal_lm, gf.hf.masked_lm

ZOO["GPT-2"] = Animal(_gpt2, causal, prompted, "tied head, `Conv1D`, learnt positions")
ZOO["OPT"] = Animal(
    lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            ffn_dim=24,
            word_embed_proj_dim=8,
            max_position_embeddings=32,
            **HEADS,
            **SPECIAL,
        )
    ),
    causal,
    prompted,
    "tied head, projected embeddings, positions from the mask",
)
ZOO["GPT-NeoX"] = Animal(
    lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES, **SPECIAL)),
    causal,
    prompted,
    "packed queries, keys and values; parallel residual",
)
ZOO["Llama"] = Animal(
    lambda: _llama(), causal, prompted, "grouped queries, RMS norm", single=FLOAT32_NORM
)
ZOO["Llama, tied"] = Animal(
    lambda: _llama(tie_word_embeddings=True),
    causal,
    left_padded,
    "tied head, padded on the left",
    single=FLOAT32_NORM,
)
ZOO["Mistral"] = Animal(
    lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=3)),
    causal,
    prompted,
    "sliding window shorter than the samples",
    single=FLOAT32_NORM,
)
ZOO["Qwen3"] = Animal(
    lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8, tie_word_embeddings=True)),
    causal,
    prompted,
    "norms of queries and keys, tied head",
    single=FLOAT32_NORM,
)
ZOO["Gemma"] = Animal(
    lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**GROUPED, head_dim=8)),
    causal,
    prompted,
    "tied head, scaled embeddings, `1 + weight` norms",
    single=FLOAT32_NORM,
)
ZOO["Phi"] = Animal(
    lambda: hf.PhiForCausalLM(hf.PhiConfig(**GROUPED, partial_rotary_factor=0.5)),
    causal,
    prompted,
    "parallel attention and MLP, partial rotary positions",
)
_IMPLEMENTED = ("batched_mm", "grouped_mm", "eager")
for _name, _make in (("Mixtral", _mixtral), ("Qwen3-MoE", _qwen_moe)):
    for _experts in _IMPLEMENTED[_name == "Qwen3-MoE" :]:
        ZOO[f"{_name}, {_experts}"] = Animal(
            lambda make=_make, experts=_experts: make(experts),
            causal,
            prompted,
            f'routed experts, `experts_implementation="{_experts}"`',
            single=FLOAT32_NORM,
        )
ZOO["Mamba"] = Animal(
    lambda: hf.MambaForCausalLM(
        hf.MambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            state_size=4,
            num_hidden_layers=2,
            conv_kernel=3,
            **SPECIAL,
        )
    ),
    causal,
    prompted,
    "selective state space, depthwise convolution, tied head",
    single="RMS norm and scan",
)
ZOO["BERT"] = Animal(
    lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)), masked, cloze, "tied decoder, token types"
)
ZOO["RoBERTa"] = Animal(
    lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**SIZES, **SPECIAL)),
    masked,
    cloze,
    "positions counted from the ids, tied decoder",
)
ZOO["DistilBERT"] = Animal(
    lambda: hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=WIDTH,
            hidden_dim=24,
            n_layers=2,
            n_heads=2,
            max_position_embeddings=32,
        )
    ),
    masked,
    cloze,
    "tied decoder",
)
ZOO["ALBERT"] = Animal(
    lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**SIZES, embedding_size=8)),
    masked,
    cloze,
    "one layer's parameters for all layers, factored embeddings, tied decoder",
)
ZOO["DeBERTa"] = Animal(
    lambda: hf.DebertaForMaskedLM(
        hf.DebertaConfig(**SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"])
    ),
    masked,
    cloze,
    "disentangled attention, relative positions",
    single="layer norm",
)
ZOO["DeBERTa-v2"] = Animal(
    lambda: hf.DebertaV2ForSequenceClassification(
        hf.DebertaV2Config(
            **SIZES,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=4,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            num_labels=CLASSES,
        )
    ),
    gf.hf.sequence_classification,
    classified,
    "position buckets, keys shared between content and positions",
)
ZOO["T5"] = Animal(
    lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            eos_token_id=2,
            pad_token_id=0,
            decoder_start_token_id=0,
        )
    ),
    sequence_to_sequence,
    translated,
    "one table for encoder, decoder and head; relative bias shared by layers",
    single="softmax",
)
ZOO["BART"] = Animal(
    lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=32,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
            **SPECIAL,
        )
    ),
    sequence_to_sequence,
    translated,
    "one table for encoder, decoder and head",
)
ZOO["ViT"] = Animal(
    lambda: hf.ViTForImageClassification(
        hf.ViTConfig(**VISION, hidden_size=WIDTH, **HEADS, num_labels=CLASSES)
    ),
    gf.hf.image_classification,
    images,
    "class token, learnt positions",
)
ZOO["ConvNeXt"] = Animal(
    lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(
            patch_size=2,
            num_stages=2,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_scale_init_value=0.5,
            num_labels=CLASSES,
        )
    ),
    gf.hf.image_classification,
    images,
    "depthwise convolutions, layer scale, norms over channels first and last",
)
ZOO["ResNet"] = Animal(
    lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
            num_labels=CLASSES,
        )
    ),
    gf.hf.image_classification,
    images,
    "batch normalisation in eval mode, strided shortcuts",
)
ZOO["CLIP"] = Animal(
    _clip,
    matched,
    captioned,
    "`get_image_features` and `get_text_features`; each sample's image against its own text",
)
ZOO["CLIP, forward"] = Animal(
    _clip,
    matched_in_a_table,
    captioned,
    "the same loss by `forward`, which compares all pairs besides",
    ghost="torch.Tensor.mul on parameter 'exp(logit_scale)'",
)
ZOO["Whisper"] = Animal(
    lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=VOCABULARY,
            num_mel_bins=MELS,
            max_source_positions=FRAMES // 2,
            max_target_positions=32,
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            decoder_start_token_id=2,
            **SPECIAL,
        )
    ),
    sequence_to_sequence,
    spoken,
    "convolutions over frames, tied head; its sinusoidal positions are frozen",
)
ZOO["LLaVA"] = Animal(
    lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION, **HEADS, hidden_size=WIDTH),
            text_config=hf.LlamaConfig(**GROUPED),
            image_token_index=IMAGE_TOKEN,
            image_token_id=IMAGE_TOKEN,
            vision_feature_layer=-1,
        )
    ),
    causal,
    illustrated,
    "`input_ids`, `pixel_values` and `attention_mask` in one batch",
    single=FLOAT32_NORM,
)
ZOO["GPT-2, LoRA"] = Animal(
    lambda: _adapted(_gpt2(), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    causal,
    prompted,
    "adapters of `peft` alone; the base is frozen",
)
ZOO["Llama, DoRA"] = Animal(
    lambda: _adapted(_llama(), target_modules="all-linear", use_dora=True),
    causal,
    prompted,
    "adapters of `peft` with magnitudes, on all linear layers",
    single=FLOAT32_NORM,
)
ZOO["Llama, LoRA"] = Animal(
    lambda: _adapted(_llama(), target_modules=["q_proj", "v_proj"]),
    causal,
    prompted,
    "adapters of `peft` alone; the base is frozen",
    single=FLOAT32_NORM,
)
