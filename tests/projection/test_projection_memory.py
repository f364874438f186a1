"""A dense projection is made block by block: neither it nor a sample's gradient is ever held."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ghostfunc as gf
from ghostfunc._transforms.live_bytes import LiveBytes
from ghostfunc.projection import _readers

VOCABULARY, D, H = 600, 64, 512
K = 512


def model_fn(p: dict[str, Tensor], ids: Tensor) -> Tensor:
    hidden = F.linear(torch.tanh(F.linear(F.embedding(ids, p["emb"]), p["up"])), p["down"])
    return F.linear(hidden, p["emb"]).square().mean((1, 2))


def make_params() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"emb": (VOCABULARY, D), "up": (H, D), "down": (D, H)}
    return {name: 0.1 * torch.randn(shape, generator=g) for name, shape in shapes.items()}


def peak_bytes(call: Any) -> int:
    """The most that tensors and numpy arrays take at one time, each at its own worst."""
    tracemalloc.start()
    try:
        with LiveBytes() as tensors:
            call()
        return tensors.peak + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_dense_is_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_readers, "CHUNK", 1 << 17)
    params = make_params()
    matrix = 4 * K * sum(x.numel() for x in params.values())
    projection = gf.kronecker_projection(params, rank_total=K, rank_min=1, kind="dense", seed=0)
    ids = torch.randint(VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
    gf.ghost_project(model_fn, params, ids, projection)
    peak = peak_bytes(lambda: gf.ghost_project(model_fn, params, ids, projection))
    assert 4 * _readers.CHUNK < peak < matrix / 20
    # What is held whole is seen.
    held = peak_bytes(lambda: torch.zeros(K, matrix // 4 // K))
    assert held >= matrix


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "orthonormal", "sparse", "dense"])
def test_no_gradient_per_sample_is_held(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_readers, "CHUNK", 1 << 14)
    params = make_params()
    model = sum(x.nbytes for x in params.values())
    k = 64
    projection = gf.kronecker_projection(params, rank_total=k, rank_min=1, kind=kind, seed=0)
    peaks = {}
    for n in (2, 10):
        ids = torch.randint(VOCABULARY, (n, 2), generator=torch.Generator().manual_seed(0))
        gf.ghost_project(model_fn, params, ids, projection)
        with LiveBytes() as log:
            gf.ghost_project(model_fn, params, ids, projection)
        peaks[n] = log.peak
    assert (peaks[10] - peaks[2]) / 8 < 0.25 * model
