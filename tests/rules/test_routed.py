"""Models that reorder samples, or route rows to experts: right, or an error that names a way."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest
import torch
import transformers
from compare import assert_close
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

KINDS = ("Mixtral", "Qwen2Moe", "Olmoe", "GptOss", "DeepseekV3")
HAS = {"GptOss": {"num_local_experts": 5}, "DeepseekV3": {"n_routed_experts": 5}}


class Routed(nn.Module):
    """Experts of transformers behind a router in float64, with a shared expert."""

    def __init__(self, kind: str, top: int) -> None:
        super().__init__()
        sizes = {"hidden_size": 4, "intermediate_size": 8, "moe_intermediate_size": 8}
        config = getattr(transformers, f"{kind}Config")(
            **sizes, **HAS.get(kind, {"num_local_experts": 5, "num_experts": 5})
        )
        module = importlib.import_module(
            type(config).__module__.replace("configuration", "modeling")
        )
        self.router = nn.Linear(4, 5)
        self.shared = nn.Linear(4, 4)
        self.experts = getattr(module, f"{kind}Experts")(config)
        self.top = top

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights, ids = self.router(rows).softmax(-1).topk(self.top)
        out = self.shared(rows) + self.experts(rows, ids, weights)
        return out.view_as(x)


def routed(kind: str, how: str, top: int = 2) -> Any:
    torch.manual_seed(0)
    module = Routed(kind, top).double()
    for p in module.parameters():
        nn.init.normal_(p)
    module.experts.config._experts_implementation = how
    return (module, *gf.from_module(module, lambda m, x: m(x).sin().flatten(1).sum(1)))


def by_autograd(module: Any, x: Tensor) -> Tensor:
    """The module as transformers runs it, one sample at a time: `[n, all parameters]`."""
    how, module.experts.config._experts_implementation = (
        module.experts.config._experts_implementation,
        "eager",
    )
    losses = [module(x[i : i + 1]).sin().sum() for i in range(len(x))]
    rows = [torch.autograd.grad(loss, list(module.parameters())) for loss in losses]
    module.experts.config._experts_implementation = how
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def side_by_side(tree: Any) -> Tensor:
    return torch.cat([g.flatten(1) for g in tree.values()], 1)


@pytest.mark.parametrize(
    ("kind", "how"), [("Mixtral", "grouped_mm"), *((kind, "eager") for kind in KINDS)]
)
def test_experts_as_shipped_are_exact(kind: str, how: str) -> None:
    """On one trace: other tokens, and as many for all experts or for one alone."""
    module, model_fn, params = routed(kind, how)
    assert list(params) == [name for name, _ in module.named_parameters()]
    val = torch.randn(3, 5, 4).double()
    v = by_autograd(module, val)
    for x in (torch.randn(4, 6, 4), torch.randn(4, 6, 4) + 2, torch.ones(4, 6, 4).cumsum(0) / 9):
        x = x.double()
        g = by_autograd(module, x)
        got = gf.per_sample_grads(model_fn, params, x, mode="ghost")
        assert_close(side_by_side(got), g, 1e-10)
        assert_close(gf.ghost_norm(model_fn, params, x), g.norm(dim=1), 1e-10)
        assert_close(gf.ghost_gram(model_fn, params, x, val), g @ v.mT, 1e-10)
        step = gf.ghost_value_and_grad(model_fn, params, x, val)
        assert_close(step.dot_prods, g @ v.mean(0), 1e-10)
        assert_close(side_by_side({k: y[None] for k, y in step.grads.items()})[0], g.mean(0), 1e-10)
        clipped, _ = gf.ghost_clipped_grad(model_fn, params, x, max_norm=1.0)
        share = (1 / g.norm(dim=1)).clamp(max=1)
        assert_close(side_by_side({k: y[None] for k, y in clipped.items()})[0], share @ g, 1e-10)
    assert not by_autograd(module, x)[:, -1].isnan().any()


@pytest.mark.parametrize("how", ["eager", "grouped_mm"])
def test_an_expert_without_tokens_and_top_one(how: str) -> None:
    module, model_fn, params = routed("Mixtral", how, top=1)
    x = torch.ones(2, 3, 4).double() * torch.tensor([1.0, 1.1]).view(2, 1, 1)
    grads = gf.per_sample_grads(model_fn, params, x, mode="ghost")
    used = grads["experts.down_proj"].flatten(2).any(2)
    assert used.sum() < used.numel()
    assert_close(side_by_side(grads), by_autograd(module, x), 1e-10)


def test_experts_in_other_modes_documents_positions_and_regions() -> None:
    module, model_fn, params = routed("Mixtral", "grouped_mm")
    x = torch.randn(3, 4, 4).double()
    u = {k: torch.randn_like(p) for k, p in params.items()}
    dots = by_autograd(module, x) @ torch.cat([y.flatten() for y in u.values()])
    for options in ({}, {"mode": "jvp"}, {"mode": "materialized", "vectorize": True}):
        assert_close(gf.ghost_dot_prod(model_fn, params, x, direction=u, **options), dots, 1e-10)
    apart = gf.ghost_dot_prod(model_fn, params, x, direction=u, per_position=True)
    assert_close(apart.sum(1), dots, 1e-10)
    many = torch.func.vmap(lambda u: gf.ghost_dot_prod(model_fn, params, x, direction=u))
    assert_close(many({k: torch.stack([y, 2 * y]) for k, y in u.items()})[1], 2 * dots, 1e-10)

    def of_rows(m: nn.Module, batch: Any) -> Tensor:
        return batch.sums(gf.remat(m)(batch.rows()["x"]).sin().sum(-1))

    model_fn, params = gf.from_module(module, of_rows)
    docs = gf.documents({"x": x}, segments=torch.tensor([[0, 0, 0, 0], [1, 1, 1, 2], [3, 3, 4, 4]]))
    g = torch.cat(
        [by_autograd(module, y[None]) for y in (x[0], x[1, :3], x[1, 3:], x[2, :2], x[2, 2:])]
    )
    assert_close(gf.ghost_norm(model_fn, params, docs), g.norm(dim=1), 1e-10)
    assert_close(
        gf.ghost_dot_prod(model_fn, params, docs, direction=u),
        g @ torch.cat([y.flatten() for y in u.values()]),
        1e-10,
    )
    assert "forward" not in vars(module.experts)


def test_experts_that_are_not_what_they_say() -> None:
    """A class of its own, which scales what it gives."""
    module, model_fn, params = routed("Mixtral", "eager")
    kind = type(module.experts)

    class Scaled(kind):  # type: ignore[misc, valid-type]
        @functools.wraps(kind.forward)
        def forward(self, *args: Any) -> Tensor:
            return 2 * super().forward(*args)

    Scaled.forward.__wrapped__ = lambda self, *args: 2 * kind.forward(self, *args)
    module.experts.__class__ = Scaled
    with pytest.raises(gf.UnsupportedOpError, match="Scaled is not what its attributes say"):
        gf.ghost_norm(model_fn, params, torch.randn(3, 4, 4).double())
    assert "forward" not in vars(module.experts)


def test_the_load_balancing_loss_is_refused_by_name() -> None:
    module, _, _ = routed("Mixtral", "grouped_mm")

    def loss(m: Any, x: Tensor) -> Tensor:
        share = m.router(x.flatten(0, 1)).softmax(-1).mean(0)
        return m(x).sin().flatten(1).sum(1) + share.square().sum()

    with pytest.raises(gf.CoupledSamplesError):
        gf.ghost_norm(*gf.from_module(module, loss), torch.randn(3, 4, 4).double())


def test_experts_outside_from_module_say_what_to_do() -> None:
    module, in_order, params = routed("Mixtral", "grouped_mm")
    module.float()

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(module, p, (x,)).sin().flatten(1).sum(1)

    x = torch.randn(3, 4, 4)
    single = {k: p.float() for k, p in params.items()}
    for how, said in (("grouped_mm", "from_module"), ("eager", 'mode="jvp"')):
        module.experts.config._experts_implementation = how
        with pytest.raises(gf.GhostError, match=said):
            gf.ghost_norm(model_fn, single, x)
        assert_close(in_order(single, x), model_fn(single, x), 1e-5)  # by the kernel as shipped
