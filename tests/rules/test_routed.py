"""Models that reorder samples, or route rows to experts: right, or an error that names a way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghostfunc as gf

W = {"w": torch.randn(4, 3).double(), "v": torch.randn(4, 3).double()}
X = torch.randn(6, 4).double()


def by_sorting(p: Any, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    y = x[order] @ p["w"]
    return y[order.argsort()].sin().sum(1)


def by_numbers(p: Any, x: Tensor) -> Tensor:
    order = sorted(range(len(x)), key=x[:, 0].tolist().__getitem__)
    back = sorted(range(len(x)), key=order.__getitem__)
    return (x[order] @ p["w"])[back].sin().sum(1)


def experts(p: Any, x: Tensor) -> Tensor:
    """Tokens go to one of two experts, in the order in which they come."""
    first = x[:, 0] > 0
    out = torch.zeros(len(x), 3, dtype=x.dtype)
    for mask, w in ((first, p["w"]), (~first, p["v"])):
        (rows,) = torch.where(mask)
        out.index_add_(0, rows, x[rows] @ w)
    return out.sin().sum(1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_fn", [by_sorting, by_numbers, experts])
def test_reordered_samples_never_get_each_others_gradients(model_fn: Any, tied: bool) -> None:
    """Even if those that are traced come in order by chance."""
    ordered = torch.cat([X[X[:, 0].argsort()][:2], X])
    if tied:
        ordered[1, 0] = ordered[0, 0]
    if model_fn is experts:
        ordered[:, 0] = torch.tensor([1.0, 1 if tied else -1, -1, 1, -1, 1, -1, -1])
    assert model_fn(W, ordered).shape == (8,)
    with pytest.raises(gf.GhostError) as caught:
        gf.per_sample_grads(model_fn, W, ordered, mode="ghost")
    assert 'mode="jvp"' in str(caught.value)
    assert "vectorize=False" in str(caught.value)
    grads = gf.per_sample_grads(model_fn, W, ordered, vectorize=False)
    u = {k: torch.randn_like(x) for k, x in W.items()}
    dots = gf.ghost_dot_prod(model_fn, W, ordered, direction=u, mode="jvp")
    expected = sum((g * u[k]).sum((1, 2)) for k, g in grads.items())
    assert torch.allclose(dots, expected)


def test_samples_that_keep_their_places_pass_the_check() -> None:
    """A mask that takes one position of every sample, such as that of the end of a sequence."""

    def model_fn(p: Any, batch: Any) -> Tensor:
        x, ids = batch["x"], batch["ids"]
        last = x[ids == ids.max(1, keepdim=True).values].view(len(x), -1)
        return (last @ p["w"]).sin().sum(1)

    batch = {"x": torch.randn(5, 3, 4).double(), "ids": torch.stack([torch.randperm(3)] * 5)}
    grads = gf.per_sample_grads(model_fn, W, batch, mode="ghost")
    expected = gf.per_sample_grads(model_fn, W, batch, vectorize=False)
    assert torch.allclose(grads["w"], expected["w"])


def test_sorting_within_a_sample_costs_no_check() -> None:
    calls = []

    def model_fn(p: Any, x: Tensor) -> Tensor:
        calls.append(len(x))
        return (x.sort(-1).values @ p["w"]).topk(2).values.sin().sum(1)

    gf.per_sample_grads(model_fn, W, X, mode="ghost")
    calls.clear()
    gf.per_sample_grads(model_fn, W, X, mode="ghost")
    assert calls == [len(X)]


# --- mixtures of experts of transformers ----------------------------------------------------------


def mixture(experts: str) -> tuple[Any, Any, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    model.set_experts_implementation(experts)

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return losses.view(len(ids), -1).mean(1)

    return (*gf.from_module(model, loss), torch.randint(20, (4, 6)))


def test_experts_as_batched_products_run_in_every_mode() -> None:
    model_fn, params, ids = mixture("batched_mm")
    expected = gf.ghost_dot_prod(model_fn, params, ids, ids[:2], mode="materialized")
    for mode in ("ghost", "jvp"):
        dots = gf.ghost_dot_prod(model_fn, params, ids, ids[:2], mode=mode)
        assert torch.allclose(dots, expected, rtol=1e-4)


def test_grouped_experts_say_what_to_do() -> None:
    model_fn, params, ids = mixture("grouped_mm")
    with pytest.raises(gf.UnsupportedOpError, match="batched_mm") as caught:
        gf.ghost_dot_prod(model_fn, params, ids, ids[:2])
    assert "vectorize=False" in str(caught.value)
    loop, vmap = (
        gf.ghost_dot_prod(model_fn, params, ids, ids[:2], mode="materialized", vectorize=v)
        for v in (False, True)
    )
    assert torch.allclose(loop, vmap, rtol=1e-4)


def test_a_loop_over_experts_says_what_to_do() -> None:
    model_fn, params, ids = mixture("eager")
    with pytest.raises(gf.GhostError, match='mode="jvp"'):
        gf.ghost_dot_prod(model_fn, params, ids, ids[:2])
    loop = gf.ghost_dot_prod(model_fn, params, ids, ids[:2], mode="materialized", vectorize=False)
    jvp = gf.ghost_dot_prod(model_fn, params, ids, ids[:2], mode="jvp")
    assert torch.allclose(loop, jvp, rtol=1e-4)
