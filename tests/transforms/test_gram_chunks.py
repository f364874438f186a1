"""Gram matrices in chunks: the same numbers in less memory."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor, nn

import ghostfunc as gf
from benchmarks.live_bytes import LiveBytes
from ghostfunc import OptionError

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
def test_chunks_take_less_memory(model: tuple[Any, Any], batches: tuple[Tensor, ...]) -> None:
    gf.ghost_gram(*model, *batches)  # traces
    with LiveBytes() as whole:
        expected = gf.ghost_gram(*model, *batches)
    gc.collect()
    with LiveBytes() as chunked:
        gram = gf.ghost_gram(*model, *batches, chunk_size=4)
    assert chunked.peak <= 0.6 * whole.peak
    assert_close(gram, expected, 1e-12)


@pytest.mark.parametrize("options", [{"mode": "materialized"}, {"randomness": "different"}])
def test_chunks_need_passes_that_can_be_repeated(
    model: tuple[Any, Any], options: dict[str, Any]
) -> None:
    with pytest.raises(OptionError, match="chunk_size needs"):
        gf.ghost_gram(*model, ids(3, 40), chunk_size=2, **options)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_chunks_of_every_size(model: tuple[Any, Any], size: int, normalize: bool) -> None:
    for batches in FEW.values():
        full = gf.ghost_gram(*model, *batches, normalize=normalize)
        gram = gf.ghost_gram(*model, *batches, normalize=normalize, chunk_size=size)
        assert_close(gram, full, 1e-12)
        each = gf.ghost_gram(*model, *batches, chunk_size=size, per_param=True)
        assert_close(sum(each.values()), gf.ghost_gram(*model, *batches), 1e-12)
        if len(batches) == 1 and not normalize:
            assert torch.equal(gram, gram.mT)


def test_chunks_are_few(model: tuple[Any, Any]) -> None:
    """Three chunks take six passes; with another batch of two, two for it and six for pairs."""
    model_fn, params = model
    sizes: list[int] = []

    def counted(params: Any, batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return model_fn(params, batch)

    for batches, passes in (((ids(6, 8),), 6), ((ids(6, 8), ids(4, 8)), 8)):
        gf.ghost_gram(counted, params, *batches, chunk_size=2)
        sizes.clear()
        gf.ghost_gram(counted, params, *batches, chunk_size=2)
        assert sizes == [2] * passes


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
