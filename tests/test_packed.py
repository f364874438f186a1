"""Documents that share rows: every quantity beside each document unpacked and run alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from every_quantity import ESSENTIAL, GHOST, OTHER_MODES, Case, assert_right
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import ghostfunc as gf

VOCABULARY = 40
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


def _gpt2() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **special))


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL))


def _qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, head_dim=8))


MODELS: dict[str, Callable[[], nn.Module]] = {"GPT-2": _gpt2, "Llama": _llama, "Qwen3": _qwen3}


def model(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]().eval().double()


@pytest.fixture(autouse=True)
def _norms_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """RMS norms as they are, but for their cast to float32, which rounds at 1e-8."""

    def forward(self: Any, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (x * scale)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    monkeypatch.setattr(Qwen3RMSNorm, "forward", forward)


def draw(rows: list[list[int]], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of documents of these lengths, padded at their ends: `input_ids`, `labels`, `segments`,
    `[R, T]` each. Some labels do not count."""
    generator = torch.Generator().manual_seed(seed)
    width = max(map(sum, rows))
    ids = torch.randint(3, VOCABULARY, (len(rows), width), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
    segments = torch.full_like(ids, -1)
    for r, lengths in enumerate(rows):
        numbers = [k for k, length in enumerate(lengths) for _ in range(length)]
        segments[r, : len(numbers)] = torch.tensor(numbers)
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        labels[r, starts + 1] = ids[r, starts + 1]  # a label for every document
    return ids.masked_fill(segments < 0, 0), labels, segments


def unpacked(ids: Tensor, labels: Tensor, segments: Tensor) -> list[dict[str, Tensor]]:
    """Every document by itself, `[1, length]`."""
    documents = []
    for r in range(len(ids)):
        for number in segments[r].unique().tolist():
            own = segments[r] == number
            if number >= 0:
                documents.append({"input_ids": ids[r, own][None], "labels": labels[r, own][None]})
    return documents


def positions(segments: Tensor) -> Tensor:
    """0, 1, 2, ... in every document."""
    own = (segments[:, :, None] == segments[:, None, :]).long()
    return own.tril().sum(-1) - 1


def blocks(segments: Tensor) -> Tensor:
    """A causal mask in every document, `[R, 1, T, T]`."""
    same = segments[:, :, None] == segments[:, None, :]
    return same.tril()[:, None]


class Unpacked(Case):
    """A case whose oracle runs one unpacked document after the other through the model itself."""

    def __init__(self, module: nn.Module, train: Any, val: Any) -> None:
        model_fn, params = gf.hf.causal_lm(module)
        super().__init__(model_fn, params, train[0], val[0])
        self._module = module
        self._alone = {id(train[0]): train[1], id(val[0]): val[1]}

    def _grads(self, batch: Any) -> list[Tensor]:
        named = dict(self._module.named_parameters())
        leaves = [named[name] for name in sorted(self.params)]
        rows = [
            torch.autograd.grad(self._loss(document), leaves)
            for document in self._alone[id(batch)]
        ]
        return [torch.stack(column).flatten(1) for column in zip(*rows, strict=True)]

    @property
    def losses(self) -> Tensor:  # type: ignore[override]
        with torch.no_grad():
            return torch.stack([self._loss(x) for x in self._alone[id(self.train)]])

    def _loss(self, document: dict[str, Tensor]) -> Tensor:
        logits = self._module(input_ids=document["input_ids"], use_cache=False).logits
        return F.cross_entropy(logits[0, :-1], document["labels"][0, 1:])


TRAIN, VAL = [[5, 4, 3], [7, 3], [2, 10]], [[6, 2], [4]]
FREE = [[5, 4, 3, 7, 3, 2]]


def by_segments(ids: Tensor, labels: Tensor, segments: Tensor) -> gf.Documents:
    return gf.documents({"input_ids": ids, "labels": labels}, segments=segments)


def by_positions(ids: Tensor, labels: Tensor, segments: Tensor) -> gf.Documents:
    batch = {"input_ids": ids, "labels": labels, "attention_mask": (segments >= 0).long()}
    return gf.documents(batch | {"position_ids": positions(segments)})


def by_bounds(ids: Tensor, labels: Tensor, segments: Tensor) -> gf.Documents:
    lengths = segments[0].bincount()
    bounds = F.pad(lengths.cumsum(0), (1, 0)).int()
    return gf.documents({"input_ids": ids, "labels": labels}, cu_seq_lens=bounds)


def by_masks(ids: Tensor, labels: Tensor, segments: Tensor) -> gf.Documents:
    batch = {"input_ids": ids, "labels": labels, "attention_mask": blocks(segments)}
    return gf.documents(batch, segments=segments)


def by_added_masks(ids: Tensor, labels: Tensor, segments: Tensor) -> gf.Documents:
    seen = blocks(segments)
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(
        ~seen, torch.finfo(torch.float64).min
    )
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return gf.documents(batch, segments=segments)


WAYS: dict[str, tuple[Callable[..., gf.Documents], list[list[int]]]] = {
    "segments": (by_segments, TRAIN),
    "position_ids": (by_positions, TRAIN),
    "cu_seq_lens": (by_bounds, FREE),
    "masks": (by_masks, TRAIN),
    "added masks": (by_added_masks, FREE),
}


def case(name: str, way: str) -> Unpacked:
    pack, rows = WAYS[way]
    train, val = draw(rows, 1), draw(FREE if rows is FREE else VAL, 2)
    sides = [(pack(*side), unpacked(*side)) for side in (train, val)]
    return Unpacked(model(name), *sides)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["segments", "masks"])
def test_every_quantity_of_documents(name: str, way: str) -> None:
    assert_right(case(name, way), GHOST, tolerance=1e-10)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["position_ids", "cu_seq_lens", "added masks"])
def test_every_way_to_say_where_documents_begin(name: str, way: str) -> None:
    assert_right(case(name, way), ESSENTIAL, tolerance=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_documents_in_other_modes(name: str) -> None:
    assert_right(case(name, "segments"), (*OTHER_MODES, "vmap_over_directions"), tolerance=1e-10)
