"""Matrix products with a parameter in any place, and everything einsum can say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor

import ghostfunc as gf
from ghostfunc.testing import Case, check_rule

sizes = st.integers(1, 3)


@given(st.lists(sizes, max_size=2).map(tuple), sizes, sizes, st.booleans())
def test_linear(before: Any, d: int, p: int, with_bias: bool) -> None:
    params = {"weight": (p, d)} | ({"bias": (p,)} if with_bias else {})
    check_rule(F.linear, [Case(lambda p, x: F.linear(x["x"], **p), params, {"x": (*before, d)})])


def test_linear_without_features_and_on_a_parameter() -> None:
    cases = [
        Case(lambda p, x: F.linear(x["x"], p["w"]), {"w": (4,)}, {"x": (3, 4)}, "vector"),
        Case(
            lambda p, x: F.linear(p["prototypes"], x["x"]).T,
            {"prototypes": (5, 4)},
            {"x": (4,)},
            "similarities",
        ),
    ]
    check_rule(F.linear, cases)


# --- matmul -----------------------------------------------------------------------------------

MATMULS: dict[str, tuple[str, str, Callable[[Tensor, Tensor], Tensor]]] = {
    # shape of the parameter, of a sample, the product with the samples in front
    "rows": ("ad", "a", lambda w, x: x @ w),
    "sequences": ("ad", "ta", lambda w, x: x @ w),
    "images": ("ad", "hta", lambda w, x: x @ w),
    "time first": ("ad", "ta", lambda w, x: (x.transpose(0, 1) @ w).transpose(0, 1)),
    "onto a vector": ("a", "ta", lambda w, x: x @ w),
    "rows onto a vector": ("a", "a", lambda w, x: x @ w),
    "from a vector": ("a", "at", lambda w, x: w @ x),
    "columns": ("pa", "a", lambda w, x: (w @ x.T).T),
    "left": ("pa", "at", lambda w, x: w @ x),
    "left, samples last": ("pa", "ta", lambda w, x: (w @ x.permute(1, 2, 0)).movedim(2, 0)),
    "a head each": ("had", "hta", lambda w, x: x @ w),
    "all heads": ("had", "ta", lambda w, x: x[:, None] @ w),
    "one for all heads": ("1ad", "hta", lambda w, x: x @ w),
    "a head each, left": ("hpa", "hat", lambda w, x: w @ x),
    "all heads, left": ("hpa", "at", lambda w, x: w @ x[:, None]),
    "experts": ("had", "ha", lambda w, x: (x.transpose(0, 1) @ w).transpose(0, 1)),
    "experts, left": ("hpa", "ha", lambda w, x: (w @ x.permute(1, 2, 0)).movedim(2, 0)),
    "folded": ("ad", "ta", lambda w, x: (x.flatten(0, 1) @ w).unflatten(0, x.shape[:2])),
    "heads folded with samples": (
        "1ad",
        "hta",
        lambda w, x: (x.flatten(0, 1) @ w).unflatten(0, x.shape[:2]),
    ),
}


@pytest.mark.parametrize("name", MATMULS)
@given(data=st.data())
@settings(max_examples=5)
def test_matmul(name: str, data: Any) -> None:
    of_w, of_x, product = MATMULS[name]
    dims = {i: data.draw(sizes, i) for i in "adhpt"} | {"1": 1}
    params, samples = (
        {"w": tuple(dims[i] for i in of_w)},
        {"x": tuple(dims[i] for i in of_x)},
    )
    check_rule(Tensor.matmul, [Case(lambda p, x: product(p["w"], x["x"]), params, samples)])


SCALE = {"beta": 0.5, "alpha": 2.0}

PRODUCTS: list[tuple[list[Any], Callable[..., Tensor], dict[str, Any], dict[str, Any]]] = [
    # names of one op, a call of it, parameters, samples
    (
        [torch.matmul, torch.linalg.matmul],
        lambda op, p, x: op(x["x"], p["w"]),
        {"w": (4, 3)},
        {"x": (2, 4)},
    ),
    (
        [torch.mm, Tensor.mm],
        lambda op, p, x: op(x["x"], p["w"]) + op(p["v"], x["x"].T).T,
        {"w": (4, 3), "v": (3, 4)},
        {"x": (4,)},
    ),
    (
        [torch.bmm, Tensor.bmm],
        lambda op, p, x: op(x["x"].transpose(0, 1), p["w"]).transpose(0, 1),
        {"w": (2, 4, 3)},
        {"x": (2, 4)},
    ),
    (
        [torch.addmm, Tensor.addmm],
        lambda op, p, x: op(p["b"], x["x"], p["w"], **SCALE),
        {"b": (3,), "w": (4, 3)},
        {"x": (4,)},
    ),
    (
        [torch.addmm, Tensor.addmm],
        lambda op, p, x: op(p["b"], p["w"], x["x"].T, **SCALE).T,
        {"b": (3, 1), "w": (3, 4)},
        {"x": (4,)},
    ),
    (
        [torch.addmm, Tensor.addmm],
        lambda op, p, x: op(x["y"], x["x"], p["w"]),
        {"w": (4, 3)},
        {"x": (4,), "y": (3,)},
    ),
    (
        [torch.baddbmm, Tensor.baddbmm],
        lambda op, p, x: op(p["b"], x["x"].transpose(0, 1), p["w"], **SCALE).transpose(0, 1),
        {"b": (2, 1, 3), "w": (2, 4, 3)},
        {"x": (2, 4)},
    ),
    (  # an attention bias
        [torch.baddbmm, Tensor.baddbmm],
        lambda op, p, x: op(p["b"], x["x"], x["x"].mT, **SCALE),
        {"b": (1, 2, 2)},
        {"x": (2, 4)},
    ),
    (
        [torch.addbmm, Tensor.addbmm],
        lambda op, p, x: op(p["b"], x["x"].transpose(0, 1), p["w"], **SCALE),
        {"b": (1, 3), "w": (2, 4, 3)},
        {"x": (2, 4)},
    ),
    ([torch.mv, Tensor.mv], lambda op, p, x: op(x["x"], p["v"]), {"v": (4,)}, {"x": (4,)}),
    (
        [torch.addmv, Tensor.addmv],
        lambda op, p, x: op(p["b"], x["x"], p["v"], **SCALE),
        {"b": (), "v": (4,)},
        {"x": (4,)},
    ),
    (
        [torch.outer, Tensor.outer, torch.ger, Tensor.ger],
        lambda op, p, x: op(x["x"], p["v"]) + op(p["v"], x["x"]).T,
        {"v": (4,)},
        {"x": ()},
    ),
    (
        [torch.addr, Tensor.addr],
        lambda op, p, x: op(p["b"], x["x"], p["v"], **SCALE),
        {"b": (1, 3), "v": (3,)},
        {"x": ()},
    ),
    (
        [torch.inner, Tensor.inner],
        lambda op, p, x: op(x["x"], p["w"]),
        {"w": (2, 3, 4)},
        {"x": (3, 4)},
    ),
    (
        [torch.inner, Tensor.inner],
        lambda op, p, x: op(p["w"], x["x"]).movedim(1, 0),
        {"w": (3, 4)},
        {"x": (4,)},
    ),
    (
        [torch.inner, Tensor.inner],
        lambda op, p, x: op(x["x"], p["w"]),
        {"w": ()},
        {"x": (4,)},
    ),
]


@pytest.mark.parametrize(
    ("op", "product", "params", "samples"), [(op, *rest) for ops, *rest in PRODUCTS for op in ops]
)
def test_products(
    op: Any, product: Callable[..., Tensor], params: dict[str, Any], samples: dict[str, Any]
) -> None:
    check_rule(op, [Case(lambda p, x: product(op, p, x), params, samples)])


# --- equations ----------------------------------------------------------------------------------


@st.composite
def equations(draw: Any) -> Case:
    """Two or three operands over a handful of indices; the samples' is `n`."""
    dims = {x: draw(sizes) for x in "abcde"}
    of_w = draw(st.lists(st.sampled_from("abcde"), max_size=3, unique=True))
    of_x = draw(st.lists(st.sampled_from("abcde"), max_size=3, unique=True))
    of_x.insert(draw(st.integers(0, len(of_x))), "n")
    operands = [("w", of_w), ("x", of_x)]
    if draw(st.booleans()):
        name = draw(st.sampled_from(["x", "v"]))
        third = draw(st.lists(st.sampled_from("abcde"), max_size=2, unique=True))
        if name == "x":
            third.insert(draw(st.integers(0, len(third))), "n")
        operands.append((name + "2", third))
    operands = draw(st.permutations(operands))
    known = sorted({i for _, own in operands for i in own} - {"n"})
    out = draw(st.lists(st.sampled_from(known), max_size=3, unique=True)) if known else []
    out.insert(draw(st.integers(0, len(out))), "n")
    equation = ",".join("".join(own) for _, own in operands) + "->" + "".join(out)
    params = {k: tuple(dims[i] for i in own) for k, own in operands if k[0] in "wv"}
    samples = {k: tuple(dims[i] for i in own if i != "n") for k, own in operands if k[0] == "x"}
    places = {k: own.index("n") for k, own in operands if "n" in own}

    def call(p: Any, x: Any) -> Tensor:
        tensors = [p[k] if k in p else x[k].movedim(0, places[k]) for k, _ in operands]
        return torch.einsum(equation, *tensors).movedim(out.index("n"), 0)

    return Case(call, params, samples, equation)


