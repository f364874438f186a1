"""Ops that move rows from sample to sample, where nothing comes of it until later: what they return
is multiplied by zero at first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ghostfunc as gf
from ghostfunc._base.program import Program
from ghostfunc._trace.fitting import traced

Params = dict[str, Tensor]
SGD = gf.shapley.sgd(lr=0.1)


def losses_of(p: Params, x: Tensor) -> Tensor:
    return (x @ p["w"]).tanh().square().sum(1)


def backwards(n: int) -> Tensor:
    return torch.arange(n - 1, -1, -1)


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(0),
    "flipud": torch.flipud,
    "roll": lambda x: x.roll(1, 0),
    "roll of all": lambda x: x.roll(1),
    "rot90": lambda x: torch.rot90(x[:, None], 2)[:, 0],
    "slices": lambda x: torch.cat([x[1:], x[:1]]),
    "steps": lambda x: torch.cat([x[1::2], x[::2]]),
    "halves": lambda x: torch.cat(list(x.chunk(2))[::-1]),
    "unbound": lambda x: torch.stack(x.unbind()[::-1]),
    "index": lambda x: x[backwards(len(x))],
    "index_select": lambda x: x.index_select(0, backwards(len(x))),
    "gather": lambda x: x.gather(0, backwards(len(x))),
    "take": lambda x: x.take(backwards(len(x))),
    "scatter": lambda x: torch.zeros_like(x).scatter(0, backwards(len(x)), x),
    "put": lambda x: torch.zeros_like(x).index_add(0, backwards(len(x)), x),
    "matrix": lambda x: torch.eye(len(x), dtype=x.dtype).flip(0) @ x,
    "padding": lambda x: F.pad(x, (0, 1))[1:],
    "convolution": lambda x: F.conv1d(x[None, None], x.new_tensor([[[0, 0, 1]]]), padding=1)[0, 0],
    "folded": lambda x: x[:, None].expand(-1, 2).reshape(2, -1)[0],
    "windows": lambda x: torch.cat([x, x[:1]]).unfold(0, 2, 1)[:, 1],
}


def batch(f: float, n: int = 4) -> Params:
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"x": x, "f": torch.full((n,), f, dtype=torch.float64)}


def params() -> Params:
    generator = torch.Generator().manual_seed(1)
    return {"w": torch.randn(5, 3, generator=generator, dtype=torch.float64)}


@pytest.mark.parametrize("where", [False, True], ids=["weights", "where"])
@pytest.mark.parametrize("move", MOVES)
def test_rows_of_others_that_count_later_are_seen(move: str, where: bool) -> None:
    def model_fn(p: Params, b: Params) -> Tensor:
        own, f = losses_of(p, b["x"]), b["f"]
        others = MOVES[move](own)
        return torch.where(f > 0, own, others) if where else f * own + (1 - f) * others

    alone = gf.ghost_norm(losses_of, params(), batch(1)["x"])
    torch.testing.assert_close(gf.ghost_norm(model_fn, params(), batch(1)), alone)
    with pytest.raises(gf.CoupledSamplesError):
        gf.ghost_norm(model_fn, params(), batch(0.3 if not where else 0))


@pytest.mark.parametrize("move", MOVES)
def test_rows_of_others_are_seen_in_a_batch_of_one(move: str) -> None:
    def model_fn(p: Params, b: Params) -> Tensor:
        own, f = losses_of(p, b["x"]), b["f"]
        return f * own + (1 - f) * MOVES[move](own)

    gf.ghost_norm(model_fn, params(), batch(1, n=1))
    alone = gf.ghost_norm(losses_of, params(), batch(1)["x"])
    torch.testing.assert_close(gf.ghost_norm(model_fn, params(), batch(1)), alone)
    with pytest.raises(gf.CoupledSamplesError):
        gf.ghost_norm(model_fn, params(), batch(0.3))


def test_rows_of_others_are_seen_while_they_are_zero() -> None:
    def model_fn(p: Params, b: Params) -> Tensor:
        return (losses_of(p, b["x"]) * b["f"]).flip(0) + losses_of(p, b["x"])

    gf.ghost_norm(model_fn, params(), batch(0))
    with pytest.raises(gf.CoupledSamplesError):
        gf.ghost_norm(model_fn, params(), batch(1))


def test_ids_of_others_are_seen_in_a_batch_of_one() -> None:
    def model_fn(p: Params, b: Params) -> Tensor:
        own = p["w"][b["i"]].tanh().square().sum((1, 2))
        others = p["w"][b["i"].flip(0)].sum((1, 2))
        return own + b["f"] * others

    def ids(f: float, n: int) -> Params:
        i = torch.randint(5, (n, 3), generator=torch.Generator().manual_seed(2))
        return {"i": i, "f": torch.full((n,), f, dtype=torch.float64)}

    gf.ghost_norm(model_fn, params(), ids(0, 1))
    gf.ghost_norm(model_fn, params(), ids(0, 4))
    with pytest.raises(gf.CoupledSamplesError):
        gf.ghost_norm(model_fn, params(), ids(1, 4))


VALIDATIONS: dict[str, Callable[[Any, Params, Params, Params], Any]] = {
    "at once": lambda f, p, b, val: gf.ghost_dot_prod(f, p, b, val),
    "in chunks": lambda f, p, b, val: gf.ghost_dot_prod(f, p, b, val, chunk_size=2),
    "from a loader": lambda f, p, b, val: gf.direction(f, p, iter([val])),
    "direction": lambda f, p, b, val: gf.direction(f, p, val),
    "step": lambda f, p, b, val: gf.ghost_value_and_grad(f, p, b, val, chunk_size=2),
    "jvp": lambda f, p, b, val: gf.ghost_dot_prod(f, p, b, val, mode="jvp"),
    "in-run value": lambda f, p, b, val: gf.shapley.step(f, p, b, {"val": val}, optimizer=SGD),
}


@pytest.mark.parametrize("ask", VALIDATIONS)
def test_validation_rows_of_others_that_count_later_are_seen(ask: str) -> None:
    def model_fn(p: Params, b: Params) -> Tensor:
        own, f = losses_of(p, b["x"]), b["f"]
        return f * own + (1 - f) * own.flip(0)

    gf.ghost_norm(model_fn, params(), batch(1))
    VALIDATIONS[ask](model_fn, params(), batch(1), batch(1, n=3))
    with pytest.raises(gf.CoupledSamplesError):
        VALIDATIONS[ask](model_fn, params(), batch(1), batch(0.3, n=3))


STAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "last of each": lambda h, i: h[torch.arange(len(h)), i],
    "gather": lambda h, i: h.gather(1, i[:, None, None].expand(-1, -1, h.shape[2]))[:, 0],
    "folded": lambda h, i: h.reshape(-1, h.shape[2]).tanh().view(h.shape).sum(1),
    "positions first": lambda h, i: h.transpose(0, 1).flatten(0, 1).view(h.shape[1], -1, 5).sum(0),
    "positions turned": lambda h, i: h.flip(1).roll(1, 1).cumsum(1)[:, 0],
    "sorted positions": lambda h, i: h.sort(1).values[:, 0],
    "written": lambda h, i: h.clone().mul_(2).masked_fill_((i > 1)[:, None, None], 0).sum(1),
    "attention": lambda h, i: F.scaled_dot_product_attention(h, h, h, is_causal=True).sum(1),
    "joined": lambda h, i: torch.cat([h.sum(1), h[:, 0]], 1)[:, ::2],
    "heads": lambda h, i: torch.einsum("ntd,nsd->nts", h, h).softmax(-1).matmul(h).sum(1),
}


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("op", STAYS)
def test_programs_that_leave_samples_apart_are_proved_once(op: str, size: int) -> None:
    def model_fn(p: Params, b: Params) -> Tensor:
        return STAYS[op](b["h"] * p["scale"], b["i"]).square().sum(1)

    h = torch.randn(4, 3, 5, dtype=torch.float64)
    given = {"h": h[:size], "i": torch.tensor([0, 2, 1, 2])[:size]}
    p = {"scale": torch.rand(5, dtype=torch.float64)}
    exact: Any = gf.ghost_norm(model_fn, p, given, mode="materialized")
    torch.testing.assert_close(gf.ghost_norm(model_fn, p, given), exact)
    assert not traced(Program.of(model_fn, p), given).trace.statistics
