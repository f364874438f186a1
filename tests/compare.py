"""What is right: per-sample gradients by their definition, one sample at a time."""

from __future__ import annotations

from typing import Any

import optree
import torch
from problems import Problem
from torch import Tensor


def leaves_of(tree: Any) -> list[Tensor]:
    return optree.tree_leaves(tree)


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


def sample_grads(problem: Problem, batch: Any) -> list[Tensor]:
    """`[n, *shape]` per parameter, by plain autograd."""
    leaves, treedef = optree.tree_flatten(problem.params)
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    rows = []
    for i in range(len(leaves_of(batch)[0])):
        sample = optree.tree_map(lambda x, i=i: x[i : i + 1].clone(), batch)
        (loss,) = problem.model_fn(optree.tree_unflatten(treedef, leaves), sample)
        rows.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def gram(train: list[Tensor], val: list[Tensor]) -> list[Tensor]:
    """`<g_i, g_j>`, `[n, m]` per parameter."""
    return [
        wide(g).reshape(len(g), -1) @ wide(v).reshape(len(v), -1).mT
        for g, v in zip(train, val, strict=True)
    ]


def random_direction(params: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(
        lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype), params
    )


def assert_close(actual: Any, expected: Any, tolerance: float, *, floor: float = 1e-4) -> None:
    """Every leaf agrees, relative to its own largest value.

    Leaves smaller than `floor` times the largest one (true zeros among them) are held to that size:
    their own digits are rounding noise of the whole.
    """
    got, want = leaves_of(actual), leaves_of(expected)
    assert len(got) == len(want)
    smallest = floor * max(float(wide(x).abs().max()) for x in want)
    for i, (a, e) in enumerate(zip(got, want, strict=True)):
        assert a.shape == e.shape, f"leaf {i}: shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        a, e = wide(a), wide(e)
        error, size = float((a - e).abs().max()), max(float(e.abs().max()), smallest)
        assert error <= tolerance * size, f"leaf {i} is off by {error:.1e}\n{a}\nexpected\n{e}"
