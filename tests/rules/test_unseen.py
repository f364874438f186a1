"""Code that no torch function sees: right if no parameter is in it, an error if one is."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ghostfunc as gf

P = {"w": torch.randn(4, 4).double(), "v": torch.randn(4, 3).double()}
X = torch.randn(5, 4).double()


class Cubed(torch.autograd.Function):
    """In the old style, which torch.func does not run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * b


def losses(y: Tensor) -> Tensor:
    return y.sin().sum(1)


def test_a_function_on_samples_alone_is_no_obstacle() -> None:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        return losses(Cubed.apply(x @ p["w"]) @ p["v"])

    grads = gf.per_sample_grads(model_fn, P, X, mode="ghost")
    expected = gf.per_sample_grads(model_fn, P, X, vectorize=False)
    assert all(torch.allclose(grads[k], expected[k]) for k in P)


@pytest.mark.parametrize(
    "model_fn",
    [
        lambda p, x: losses(x @ Cubed.apply(p["w"]) @ p["v"]),
        lambda p, x: losses(torch.vmap(lambda y: y @ p["w"])(x) @ p["v"]),
    ],
    ids=["a function of a parameter", "vmap"],
)
def test_a_parameter_out_of_sight_is_an_error(model_fn: Any) -> None:
    with pytest.raises(gf.UntrackedUseError, match="'w'") as caught:
        gf.per_sample_grads(model_fn, P, X, mode="ghost")
    assert "vectorize=False" in str(caught.value)
    assert gf.per_sample_grads(model_fn, P, X, vectorize=False)["w"].all()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpoints_say_what_to_do() -> None:
    def model_fn(p: Any, x: Tensor, reentrant: bool) -> Tensor:
        y = x @ p["v"].mT.sum(0, keepdim=True).mT
        return losses(
            checkpoint(lambda x: (x @ p["w"]).tanh() @ p["v"], x * y, use_reentrant=reentrant)
        )

    for reentrant in (True, False):
        with pytest.raises(gf.TransformError, match=r"gf\.remat instead"):
            gf.per_sample_grads(partial(model_fn, reentrant=reentrant), P, X, mode="ghost")
    with pytest.raises(gf.TransformError, match=r"gf\.remat instead"):
        gf.per_sample_grads(lambda p, x: model_fn(p, x, True), P, X, vectorize=False)
    loop = gf.per_sample_grads(lambda p, x: model_fn(p, x, False), P, X, vectorize=False)
    plain = gf.per_sample_grads(
        lambda p, x: losses(((x * (x @ p["v"].sum(1))[:, None]) @ p["w"]).tanh() @ p["v"]),
        P,
        X,
        mode="ghost",
    )
    assert all(torch.allclose(loop[k], plain[k]) for k in P)
