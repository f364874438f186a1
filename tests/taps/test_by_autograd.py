"""Training gradients that are left to autograd are its own, bit for bit, whatever meets samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch import Tensor, nn

import ghostfunc as gf


class Model(nn.Module):
    """Parameters that are multiplied, broadcast, looked up, derived, shared, and used as a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.randn(8))
        self.mask = nn.Parameter(torch.randn(5, 5))
        self.shift = nn.Parameter(torch.randn(8))

    def block(self, h: Tensor) -> Tensor:
        h = self.norm(F.gelu(self.linear(h))) * self.scale
        q = h[:, None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=self.mask.to(q.dtype))[:, 0]

    def forward(self, ids: Tensor, remat: Callable[..., Callable[..., Tensor]]) -> Tensor:
        h = remat(self.block)(self.table(ids))
        h = self.linear(h).float() + self.table(ids).float()
        h += self.shift.float()
        return (h @ self.table.weight.t()).logsumexp(-1).sum(1)


def plainly(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return f


@pytest.mark.parametrize("remat", [plainly, gf.remat])
@pytest.mark.parametrize("autocast", [False, True])
def test_every_bit(remat: Callable[..., Callable[..., Tensor]], autocast: bool) -> None:
    torch.manual_seed(0)
    model, batch = Model(), {"ids": torch.randint(0, 11, (4, 5))}

    def loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses: Tensor = module(batch["ids"], remat)
            return losses.float()

    model_fn, params = gf.from_module(model, loss)
    u = {k: torch.randn_like(x) for k, x in params.items()}
    read = {"dots": gf.Dot(u), "squares": gf.SqNorm()}
    loss(model, batch).sum().backward()
    for _ in range(2):  # met for the first time, and again
        out = gf.ghost_vjp(model_fn, params, batch, read, grads="autograd")
        contracted = gf.ghost_vjp(model_fn, params, batch, read, grads=True)
        assert_close(out.values, contracted.values, 1e-6)
        for name, p in model.named_parameters():
            assert p.grad is not None
            if remat is plainly and name != "shift":  # written to in place
                assert torch.equal(out.grads[name], p.grad), name
            assert_close(out.grads[name], p.grad, 1e-2 if autocast else 1e-5)


def test_a_word_that_is_none() -> None:
    model_fn, params = gf.from_module(nn.Linear(2, 1), lambda m, b: m(b)[:, 0])
    with pytest.raises(gf.OptionError, match="grads"):
        gf.ghost_vjp(model_fn, params, torch.ones(2, 2), {}, grads="autograds")  # type: ignore[arg-type]