@given(equations())
def test_einsum(case: Case) -> None:
    check_rule(torch.einsum, [case])


@pytest.mark.parametrize(
    ("equation", "w", "x"),
    [
        ("...d,dk", (4, 3), (2, 4)),
        ("...d,dk->...k", (4, 3), (2, 2, 4)),
        ("b t d, d h k -> b t h k", (4, 2, 3), (2, 4)),
        ("bthk,hkd->btd", (2, 3, 4), (2, 2, 3)),
        ("bthd,hde->bthe", (2, 4, 5), (2, 2, 4)),
        ("bthd,dhe->bthe", (4, 2, 5), (2, 2, 4)),
        ("btd,bdp->btp", (1, 4, 3), (2, 4)),
        ("b...,...->b...", (2, 3), (2, 3)),
        ("b...,...->b", (2, 3), (2, 3)),
        ("bxgd,gpd->bxgp", (8, 9, 9), (1, 8, 9)),
    ],
)
def test_equations_of_models(equation: str, w: Any, x: Any) -> None:
    case = Case(lambda p, x: torch.einsum(equation, x["x"], p["w"]), {"w": w}, {"x": x})
    check_rule(torch.einsum, [case])


def test_einsum_of_a_sublist_a_list_and_time_first() -> None:
    cases = [
        Case(
            lambda p, x: torch.einsum(x["x"], [0, 1, 2], p["w"], [2, 3], [0, 1, 3]),
            {"w": (4, 3)},
            {"x": (2, 4)},
        ),
        Case(
            lambda p, x: torch.einsum("btd,dk->btk", [x["x"], p["w"]]), {"w": (4, 3)}, {"x": (2, 4)}
        ),
        Case(
            lambda p, x: torch.einsum("tbd,dk->tbk", x["x"].transpose(0, 1), p["w"]).transpose(
                0, 1
            ),
            {"w": (4, 3)},
            {"x": (3, 4)},
        ),
        Case(
            lambda p, x: torch.einsum("dk,rd->rk", p["w"], x["x"].flatten(0, 1)).unflatten(
                0, (-1, 3)
            ),
            {"w": (4, 3)},
            {"x": (3, 4)},
        ),
        Case(
            lambda p, x: torch.einsum("bi,ij,jk,bk->b", x["x"], p["w"], p["v"], x["x"]),
            {"w": (4, 3), "v": (3, 4)},
            {"x": (4,)},
        ),
    ]
    check_rule(torch.einsum, cases)


