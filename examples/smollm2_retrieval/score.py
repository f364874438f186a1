"""Scores of every chunk for every query: with ghostfunc, and by a loop over samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

import ghostfunc as gf

Batch = dict[str, Tensor]
Params = dict[str, Tensor]
ModelFn = Callable[[Params, Batch], Tensor]


@dataclass(frozen=True)
class Scores:
    """Dot products and what makes cosines of them.

    Attributes:
        dots: `<g_i, u_j>`, `[n, q]`.
        norms: `||g_i||`, `[n]`.
        query_norms: `||u_j||`, `[q]`.
    """

    dots: Float[Tensor, "n q"]
    norms: Float[Tensor, " n"]
    query_norms: Float[Tensor, " q"]

    @property
    def cosines(self) -> Float[Tensor, "n q"]:
        return self.dots / (self.norms[:, None] * self.query_norms)


def directions(model_fn: ModelFn, params: Params, queries: Sequence[Batch]) -> list[Params]:
    """The mean gradient of every query batch; each is as large as the model."""
    return [gf.direction(model_fn, params, query) for query in queries]


def score(
    model_fn: ModelFn,
    params: Params,
    chunks: Int[Tensor, "n t"],
    us: Sequence[Params],
    *,
    batch_size: int,
) -> Scores:
    """All dot products and the norms, from one backward pass over the chunks."""
    asked: dict[str, gf.Quantity] = {str(j): gf.Dot(u) for j, u in enumerate(us)}
    asked["square"] = gf.SqNorm()
    parts = []
    for some in chunks.split(batch_size):
        read = gf.ghost_vjp(model_fn, params, {"input_ids": some}, asked).values
        parts.append(torch.stack([sum(by_param.values()) for by_param in read.values()], dim=1))
    *dots, squares = torch.cat(parts).unbind(1)
    return Scores(torch.stack(dots, dim=1), squares.sqrt(), query_norms(us))


def looped(
    model_fn: ModelFn, params: Params, chunks: Int[Tensor, "n t"], us: Sequence[Params]
) -> Scores:
    """The same by their definition: one backward pass per chunk, in plain PyTorch."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    dots, norms = [], []
    for chunk in chunks:
        (loss,) = model_fn(leaves, {"input_ids": chunk[None]})
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        dots.append(
            torch.stack([sum((g * u[name]).sum() for name, g in grads.items()) for u in us])
        )
        norms.append(sum(g.square().sum() for g in grads.values()).sqrt())
    return Scores(torch.stack(dots), torch.stack(norms), query_norms(us))


def query_norms(us: Sequence[Params]) -> Float[Tensor, " q"]:
    return torch.stack([sum(x.square().sum() for x in u.values()).sqrt() for u in us])
