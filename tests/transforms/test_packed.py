"""Documents that share rows: every quantity beside each document unpacked and run alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from counted import Counted
from every_quantity import ESSENTIAL, GHOST, OTHER_MODES, Case, assert_right
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import ghostfunc as gf
from ghostfunc._base import documents
from ghostfunc._taps import claim
from ghostfunc._taps.mode import TapMode

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
            torch.autograd.grad(self._loss(document), leaves) for document in self._alone[id(batch)]
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


# --- documents that see each other ------------------------------------------------------------


def _forgetful(module: nn.Module, docs: gf.Documents) -> Tensor:
    """Causal attention over the borders of documents: positions are not passed on."""
    rows = docs.rows()
    logits = module(input_ids=rows["input_ids"], use_cache=False).logits
    targets = docs.to_rows(F.pad(docs["labels"][:, 1:], (0, 1), value=-100), fill=-100)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return docs.sums(losses.view(targets.shape))


ASKED: dict[str, Callable[..., Any]] = {
    "dots": lambda fn, p, docs: gf.ghost_dot_prod(fn, p, docs, direction=p),
    "dots by jvp": lambda fn, p, docs: gf.ghost_dot_prod(fn, p, docs, direction=p, mode="jvp"),
    "norms": gf.ghost_norm,
    "clipping": lambda fn, p, docs: gf.ghost_clipped_grad(fn, p, docs, max_norm=1.0),
    "gradients": gf.per_sample_grads,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("asked", ASKED)
def test_documents_that_see_each_other_are_refused(name: str, asked: str) -> None:
    model_fn, params = gf.from_module(model(name), _forgetful)
    docs = by_segments(*draw([[3], [5, 4, 3], [2, 6]], 1))
    alone = by_segments(*draw([[3], [5], [4]], 1))
    ASKED[asked](model_fn, params, alone)  # what is known of documents in rows of their own
    with pytest.raises(gf.CoupledSamplesError, match="depends on others of its row"):
        ASKED[asked](model_fn, params, docs)


def test_equal_documents_that_see_each_other_are_refused() -> None:
    model_fn, params = gf.from_module(model("GPT-2"), _forgetful)
    rows = {"input_ids": torch.tensor([[5, 6, 7] * 3]), "labels": torch.tensor([[5, 6, 7] * 3])}
    docs = gf.documents(rows, cu_seq_lens=torch.tensor([0, 3, 6, 9]))
    with pytest.raises(gf.CoupledSamplesError):
        gf.ghost_norm(model_fn, params, docs)


def _leak(when: str) -> Callable[[nn.Module, gf.Documents], Tensor]:
    """A loss whose documents see the first position of their row in some batches. What decides are
    values of tensors: numbers of Python's are part of a program's way."""

    def loss(module: nn.Module, docs: gf.Documents) -> Tensor:
        rows = docs.rows()
        x, place = rows["x"], rows["position_ids"]
        h = module(x)
        number = (place == 0).cumsum(1) - 1  # those of padding count on
        leaks = {
            "a third document": number == 2,
            "a full row": (place[:, 11:] > 0).any() & (docs.row.max() > 0),
            "many documents": torch.ones_like(docs.row).sum() > 8,
            "long documents": docs.length.max() > 8,
            "a value": (x > 5).any(),
        }[when]
        seen = F.pad((leaks & (number > 0)).to(h.dtype)[..., None], (0, h.shape[1] - 1))
        return docs.sums((h + 0.3 * seen @ h).square().sum(-1))

    return loss


LATER: dict[str, tuple[list[list[int]], list[list[int]]]] = {
    "a third document": ([[6, 5], [7, 4]], [[6, 5], [3, 4, 4]]),
    "a full row": ([[6, 5], [7, 4]], [[6, 6], [7, 5]]),
    "many documents": ([[3, 3, 3, 2], [3, 3, 3, 2]], [[3, 2, 3, 2], [2, 2, 2, 3, 2]]),
    "long documents": ([[6, 5], [7, 4]], [[2, 9], [6, 5]]),
}


@pytest.mark.parametrize(
    ("when", "asked"),
    [*((when, "norms") for when in LATER), *(("long documents", asked) for asked in ASKED)],
)
def test_documents_that_see_each_other_later(when: str, asked: str) -> None:
    """At the same [R, T] of a function that was proved before, in another layout."""
    torch.manual_seed(0)
    model_fn, params = gf.from_module(nn.Linear(3, 4).double(), _leak(when))
    first, later = (_of_lengths(rows, 12) for rows in LATER[when])
    ASKED[asked](model_fn, params, first)
    assert later.rows()["x"].shape == first.rows()["x"].shape
    with pytest.raises(gf.CoupledSamplesError, match="depends on others of its row"):
        ASKED[asked](model_fn, params, later)


@pytest.mark.parametrize("rows", [[[6, 5], [7, 4]], [[3, 3, 5]]])
def test_documents_that_values_couple(rows: list[list[int]]) -> None:
    """Nothing but a value tells these batches from each other: every call has to be proved."""
    torch.manual_seed(0)
    model_fn, params = gf.from_module(nn.Linear(3, 4).double(), _leak("a value"))
    first, later = _of_lengths(rows, 12), _of_lengths(rows, 12)
    later.tensors["x"][1, 1, 1] = 6.0
    for asked in (gf.ghost_norm, partial(gf.ghost_dot_prod, direction=params)):
        asked(model_fn, params, first, check="always")
        with pytest.raises(gf.CoupledSamplesError, match="depends on others of its row"):
            _often(asked, model_fn, params, later)


def _often(asked: Callable[..., Any], *args: Any) -> None:
    """One document after the other is proved."""
    for _ in range(6):
        asked(*args, check="always")


def _of_lengths(rows: list[list[int]], width: int) -> gf.Documents:
    segments = torch.full((len(rows), width), -1)
    for r, lengths in enumerate(rows):
        numbers = [k for k, length in enumerate(lengths) for _ in range(length)]
        segments[r, : len(numbers)] = torch.tensor(numbers)
    return gf.documents({"x": torch.randn(len(rows), width, 3).double()}, segments=segments)


def test_a_mask_that_lets_documents_see_each_other_is_refused() -> None:
    ids, _, segments = draw(TRAIN, 1)
    mask = torch.ones(3, 1, 12, 12, dtype=torch.bool).tril()
    with pytest.raises(gf.CoupledSamplesError, match=r"attention_mask\[0\] lets position 5 see"):
        gf.documents({"input_ids": ids, "attention_mask": mask}, segments=segments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_added_masks_hide_what_the_softmax_makes_zero(dtype: torch.dtype) -> None:
    ids, _, segments = draw(TRAIN, 1)
    seen = blocks(segments)

    def added(hidden: float) -> gf.Documents:
        mask = torch.full(seen.shape, 3.0, dtype=dtype).masked_fill_(~seen, hidden)
        return gf.documents({"input_ids": ids, "attention_mask": mask}, segments=segments)

    for hidden in (-math.inf, torch.finfo(dtype).min, -1e9, -1e4):
        if hidden >= torch.finfo(dtype).min:
            added(hidden)
    for hidden in (-50.0, -150.0, 0.0):  # exp(-50) is no zero, and scores may differ by a hundred
        with pytest.raises(gf.CoupledSamplesError, match=rf"it adds {hidden:.4g} there, and the"):
            added(hidden)
    with pytest.raises(gf.BatchError, match="has NaN"):
        added(math.nan)


def test_a_document_that_sees_padding_is_refused() -> None:
    ids = torch.ones(1, 3).long()
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(gf.CoupledSamplesError, match="see position 2 of padding"):
        gf.documents(
            {"input_ids": ids, "attention_mask": mask, "segments": ids - ids.cumsum(1) // 3 * 2}
        )


def test_parameters_of_documents_laid_apart_are_refused() -> None:
    layer = nn.Linear(3, 1).double()
    docs = gf.documents({"x": torch.randn(2, 6, 3).double(), "segments": HALVES.repeat(2, 1)})
    losses: list[Callable[..., Tensor]] = [
        lambda m, docs: m(docs.from_rows(docs.rows()["x"])).squeeze(-1).square().sum(1),
        lambda m, docs: m(docs.from_rows(docs.rows()["x"]).mean(1)).squeeze(-1).square(),
        lambda m, docs: m(docs["x"]).squeeze(-1).square().sum(1),
    ]
    for loss in losses:
        model_fn, params = gf.from_module(layer, loss)
        with pytest.raises(gf.SampleAxisError, match=r"laid apart \(after docs.from_rows"):
            gf.ghost_norm(model_fn, params, docs)


def test_parameters_of_whole_rows_are_refused() -> None:
    layer = nn.Linear(3, 1).double()

    def loss(module: nn.Module, docs: gf.Documents) -> Tensor:
        x = docs.rows()["x"]
        return docs.sums(module(x.mean(1)).expand(-1, x.shape[1]))

    model_fn, params = gf.from_module(layer, loss)
    docs = gf.documents(
        {"x": torch.randn(1, 6, 3).double()}, segments=torch.tensor([[0, 0, 0, 1, 1, 1]])
    )
    with pytest.raises(gf.GhostError):
        gf.ghost_norm(model_fn, params, docs)


def test_an_op_that_mixes_positions_is_no_wrong_number() -> None:
    """A convolution within documents is exact in principle, and its rule sees single positions."""
    torch.manual_seed(0)
    conv = nn.Conv1d(2, 2, 2).double()

    def loss(module: nn.Module, docs: gf.Documents) -> Tensor:
        x = docs.rows()["x"]
        gap = docs.rows()["position_ids"] == 0  # nothing comes into a document from before
        x = torch.where(gap[..., None], torch.zeros_like(x), x)
        y = module(F.pad(x.mT, (1, 0))).mT
        return docs.sums(y.square().sum(-1) * ~gap)

    model_fn, params = gf.from_module(conv, loss)
    docs = gf.documents(
        {"x": torch.randn(2, 6, 2).double()}, segments=torch.tensor([[0] * 3 + [1] * 3, [0] * 6])
    )
    with pytest.raises(gf.GhostError):
        gf.ghost_norm(model_fn, params, docs)


# --- what a document is -----------------------------------------------------------------------

SIX = {"input_ids": torch.arange(3, 9)[None]}
HALVES = torch.tensor([[0, 0, 0, 1, 1, 1]])
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "comes back": (
        {"segments": torch.tensor([[0, 0, 1, 1, 0, 0]])},
        r"segments\[0\] has document 0 up to position 1 and again from position 4",
    ),
    "comes back after padding": (
        {"segments": torch.tensor([[0, 0, -1, 0, 1, 1]])},
        r"segments\[0\] has document 0 up to position 1 and again from position 3",
    ),
    "all padding": ({"segments": torch.full((1, 6), -1)}, "segments is negative everywhere"),
    "floats": ({"segments": torch.zeros(1, 6)}, r"segments has dtype torch.float32"),
    "short": ({"segments": torch.zeros(1, 5).long()}, r"segments has shape \[1, 5\]"),
    "one axis": ({"segments": torch.zeros(6).long()}, r"segments has shape \[6\]"),
    "overlap": (
        {"cu_seq_lens": torch.tensor([0, 4, 3, 6])},
        r"cu_seq_lens\[2\] is 3 after 4: documents overlap",
    ),
    "gap at the end": ({"cu_seq_lens": torch.tensor([0, 3, 5])}, "cu_seq_lens .* leaves a gap"),
    "gap at the start": ({"cu_seq_lens": torch.tensor([1, 3, 6])}, "cu_seq_lens .* leaves a gap"),
    "bounds of rows": ({"cu_seq_lens": torch.tensor([[0, 6]])}, r"cu_seq_lens has shape \[1, 2\]"),
    "position in the middle": (
        {"position_ids": torch.tensor([[0, 1, 2, 0, 2, 3]])},
        r"position_ids\[0, 4\] is 2",
    ),
    "position at the start": (
        {"position_ids": torch.tensor([[3, 4, 5, 0, 1, 2]])},
        r"position_ids\[0, 0\] is 3",
    ),
    "two that disagree": (
        {"position_ids": torch.arange(6)[None], "segments": HALVES},
        r"segments and position_ids disagree at position \[0, 3\]",
    ),
    "no label": (
        {"labels": torch.tensor([[3, 4, 5, -100, -100, -100]]), "segments": HALVES},
        r"labels\[0, 3:6\] are all -100",
    ),
    "other rows": (
        {"labels": torch.zeros(2, 6).long(), "segments": HALVES},
        r"labels has shape \[2, 6\]",
    ),
    "masked inside": (
        {"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1]]), "segments": HALVES},
        r"attention_mask\[0, 1\] is 0 inside document 0",
    ),
    "numbers in the mask": (
        {"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2]])},
        r"attention_mask\[0, 3\] is 2",
    ),
    "shape of the mask": (
        {"attention_mask": torch.ones(1, 5), "segments": HALVES},
        r"attention_mask has shape \[1, 5\]",
    ),
    "dtype of the mask": (
        {"attention_mask": torch.ones(1, 1, 6, 6).long(), "segments": HALVES},
        "attention_mask .* has dtype torch.int64",
    ),
    "nothing": ({}, "nothing says where documents begin"),
    "no tensor": ({"segments": [[0] * 6]}, "segments is a list"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_rows_is_said(what: str) -> None:
    extra, message = WRONG[what]
    with pytest.raises(gf.BatchError, match=message):
        gf.documents(SIX | extra)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int32])
def test_masks_of_padding_have_any_dtype(dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]]).to(dtype)
    docs = gf.documents({"max_length_q": 5, **SIX, "attention_mask": mask, "segments": HALVES})
    assert docs.length.tolist() == [3, 2]


@pytest.mark.parametrize("batch", [None, SIX["input_ids"], [SIX], "input_ids"])
def test_rows_come_by_name(batch: Any) -> None:
    with pytest.raises(gf.BatchError, match="expected packed rows by name"):
        gf.documents(batch)


def test_documents_are_not_made_of_documents() -> None:
    with pytest.raises(gf.BatchError, match="made of documents already"):
        gf.documents(gf.documents(SIX, segments=HALVES))  # type: ignore[arg-type]


def test_bounds_are_for_one_row() -> None:
    ids = torch.ones(2, 3).long()
    with pytest.raises(gf.BatchError, match="cu_seq_lens is for one row"):
        gf.documents({"input_ids": ids}, cu_seq_lens=torch.tensor([0, 3]))


def test_what_is_given_twice_is_refused() -> None:
    with pytest.raises(gf.BatchError, match="segments is given twice"):
        gf.documents(SIX | {"segments": HALVES}, segments=HALVES)


def test_rows_without_content_are_refused() -> None:
    with pytest.raises(gf.BatchError, match="has no rows"):
        gf.documents({"segments": HALVES})


def test_what_documents_cannot_be_asked_for() -> None:
    module = model("GPT-2")
    model_fn, params = gf.hf.causal_lm(module)
    ids, labels, segments = draw(TRAIN, 1)
    docs = by_segments(ids, labels, segments)
    with pytest.raises(gf.PositionAxisError, match="packed documents"):
        gf.ghost_dot_prod(model_fn, params, docs, direction=params, per_position=True)
    with pytest.raises(gf.BatchError, match=r"gf\.documents"):
        gf.ghost_norm(model_fn, params, {"input_ids": ids, "segments": segments})
    with pytest.raises(gf.BatchError, match="from_rows got a tensor of shape"):
        docs.from_rows(torch.zeros(1, 3))
    with pytest.raises(gf.BatchError, match="have no 'pixels'"):
        docs["pixels"]
    chunked, _ = gf.hf.causal_lm(module, logit_chunks=2)
    with pytest.raises(gf.OptionError, match="logit_chunks"):
        chunked(params, docs)


def test_rows_are_what_they_were() -> None:
    ids, labels, segments = draw(TRAIN, 1)
    docs = by_segments(ids, labels, segments)
    rows = docs.rows()
    own = segments >= 0
    assert torch.equal(rows["input_ids"][own], ids[own])
    assert torch.equal(rows["labels"], labels.masked_fill(~own, -100))
    assert torch.equal(rows["position_ids"][own], positions(segments)[own])
    assert torch.equal(docs.sums(own.double()), docs.length.double())
    assert repr(docs) == "Documents(input_ids: [7, 10], labels: [7, 10])"
    assert len(docs) == 7


def test_either_side_may_be_packed() -> None:
    """Scores of documents with ordinary samples, with several sets, and the other way round."""
    model_fn, params = gf.hf.causal_lm(model("GPT-2"))
    docs = by_segments(*draw(TRAIN, 1))
    samples = {"input_ids": torch.randint(3, VOCABULARY, (4, 8))}
    many = {"packed": by_segments(*draw(VAL, 2)), "samples": samples}

    def rows(batch: Any) -> Tensor:
        grads = gf.per_sample_grads(model_fn, params, batch, vectorize=False)
        return torch.cat([g.flatten(1) for g in grads.values()], dim=1)

    def check(got: Tensor, train: Any, val: Any) -> None:
        torch.testing.assert_close(got, rows(train) @ rows(val).mean(0), rtol=1e-10, atol=1e-10)

    check(gf.ghost_dot_prod(model_fn, params, docs, samples), docs, samples)
    check(gf.ghost_dot_prod(model_fn, params, samples, docs), samples, docs)
    u = {name: gf.direction(model_fn, params, val) for name, val in many.items()}
    for name, got in gf.ghost_dot_prod(model_fn, params, docs, direction=u).items():
        check(got, docs, many[name])
    without = gf.documents({"input_ids": docs["input_ids"]}, segments=_all_alike(docs))
    sets = {"a": many["packed"], "b": docs}
    for name, got in gf.ghost_dot_prod(model_fn, params, without, sets).items():
        check(got, without, sets[name])


def _all_alike(docs: gf.Documents) -> Tensor:
    """Every document in a row of its own."""
    places = torch.arange(docs["input_ids"].shape[1])
    return torch.where(places < docs.length[:, None], 0, -1)


def test_batches_of_other_numbers_of_documents_are_not_proved_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stream of full rows holds another number of documents in every batch."""
    model_fn, params = gf.hf.causal_lm(model("GPT-2"))
    gf.ghost_norm(model_fn, params, by_segments(*draw([[5, 4, 3], [7, 5], [2, 10]], 1)))
    made: list[int] = []
    compare = claim.weighted_gradients  # what a proof takes from plain autograd
    monkeypatch.setattr(
        claim, "weighted_gradients", lambda *args, **kw: made.append(1) or compare(*args, **kw)
    )
    gf.ghost_norm(model_fn, params, by_segments(*draw([[3, 3, 3, 3], [6, 6], [12]], 2)))
    assert not made
    gf.ghost_norm(model_fn, params, by_segments(*draw([[3, 3, 3], [6, 3], [9]], 2)))
    assert made


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_other_documents_go_the_way_of_earlier_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the same length are watched step by step, whatever documents they hold, and no call
    but those that make masks and places is looked at more closely than in an unpacked run."""
    module, val = model(name), draw(VAL, 2)
    sides = by_segments(*val), unpacked(*val)
    model_fn, params = gf.hf.causal_lm(module)
    for seed, rows in enumerate([[[5, 4, 3], [7, 5]], [[2, 10], [4, 8]], [[3, 3, 6], [12]]]):
        train = draw(rows, seed)
        asked = Unpacked(module, (by_segments(*train), unpacked(*train)), sides)
        asked.model_fn = model_fn
        assert_right(asked, ESSENTIAL, tolerance=1e-10)
    looked: list[str] = []
    note = TapMode._run_and_note
    monkeypatch.setattr(
        TapMode, "_run_and_note", lambda *args: looked.append(args[1]) or note(*args)
    )
    whole = {"input_ids": train[0], "attention_mask": torch.ones_like(train[0])}
    counts = []
    for batch in (whole, asked.train):
        for _ in range(3):
            looked.clear()
            gf.ghost_norm(model_fn, params, batch)
        counts.append(len(looked))
    assert 0 < counts[1] <= 3 * counts[0]


def test_uneven_documents_cost_what_their_rows_cost() -> None:
    """Documents of 3 to 200 positions: the products are those of the rows, but for inner products
    of more samples, in a number of calls that grows with how different the lengths are."""
    sizes = {"vocab_size": 40, "n_positions": 256, "n_embd": 32, "n_layer": 1, "n_head": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    module = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **special)).eval()
    model_fn, params = gf.hf.causal_lm(module)
    ids = torch.randint(1, 40, (2, 256), generator=torch.Generator().manual_seed(0))
    segments = torch.arange(4).repeat_interleave(torch.tensor([3, 40, 200, 13])).expand(2, -1)
    rows = {"input_ids": ids, "labels": ids}
    packed = gf.documents(rows, segments=segments)

    def clipped(batch: Any) -> Tensor:
        return gf.ghost_clipped_grad(model_fn, params, batch, max_norm=0.01).norms

    def norms(batch: Any) -> Tensor:
        return gf.ghost_norm(model_fn, params, batch)

    def gram(batch: Any) -> Tensor:
        return gf.ghost_gram(model_fn, params, batch)

    def health(batch: Any) -> gf.HealthStep:
        return gf.ghost_health(model_fn, params, batch)

    limits = {clipped: 1.02, norms: 1.02, gram: 1.04, health: 1.04}
    for asked, limit in limits.items():
        counted = []
        for batch in (rows, packed):
            asked(batch)
            with Counted() as found:
                asked(batch)
            counted.append((found.total, found.calls))
        (plain, few), (mine, more) = counted
        assert mine <= limit * plain
        assert more <= 5 * few


def test_documents_are_cut_into_groups_with_the_fewest_positions() -> None:
    def cost(lengths: np.ndarray, cuts: Sequence[int]) -> float:
        groups = itertools.pairwise(cuts)
        return sum(lengths[a] * (b - a) + lengths.sum() / documents.GROUPS for a, b in groups)

    draw = np.random.default_rng(0)
    for _ in range(50):
        lengths = -np.sort(-draw.integers(1, 30, draw.integers(1, 7)))
        n = len(lengths)
        inner = itertools.chain.from_iterable(
            itertools.combinations(range(1, n), k) for k in range(n)
        )
        best = min(cost(lengths, [0, *cuts, n]) for cuts in inner)
        assert cost(lengths, documents._cuts(lengths)) == pytest.approx(best)


def test_numbers_as_labels_have_zeros_behind_the_end() -> None:
    """Losses of a regression over all positions that a batch of documents has."""
    y = torch.arange(1.0, 9.0)[None]
    docs = gf.documents({"x": y, "labels": y, "segments": torch.tensor([[0] * 6 + [1] * 2])})
    assert docs["labels"].sum(1).tolist() == [21.0, 15.0]
    assert docs.rows()["labels"].tolist() == y.tolist()


@pytest.mark.parametrize("shape", [(2, 5), (2, 7), (2,), (3, 6)])
def test_rows_are_made_of_whole_documents(shape: tuple[int, ...]) -> None:
    docs = gf.documents({"x": torch.ones(1, 8), "segments": torch.tensor([[0] * 6 + [1] * 2])})
    with pytest.raises(gf.BatchError, match=r"to_rows got .* these documents are \[2, 6"):
        docs.to_rows(torch.ones(shape))