def test_einsum_uses_one_parameter_twice() -> None:
    case = Case(
        lambda p, x: torch.einsum("bi,ij,jk->bk", x["x"], p["w"], p["w"]),
        {"w": (4, 4)},
        {"x": (4,)},
    )
    check_rule(torch.einsum, [case])


def test_einsum_refuses_diagonals() -> None:
    case = Case(lambda p, x: torch.einsum("bi,ii->bi", x["x"], p["w"]), {"w": (4, 4)}, {"x": (4,)})
    with pytest.raises(gf.UnsupportedOpError, match="diagonal"):
        check_rule(torch.einsum, [case])


def test_tensordot() -> None:
    cases = [
        Case(lambda p, x: torch.tensordot(x["x"], p["w"], 1), {"w": (4, 3)}, {"x": (2, 4)}),
        Case(lambda p, x: torch.tensordot(x["x"], p["w"]), {"w": (2, 4, 3)}, {"x": (2, 4)}),
        Case(
            lambda p, x: torch.tensordot(x["x"], p["w"], dims=([1, 2], [2, 0])),
            {"w": (4, 3, 2)},
            {"x": (2, 4)},
        ),
        Case(
            lambda p, x: torch.tensordot(p["w"], x["x"], ([0], [-1])).movedim(1, 0),
            {"w": (4, 3)},
            {"x": (2, 4)},
        ),
        Case(lambda p, x: torch.tensordot(a=x["x"], b=p["w"], dims=0), {"w": (3,)}, {"x": (2,)}),
    ]
    check_rule(torch.tensordot, cases)


@given(st.lists(sizes, max_size=2).map(tuple), sizes, sizes, sizes, st.booleans())
def test_bilinear(before: Any, a: int, d: int, p: int, with_bias: bool) -> None:
    params = {"weight": (p, a, d)} | ({"bias": (p,)} if with_bias else {})
    case = Case(
        lambda p, x: F.bilinear(x["x"], x["y"], **p),
        params,
        {"x": (*before, a), "y": (*before, d)},
    )
    check_rule(F.bilinear, [case])


def test_products_in_place() -> None:
    def call(p: Any, x: Any) -> Tensor:
        y = x["x"] * 2
        y.addmm_(x["x"], p["w"], beta=0.5)  # the result is not looked at
        return y.addmm_(x["x"], p["w"].T)

    def batched(p: Any, x: Any) -> Tensor:
        y = x["x"].transpose(0, 1).clone()
        y.baddbmm_(x["x"].transpose(0, 1), p["w"], alpha=3)
        return y.transpose(0, 1)

    check_rule(torch.matmul, [Case(call, {"w": (4, 4)}, {"x": (4,)})])
    check_rule(torch.matmul, [Case(batched, {"w": (2, 4, 4)}, {"x": (2, 4)})])
