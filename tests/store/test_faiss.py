"""Approximate search: a flat index is exact, others nearly, and without FAISS the error says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers import make_store
from torch import Tensor

import ghostfunc as gf
from ghostfunc.store import Store

N = 300


def rows(store: Store, n: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, store.projection.k, generator=g)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    out = make_store(tmp_path / "s", N)
    out.write(range(N), rows(out, N, 0), "final")
    return out


@pytest.mark.parametrize("normalize", ["none", "cosine"])
@pytest.mark.parametrize("layers", [None, ["emb"]])
def test_a_flat_index_is_exact(store: Store, normalize: str, layers: list[str] | None) -> None:
    pytest.importorskip("faiss")
    q = rows(store, 4, 1)
    for metric in (None, store.preconditioner("final", damping=0.1)):
        options = {"normalize": normalize, "layers": layers, "precondition": metric}
        index = store.index("final", factory="Flat", **options)
        got, want = index.topk(q, 10), store.topk(q, 10, **options)
        assert torch.equal(got.ids, want.ids)
        torch.testing.assert_close(got.scores, want.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factory", ["HNSW16,Flat", "IVF4,SQ8"])
def test_an_approximate_index_finds_most(store: Store, factory: str) -> None:
    pytest.importorskip("faiss")
    index = store.index("final", factory=factory)
    if factory.startswith("IVF"):
        index.index.nprobe = 4
    q = rows(store, 20, 1)
    got, want = index.topk(q, 10), store.topk(q, 10, normalize="cosine")
    overlap = (got.ids[:, :, None] == want.ids[:, None, :]).any(2).float().mean()
    assert overlap > 0.9
    assert index.topk(q, 10_000).ids.shape == (20, N)


def test_bad_indices(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    with pytest.raises(gf.OptionError, match="factory='Flatt' is not a FAISS index"):
        store.index("final", factory="Flatt")
    with pytest.raises(gf.OptionError, match="normalize='relative'"):
        store.index("final", factory="Flat", normalize="relative")
    index = store.index("final", factory="Flat")
    with pytest.raises(gf.OptionError, match=r"expected \[q, "):
        index.topk(rows(store, 2, 0)[:, 1:], 3)
    with pytest.raises(gf.OptionError, match="k=0"):
        index.topk(rows(store, 2, 0), 0)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'ghostfunc\[faiss\]'"):
        store.index("final", factory="Flat")
