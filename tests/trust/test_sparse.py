"""Sparse gradients and sparse weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_quantity import GHOST, OTHER_MODES, Case, assert_right
from problems import energy, tokens, weights
from torch import Generator, Tensor, nn

import ghostfunc as gf


def sparse_table(p: Any, ids: Tensor) -> Tensor:
    return energy(torch.tanh(F.embedding(ids, p["e"], sparse=True)) @ p["w"])


def sparse_table_and_head(p: Any, ids: Tensor) -> Tensor:
    return energy(torch.tanh(F.embedding(ids, p["e"], sparse=True)) @ p["e"].t())


def scattered_weight(p: Any, ids: Tensor) -> Tensor:
    at = torch.tensor([[0, 1, 2, 3], [5, 1, 1, 0]])
    w = torch.sparse_coo_tensor(at, p["values"], (7, 6), check_invariants=True).to_dense()
    return energy(F.one_hot(ids, 7).double() @ w)


def scattered_with_repeats(p: Any, ids: Tensor) -> Tensor:
    at = torch.tensor([[0, 1, 1, 3], [5, 1, 1, 0]])
    w = torch.sparse_coo_tensor(at, p["values"].tanh(), (7, 6), check_invariants=True)
    w = w.coalesce().to_dense()
    return energy(F.one_hot(ids, 7).double() @ w)


def beside_a_write(p: Any, ids: Tensor) -> Tensor:
    """Of all tensors that may share its memory, one is sparse."""
    at = torch.tensor([[0, 1, 2, 3], [5, 1, 1, 0]])
    w = torch.sparse_coo_tensor(at, p["values"], (7, 6), check_invariants=True).to_dense()
    e = p["e"].clone()
    e[0] = p["e"][1] * 2
    return energy(F.one_hot(ids, 7).double() @ w + F.embedding(ids, e) @ p["w"])


def made_sparse_beside_a_write(p: Any, ids: Tensor) -> Tensor:
    w = (p["e"] * (p["e"] > 0)).to_sparse().to_dense()
    v = p["w"] * 1.5
    v.mul_(0.5)
    return energy(F.embedding(ids, w) @ v)


def values_written(p: Any, ids: Tensor) -> Tensor:
    """Values that a sparse tensor was made of are written to before it is read."""
    at = torch.tensor([[0, 1, 2, 3], [5, 1, 1, 0]])
    values = p["values"] * 1.0
    values.mul_(2)
    w = torch.sparse_coo_tensor(at, values, (7, 6), check_invariants=True).to_dense()
    return energy(F.one_hot(ids, 7).double() @ w)


def bag(p: Any, ids: Tensor) -> Tensor:
    return energy(F.embedding_bag(ids, p["e"], mode="sum", sparse=True) @ p["w"])


@pytest.mark.parametrize(
    "model",
    [
        sparse_table,
        sparse_table_and_head,
        scattered_weight,
        scattered_with_repeats,
        bag,
        beside_a_write,
        made_sparse_beside_a_write,
        values_written,
    ],
    ids=lambda f: f.__name__,
)
def test_of_functions(model: Any) -> None:
    draw = tokens(7)
    batches = (draw(n, 3, Generator().manual_seed(n)) for n in (3, 2))
    case = Case(model, weights(e=(7, 4), w=(4, 6), values=(4,)), *batches)
    assert_right(case, GHOST)
    refusable = ("dots_by_jvp", "dots_materialized", "sample_grads_by_vmap", "verified")
    assert_right(case, OTHER_MODES, refusable=refusable)


def test_a_sparse_direction_is_taken_again() -> None:
    """What `direction` returns, `direction=` takes."""
    net = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 6)).double()
    model_fn, params = gf.from_module(net, lambda module, ids: energy(module(ids)))
    draw = tokens(7)
    train, val = (draw(n, 3, Generator().manual_seed(n)) for n in (3, 2))
    case = Case(model_fn, params, train, val)
    u = gf.direction(model_fn, params, val)
    got = gf.ghost_dot_prod(model_fn, params, train, direction=u)
    torch.testing.assert_close(got, case.of(gf.ghost_dot_prod, val))
    assert_right(case, GHOST)
