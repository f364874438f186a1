"""EK-FAC by its definition: per-sample gradients, every matrix formed, models whose ops say what
goes in and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Params = dict[str, Tensor]
Record = Callable[[str, Tensor, Tensor], Tensor]


def untouched(name: str, a: Tensor, y: Tensor) -> Tensor:
    """The record of an ordinary run: `y` as it is."""
    return y


@dataclass
class Tape:
    """Notes the input `a [n, t, d]` of every use of a parameter, and adds a zero to its output.

    A name with `.T` stands for a use of the transpose: the gradient is `sum a b^T`.
    """

    uses: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def __call__(self, name: str, a: Tensor, y: Tensor) -> Tensor:
        zero = torch.zeros_like(y, requires_grad=True)
        self.uses.setdefault(name, []).append((a.detach(), zero))
        return y + zero


def sides(
    model: Callable[..., Tensor], params: Params, batch: Any, *, reduce: bool = False
) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums over samples, positions and uses of every recorded parameter: `(sum b b^T, sum a a^T)`,
    the other way round for `.T`."""
    tape = Tape()
    losses = model(params, batch, record=tape)
    flat = [(name, a, zero) for name, uses in tape.uses.items() for a, zero in uses]
    zeros = [zero for *_, zero in flat]
    cotangents = torch.autograd.grad(losses.sum(), zeros) if zeros else ()
    out: dict[str, tuple[Tensor, Tensor]] = {}
    for (name, a, _), b in zip(flat, cotangents, strict=True):
        n = len(a)
        a = a.reshape(n, -1, a.shape[-1])
        b = b.reshape(n, -1, b.shape[-1]) if b.ndim != 4 else b.flatten(2).mT
        a = torch.where((b != 0).any(-1, keepdim=True), a, 0)  # padding, and the last token
        if reduce:
            a, b = a.sum(1, keepdim=True), b.sum(1, keepdim=True)
        of_b = torch.einsum("ntp,ntq->pq", b, b)
        of_a = torch.einsum("ntd,nte->de", a, a)
        left, right = (of_a, of_b) if name.endswith(".T") else (of_b, of_a)
        own = name.removesuffix(".T")
        if own in out:
            left, right = left + out[own][0], right + out[own][1]
        out[own] = left, right
    return out


def sample_grads(model_fn: Callable[..., Tensor], params: Params, batch: Any) -> Params:
    """`[n, *shape]` by plain autograd, one sample at a time."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in params.items()}
    losses = model_fn(leaves, batch)
    rows = [
        torch.autograd.grad(
            loss,
            list(leaves.values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for loss in losses
    ]
    return {name: torch.stack(x) for name, x in zip(leaves, zip(*rows, strict=True), strict=True)}


def second_moment(g: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """The dense block `(B (x) A) diag(L) (B (x) A)^T`, L the mean of squares in these bases.

    Args:
        g: `[n, p, d]`.
        left, right: sums whose eigenvectors are the bases; None keeps the axes.
    """
    _, p, d = g.shape
    basis_left = torch.eye(p).to(g) if left is None else torch.linalg.eigh(left)[1]
    basis_right = torch.eye(d).to(g) if right is None else torch.linalg.eigh(right)[1]
    u = torch.kron(basis_left.contiguous(), basis_right.contiguous())
    values = (g.flatten(1) @ u).square().mean(0)
    return u @ torch.diag(values) @ u.mT
