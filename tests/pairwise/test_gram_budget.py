"""Peak memory of Gram matrices stays within its budget, and the numbers do not notice."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor, nn

import ghostfunc as gf
from ghostfunc import OptionError
from ghostfunc._transforms import gram_blocks
from ghostfunc._transforms.live_bytes import LiveBytes

VOCABULARY, WIDTH, LAYERS = 50, 32, 3


class TiedLM(nn.Module):
    """Tied embedding, a few layers and a running mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        count = torch.arange(1, ids.shape[1] + 1)[:, None]
        for layer in self.layers:
            x = x + torch.tanh(layer(x)).cumsum(1) / count
        return self.head(x)


def loss(module: nn.Module, ids: Tensor) -> Tensor:
    logits = module(ids)[:, :-1]
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1).mean(1)


def ids(n: int, t: int) -> Tensor:
    return torch.randint(VOCABULARY, (n, t), generator=torch.Generator().manual_seed(n))


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    torch.manual_seed(0)
    return gf.from_module(TiedLM().double(), loss)


BATCHES = {"within": (ids(16, 40),), "between": (ids(12, 40), ids(10, 30))}
FEW = {"within": (ids(5, 8),), "between": (ids(5, 8), ids(4, 6))}


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("share", [0.8, 0.4, 0.2])
def test_peak_stays_within_the_budget(
    model: tuple[Any, Any], batches: tuple[Tensor, ...], share: float
) -> None:
    gf.ghost_gram(*model, *batches)  # traces
    with LiveBytes() as unbounded:
        expected = gf.ghost_gram(*model, *batches)
    budget = int(share * unbounded.peak)
    gc.collect()
    with LiveBytes() as bounded:
        gram = gf.ghost_gram(*model, *batches, memory_budget=budget)
    result = gram.numel() * gram.element_size()
    assert bounded.peak <= budget + 3 * result
    assert bounded.peak >= 0.4 * budget, "the budget is there to be used"
    assert_close(gram, expected, 1e-12)
    each = gf.ghost_gram(*model, *batches, memory_budget=budget, per_param=True)
    assert_close(sum(each.values()), expected, 1e-12)


def test_a_generous_budget_changes_nothing(model: tuple[Any, Any]) -> None:
    (batch,) = BATCHES["within"]
    with LiveBytes() as unbounded:
        expected = gf.ghost_gram(*model, batch)
    with LiveBytes() as bounded:
        gram = gf.ghost_gram(*model, batch, memory_budget=10**10)
    assert torch.equal(gram, expected)
    assert bounded.peak <= 1.01 * unbounded.peak


def test_a_budget_for_less_than_one_sample(model: tuple[Any, Any]) -> None:
    with pytest.raises(OptionError, match=r"memory_budget=10,000 bytes is too small.*takes \d+"):
        gf.ghost_gram(*model, ids(3, 40), memory_budget=10_000)


@pytest.mark.parametrize("options", [{"mode": "materialized"}, {"randomness": "different"}])
def test_a_budget_needs_passes_that_can_be_repeated(
    model: tuple[Any, Any], options: dict[str, Any]
) -> None:
    with pytest.raises(OptionError, match="memory_budget needs"):
        gf.ghost_gram(*model, ids(3, 40), memory_budget=10**9, **options)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_blocks_of_every_size(
    model: tuple[Any, Any], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [gf.ghost_gram(*model, *batches) for batches in FEW.values()]
    monkeypatch.setattr(gram_blocks.GramBlocks, "_plan", lambda self, *batches: (size, 100))
    for batches, full in zip(FEW.values(), expected, strict=True):
        gram = gf.ghost_gram(*model, *batches)
        assert_close(gram, full, 1e-12)
        if len(batches) == 1:
            assert torch.equal(gram, gram.mT)


def test_live_bytes() -> None:
    outside = torch.ones(1000)
    with LiveBytes() as count:
        a = outside * 2
        view = a.view(10, 100)
        assert (count.live, count.peak) == (4000, 4000)
        b = a + view.flatten()
        assert (count.live, count.peak) == (8000, 8000)
        del a
        assert count.live == 8000
        del view
        assert (count.live, count.peak) == (4000, 8000)
        outside.add_(b)
        del b
    assert (count.live, count.peak) == (0, 8000)
