"""Tables: embeddings, bags, and every way to choose elements of a parameter by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import Tensor, nn

import ghostfunc as gf
from ghostfunc.testing import Case, check_rule, ids

sizes = st.integers(1, 4)
shapes = st.lists(sizes, max_size=2).map(tuple)


@given(shapes, sizes, st.sampled_from([None, 0, 2, -1]), st.booleans())
def test_embedding(shape: Any, d: int, padding_idx: int | None, small_ids: bool) -> None:
    def call(p: Any, x: Any) -> Tensor:
        i = x["ids"].int() if small_ids else x["ids"]
        return F.embedding(i, p["table"], padding_idx=padding_idx)

    check_rule(F.embedding, [Case(call, {"table": (4, d)}, {"ids": ids(4, *shape)})])


@pytest.mark.parametrize(
    ("option", "error", "match"),
    [
        ({"max_norm": 1.0}, gf.UnsupportedOpError, "rewrites its weight"),
        ({"scale_grad_by_freq": True}, gf.CoupledSamplesError, "over the whole batch"),
    ],
)
def test_options_without_a_per_sample_meaning(option: Any, error: Any, match: str) -> None:
    for op in (F.embedding, F.embedding_bag):
        case = Case(
            lambda p, x, op=op: op(x["ids"], p["w"], **option), {"w": (4, 3)}, {"ids": ids(4, 2)}
        )
        with pytest.raises(error, match=match):
            check_rule(op, [case])


@given(
    st.sampled_from(["sum", "mean", "max"]),
    st.integers(1, 5),
    sizes,
    st.sampled_from([None, 1, -1]),
    st.booleans(),
)
def test_embedding_bag(mode: str, t: int, d: int, padding_idx: Any, weighted: bool) -> None:
    weighted = weighted and mode == "sum"

    def call(p: Any, x: Any) -> Tensor:
        options = {"per_sample_weights": x["weights"]} if weighted else {}
        return F.embedding_bag(x["ids"], p["table"], mode=mode, padding_idx=padding_idx, **options)

    samples: dict[str, Any] = {"ids": ids(4, t)} | ({"weights": (t,)} if weighted else {})
    check_rule(F.embedding_bag, [Case(call, {"table": (4, d)}, samples)])


def test_embedding_bag_of_equal_rows() -> None:
    """Which of several largest rows gets the gradient is what the op says."""

    def call(p: Any, x: Any) -> Tensor:
        return F.embedding_bag(x["ids"], p["table"], mode="max")

    table = Case(call, {"table": lambda g: torch.zeros(4, 3).double()}, {"ids": ids(4, 3)})
    check_rule(F.embedding_bag, [table])


def test_embedding_bag_with_parameter_weights_or_offsets() -> None:
    def offsets(p: Any, x: Any) -> Tensor:
        start = torch.arange(len(x["ids"])) * 3
        return F.embedding_bag(x["ids"].flatten(), p["table"], start, mode="sum")

    def weights(p: Any, x: Any) -> Tensor:
        w = p["w"].expand(x["ids"].shape)
        return F.embedding_bag(x["ids"], p["table"], mode="sum", per_sample_weights=w)

    with pytest.raises(gf.UnsupportedOpError, match="Pad the bags"):
        check_rule(F.embedding_bag, [Case(offsets, {"table": (4, 3)}, {"ids": ids(4, 3)})])
    check_rule(F.embedding_bag, [Case(weights, {"table": (4, 3), "w": (3,)}, {"ids": ids(4, 3)})])


# --- indexing -----------------------------------------------------------------------------------

INDEXING: dict[str, tuple[Any, Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "rows": ((5, 3), ids(5, 2), lambda w, i: w[i]),
    "a row": ((5, 3), ids(5), lambda w, i: w[i]),
    "elements": ((5,), ids(5, 2), lambda w, i: w[i]),
    "blocks": ((5, 3, 2), ids(5, 2), lambda w, i: w[i]),
    "from the end": ((5, 3), ids(5, 2), lambda w, i: w[i - 5]),
    "rows, spelled out": ((5, 3), ids(5, 2), lambda w, i: w[i, :]),
    "rows and dots": ((5, 3), ids(5, 2), lambda w, i: w[i, ...]),
    "columns": ((3, 5), ids(5, 2), lambda w, i: w[:, i].movedim(1, 0)),
    "columns after dots": ((3, 2, 5), ids(5), lambda w, i: w[..., i].movedim(2, 0)),
    "a column of rows": ((5, 3), ids(5, 2), lambda w, i: w[i, 1]),
    "some columns of rows": ((5, 3), ids(5, 2), lambda w, i: w[i, 1:]),
    "a new axis": ((5, 3), ids(5, 2), lambda w, i: w[i, None]),
    "pairs": ((5, 5), ids(5, 2), lambda w, i: w[i, 4 - i]),
    "pairs with constants": ((5, 2), ids(5, 2), lambda w, i: w[i, torch.tensor([0, 1])]),
    "pairs apart": ((5, 3, 5), ids(5, 2), lambda w, i: w[i, :, 4 - i]),
    "time first": ((5, 3), ids(5, 2), lambda w, i: w[i.T].transpose(0, 1)),
    "folded": ((5, 3), ids(5, 2), lambda w, i: w[i.flatten()].unflatten(0, i.shape)),
    "folded time first": (
        (5, 3),
        ids(5, 2),
        lambda w, i: w[i.T.flatten()].unflatten(0, i.T.shape).transpose(0, 1),
    ),
    "columns, folded": (
        (3, 5),
        ids(5, 2),
        lambda w, i: w[:, i.flatten()].unflatten(1, i.shape).movedim(0, 2),
    ),
}


@pytest.mark.parametrize("name", INDEXING)
def test_indexing(name: str) -> None:
    shape, draw, choose = INDEXING[name]
    case = Case(lambda p, x: choose(p["w"], x["i"]), {"w": shape}, {"i": draw})
    check_rule(Tensor.__getitem__, [case])


SELECTIONS: dict[str, tuple[Any, Any, Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "index_select": (torch.index_select, (5, 3), ids(5), lambda w, i: torch.index_select(w, 0, i)),
    "index_select along": (
        Tensor.index_select,
        (3, 5),
        ids(5),
        lambda w, i: w.index_select(-1, i).T,
    ),
    "gather": (
        Tensor.gather,
        (5, 3),
        ids(5, 3),
        lambda w, i: w.gather(0, i),
    ),
    "gather along": (
        torch.gather,
        (3, 5),
        ids(5, 3),
        lambda w, i: torch.gather(w, 1, i.T).T,
    ),
    "take_along_dim": (
        torch.take_along_dim,
        (5, 3),
        ids(5, 3),
        lambda w, i: torch.take_along_dim(w, i, 0),
    ),
    "take_along_dim of all": (
        Tensor.take_along_dim,
        (5, 3),
        ids(15),
        lambda w, i: w.take_along_dim(i),
    ),
    "take": (torch.take, (5, 3), ids(15, 2), lambda w, i: w.take(i - 15) + torch.take(w, i)),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections(name: str) -> None:
    op, shape, draw, choose = SELECTIONS[name]
    case = Case(lambda p, x: choose(p["w"], x["i"]), {"w": shape}, {"i": draw})
    check_rule(op, [case])


def test_masks_are_refused() -> None:
    def call(p: Any, x: Any) -> Tensor:
        return p["w"][None].expand(len(x["x"]), -1)[x["x"] > -9].unflatten(0, x["x"].shape)

    def mask(p: Any, x: Any) -> Tensor:
        return p["w"][(x["x"] > -9)[0]].expand(len(x["x"]), -1)

    check_rule(Tensor.expand, [Case(call, {"w": (4,)}, {"x": (4,)})])
    check_rule(Tensor.expand, [Case(mask, {"w": (4,)}, {"x": (4,)})])


# --- tables that are derived ----------------------------------------------------------------------


def test_relative_position_bias_of_swin() -> None:
    index = torch.randint(5, (3, 3))

    def call(p: Any, x: Any) -> Tensor:
        bias = p["table"][index.view(-1)].view(3, 3, 2).permute(2, 0, 1).contiguous().unsqueeze(0)
        return F.scaled_dot_product_attention(x["q"], x["q"], x["q"], attn_mask=bias)

    check_rule(F.scaled_dot_product_attention, [Case(call, {"table": (5, 2)}, {"q": (2, 3, 4)})])


def test_a_table_used_as_table_and_as_matrix() -> None:
    """Rows, single elements, and products of one parameter: factors of three shapes."""

    def call(p: Any, x: Any) -> Tensor:
        w = p["w"]
        y = (
            w[x["i"]]
            + w[x["i"], 1][..., None]
            + w.take(x["i"])[..., None]
            + w.T[:, x["i"]].movedim(0, -1)
        )
        return y @ w.T + F.embedding(x["i"], w.T.contiguous().T) @ w.T

    check_rule(Tensor.__getitem__, [Case(call, {"w": (5, 3)}, {"i": ids(5, 2)})])


def test_positions_of_learned_embeddings() -> None:
    table = nn.Embedding(6, 4).double()

    def call(p: Any, x: Any) -> Tensor:
        t = torch.arange(x["x"].shape[1])
        return x["x"] * torch.func.functional_call(table, p, (t,))

    check_rule(Tensor.mul, [Case(call, {"weight": (6, 4)}, {"x": (3, 4)})])
