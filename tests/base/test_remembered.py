"""What is remembered of a model function is bounded, costs its passes once, and goes with it."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ghostfunc as gf
from ghostfunc._base import remembered
from ghostfunc._base.reach import modules_in_reach
from ghostfunc._base.remembered import Recent
from ghostfunc._taps import use_shapes
from ghostfunc._trace import fitting

PASSES_PER_SHAPE = 6
"""Forward passes at a length that is new, at most: a look at the uses of two samples, and proofs of
what is read and of the factors that are kept: runs under taps, and two halves by plain autograd."""


class Counted(nn.Module):
    """A small model that counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 4), nn.Linear(4, 3)
        self.passes = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.passes += 1
        return self.head(torch.tanh(self.embedding(ids)))


def loss(module: nn.Module, ids: Tensor) -> Tensor:
    return module(ids).square().mean((1, 2))


@pytest.fixture
def net() -> Counted:
    torch.manual_seed(0)
    return Counted()


def batch(length: int) -> Tensor:
    """Four samples, no two the same: equal ones prove nothing."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(11, (4, length), generator=generator)


def kept(model_fn: Any) -> int:
    """How much is remembered of a function."""

    def found(x: object) -> Iterator[Recent[Any, Any]]:
        if isinstance(x, Recent):
            yield x
        else:
            yield from (r for r in vars(x).values() if isinstance(r, Recent))

    own = remembered._memories[model_fn]
    return sum(len(r) for memory in own.values() for r in found(memory))


QUANTITIES: dict[str, Any] = {
    "scores": lambda f, p, x: gf.ghost_dot_prod(f, p, x, x[:1]),
    "two runs": lambda f, p, x: gf.ghost_dot_prod(f, p, x, x),
    "norms": lambda f, p, x: gf.ghost_norm(f, p, x),
}


@pytest.mark.parametrize(
    ("name", "calls", "count"), [("scores", 2000, 200), ("two runs", 200, 20), ("norms", 200, 20)]
)
def test_many_lengths_cost_their_passes_once(
    net: Counted, name: str, calls: int, count: int
) -> None:
    """2,000 calls at 200 lengths: what is extra is bounded by the number of lengths."""
    model_fn, params = gf.from_module(net, loss)
    ask = QUANTITIES[name]
    ask(model_fn, params, batch(500))  # the trace
    net.passes = 0
    ask(model_fn, params, batch(500))
    warm = net.passes
    lengths = [*range(2, count + 2)]
    order = random.Random(0).choices(lengths, k=calls - count)
    net.passes = 0
    for length in lengths:
        ask(model_fn, params, batch(length))
    cold = net.passes - warm * count
    assert cold <= PASSES_PER_SHAPE * count * (2 if name == "two runs" else 1) + 8
    net.passes = 0
    gc.collect()
    for length in order[:-100]:
        ask(model_fn, params, batch(length))
    shapes = kept(model_fn)
    held = []
    for _ in range(3):
        for length in order[-100:]:
            ask(model_fn, params, batch(length))
        gc.collect()
        held.append(len(gc.get_objects()))
    assert net.passes == warm * (len(order) + 200)
    assert kept(model_fn) == shapes
    assert held[2] - held[0] < 100, held  # fewer than one object in two calls


def test_what_is_forgotten_is_found_again(net: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for four shapes instead of thousands, numbers are the same."""
    model_fn, params = gf.from_module(net, loss)
    expected = [gf.ghost_norm(model_fn, params, batch(t)) for t in range(2, 20)]
    for module, names in {
        remembered: ["SHAPES", "STRUCTURES"],
        use_shapes: ["STRUCTURES", "LOOKS"],
        fitting: ["REMEMBERED"],
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, 4)
    model_fn, params = gf.from_module(net, loss)
    for _ in range(2):
        for t, want in zip(range(2, 20), expected, strict=True):
            assert torch.equal(gf.ghost_norm(model_fn, params, batch(t)), want)
        assert len(remembered.memory(model_fn, fitting.Proofs)) == 4


def test_structures_are_bounded(net: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of batches that come and go do not pile up."""
    monkeypatch.setattr(remembered, "STRUCTURES", 8)
    model_fn, params = gf.from_module(net, lambda m, b: loss(m, b["ids"]))
    for i in range(12):
        gf.ghost_norm(model_fn, params, {"ids": batch(3), f"extra {i}": torch.zeros(4)})
    found = remembered.memory(model_fn, remembered.Structures)
    assert len(found.independent) == 8


def test_memory_goes_with_the_function(net: Counted) -> None:
    model_fn, params = gf.from_module(net, loss)
    for ask in QUANTITIES.values():
        ask(model_fn, params, batch(5))
    gf.ghost_dot_prod(model_fn, params, batch(5), batch(5), mode="jvp")
    gf.per_sample_grads(model_fn, params, batch(5))

    def by_itself(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, p, (x,)).square().mean((1, 2))

    gf.ghost_norm(by_itself, params, batch(5))
    before, seen = len(remembered._memories), [weakref.ref(model_fn), weakref.ref(by_itself)]
    del model_fn, by_itself
    gc.collect()
    assert [ref() for ref in seen] == [None, None]
    assert len(remembered._memories) == before - 2


def test_the_latest_stay() -> None:
    recent: Recent[int, str] = Recent(2)
    for key in (1, 2):
        recent.put(key, str(key))
    assert recent.get(1) == "1"
    recent.put(3, "3")
    assert [recent.get(key) for key in (1, 2, 3)] == ["1", None, "3"]
    assert recent.made(2, lambda: "made") == "made"
    assert len(recent) == 2


GLOBAL = nn.Linear(1, 1)


def test_modules_in_reach() -> None:
    own, default, keyword = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)

    def of_file() -> nn.Module:
        return GLOBAL

    def fn(x: object, a: nn.Module = default, *, b: nn.Module = keyword) -> object:
        return own, of_file()

    near, far = (modules_in_reach([fn], names_of_files=x) for x in (False, True))
    assert near == [default, keyword, own]
    assert len(far) == 4
    assert set(far) == {default, keyword, own, GLOBAL}
    held = [0] * 64 + [own]
    assert modules_in_reach([held], names_of_files=False, longest=64) == []
    assert modules_in_reach([held], names_of_files=False) == [own]
