"""Freed memory that glibc keeps goes back to the system."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import ghostfunc as gf
from ghostfunc._base import freed
from ghostfunc._taps import proof

SIZE = 4 << 20


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("VmRSS")).split()[1]) * 1024


@pytest.mark.skipif(freed._malloc_trim() is None, reason="another allocator")
def test_what_lies_between_what_stays_is_given_back() -> None:
    assert sys.platform == "linux"
    torch.empty(30 << 20, dtype=torch.uint8)  # freed: smaller blocks come from the heap from now on
    blocks = [torch.ones(SIZE, dtype=torch.uint8) for _ in range(40)]
    stays = [torch.ones(1000) for _ in range(10)]
    before = resident()
    del blocks[1::2]
    freed.give_back()
    assert before - resident() > 10 * SIZE
    assert all(bool(x.all()) for x in stays)


def test_proofs_give_back_and_warm_calls_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(proof, "give_back", lambda: calls.append(None))

    def model_fn(p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return (x @ p["w"]).tanh().sum(1)

    params = {"w": torch.randn(3, 2)}
    for n in (4, 4, 4, 6, 6):
        gf.ghost_norm(model_fn, params, torch.randn(n, 3))
    assert len(calls) == 2  # once for each shape
    gf.ghost_norm(model_fn, params, torch.randn(6, 3), check="always")
    assert len(calls) == 2
