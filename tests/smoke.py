"""A few programs through every public transform, on nothing but the core dependencies.

    python tests/smoke.py

What the range of supported torch versions is tried with (`make torch-range`), where the rest of the
tests cannot run: their tools need newer versions. The truth is a loop over plain autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghostfunc as gf

CLASSES = 5
Loss = Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]


class Tagger(nn.Module):
    """A shared table and head, a recurrent layer, attention, norms."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.mix = nn.GRU(8, 8, batch_first=True)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.mix(self.table(tokens))
        hidden = self.norm(hidden + self.attend(hidden, hidden, hidden, need_weights=False)[0])
        return hidden @ self.table.weight.T


def token_losses(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits = module(batch[0])
    return F.cross_entropy(logits.mT, batch[1], reduction="none").mean(1)


def class_losses(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def programs() -> Iterator[tuple[str, nn.Module, Loss, list[tuple[Tensor, Tensor]]]]:
    """Names, modules, losses, and a train and a validation batch."""
    torch.manual_seed(0)
    sizes = (6, 4)
    net = nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Linear(9, CLASSES))
    batches = [(torch.randn(n, 7), torch.randint(CLASSES, (n,))) for n in sizes]
    yield "linear", net, class_losses, batches
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    )
    batches = [(torch.randn(n, 3, 6, 5), torch.randint(CLASSES, (n,))) for n in sizes]
    yield "images", net, class_losses, batches
    batches = [
        (torch.randint(11, (n, t)), torch.randint(11, (n, t)))
        for n, t in zip(sizes, (5, 8), strict=True)
    ]
    yield "tokens", Tagger(), token_losses, batches


def loop(module: nn.Module, loss: Loss, batch: tuple[Tensor, Tensor]) -> Tensor:
    """`[n, parameters]` by one backward pass per sample."""
    rows = []
    for i in range(len(batch[0])):
        (one,) = loss(module, tuple(x[i : i + 1] for x in batch))  # type: ignore[arg-type]
        grads = torch.autograd.grad(one, list(module.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def check(module: nn.Module, loss: Loss, train: Any, val: Any) -> int:
    """Compare every number with the loop's; how many were compared."""
    model_fn, params = gf.from_module(module, loss)
    g, u = loop(module, loss, train), loop(module, loss, val)
    step = gf.ghost_value_and_grad(model_fn, params, train, val)
    norms = g.norm(dim=1)
    lengths = norms[:, None] * norms
    max_norm = float(norms.median())
    clipped, found_norms = gf.ghost_clipped_grad(model_fn, params, train, max_norm=max_norm)
    projection = gf.kronecker_projection(
        params, rank_total=16, rank_min=2, kind="orthonormal", seed=0
    )
    own = dict(module.named_parameters())

    def flat(tree: dict[str, Tensor]) -> Tensor:
        """In the order of the module's parameters."""
        assert sorted(tree) == sorted(own)
        return torch.cat([tree[name].flatten() for name in own])

    def rows_of(tree: dict[str, Tensor]) -> Tensor:
        return torch.cat([tree[name].flatten(1) for name in own], 1)

    # Forward mode has not every op: attention is one that torch lacks.
    modes: list[Literal["ghost", "jvp", "materialized"]] = ["ghost", "materialized"]
    modes += [] if isinstance(module, Tagger) else ["jvp"]
    pairs = [
        (gf.ghost_dot_prod(model_fn, params, train, val, mode=mode), g @ u.mean(0))
        for mode in modes
    ]
    per_sample = gf.per_sample_grads(model_fn, params, train, mode="ghost")
    factor = (max_norm / norms).clamp(max=1)
    mean = u.mean(0)
    pairs += [
        (gf.ghost_dot_prod(model_fn, params, train, val, reduction="none"), g @ u.T),
        (step.dot_prods, g @ u.mean(0)),
        (flat(step.grads), g.mean(0)),
        (gf.ghost_norm(model_fn, params, train), norms),
        (found_norms, norms),
        (flat(clipped), (factor[:, None] * g).sum(0)),
        (gf.ghost_gram(model_fn, params, train), g @ g.T),
        (gf.ghost_gram(model_fn, params, train, normalize=True), g @ g.T / lengths),
        (
            gf.ghost_cosine(model_fn, params, train, val),
            g @ mean / (norms * mean.norm()),
        ),
        (rows_of(per_sample), g),
        (gf.ghost_project(model_fn, params, train, projection), projection.apply(per_sample)),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    gf.verify(model_fn, params, train, val, check=True)
    return len(pairs) + 1


def main() -> None:
    print(f"torch {torch.__version__}, ghostfunc of {gf.__file__}")
    for name, module, loss, batches in programs():
        double = copy.deepcopy(module).double().eval()
        train, val = (
            tuple(x.double() if x.is_floating_point() else x for x in batch) for batch in batches
        )
        print(f"{name}: {check(double, loss, train, val)} numbers are those of the loop")


if __name__ == "__main__":
    main()
