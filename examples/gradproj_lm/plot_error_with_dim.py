"""Error of projected inner products against the number of columns, with the theory's 1/sqrt(k).

Reads the exact gradients that `compute_full_gradients.py` wrote, projects them at several ranks,
and draws the root mean square error of `<g_i, g_q>`, relative to the norms of both. References:
`full` (all parameters, exact, error 0), `full_layers` (the selected parameters, exact), `rank=K`
(theirs, projected), and the same hashed to fewer columns (`compress`). The overlap of the ten best
samples by cosine stands beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor

import ghostfunc as gf
from examples.gradproj_lm.config import Config, parse
from ghostfunc.store import Store

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COMPRESSED_RANK = 4096


def as_grads(rows: Tensor, full: gf.Projection) -> dict[str, Tensor]:
    """Rows of the full store as per-sample gradients again."""
    return {b.path: rows[:, b.columns].reshape(-1, *b.shape) for b in full.blocks}


def overlap(a: Tensor, b: Tensor) -> float:
    """Share of the ten best columns of `a` that are among the ten best of `b`, row by row."""
    k = min(10, a.shape[1])
    ours, theirs = a.topk(k).indices, b.topk(k).indices
    return float((ours[:, :, None] == theirs[:, None, :]).any(2).float().mean())


def cosine(q: Tensor, x: Tensor) -> Tensor:
    return F.normalize(q) @ F.normalize(x).mT


def project(
    config: Config, grads: dict[str, Tensor], rank: int, seed: int, compress: int | None
) -> gf.Projection:
    shapes = {name: g[0] for name, g in grads.items()}
    return gf.kronecker_projection(
        shapes,
        rank_total=rank,
        rank_min=min(config.proj_rank_min, int(rank**0.5)),
        kind=config.proj_kind,
        seed=seed,
        layers=config.layers(),
        compress=compress,
    )


class Point(NamedTuple):
    """One projection, on average over seeds."""

    k: int
    error: float
    overlap: float


def main() -> None:
    config = parse(__doc__)
    store = Store.open(config.full_dir)
    full = store.projection
    x, q = store.read(range(store.n_samples), "final"), torch.load(config.full_dir / "queries.pt")
    chosen = gf.projection.full_projection(
        {b.path: torch.empty(b.shape) for b in full.blocks}, layers=config.layers()
    )
    columns = full.columns([b.path for b in chosen.blocks])
    scale = q.norm(dim=1)[:, None] * x.norm(dim=1)
    exact, some = q @ x.mT, q[:, columns] @ x[:, columns].mT
    best = cosine(q[:, columns], x[:, columns])
    layers_error = float(((some - exact) / scale).square().mean().sqrt())
    print(f"full: k={full.k}; full_layers: k={chosen.k}, error {layers_error:.4f}")
    gx, gq = as_grads(x, full), as_grads(q, full)

    def measure(rank: int, compress: int | None) -> Point:
        squares, shares, k = [], [], 0
        for seed in range(config.proj_seed, config.proj_seed + config.plot_seeds):
            projection = project(config, gx, rank, seed, compress)
            px, pq = projection.apply(gx), projection.apply(gq)
            squares.append(((pq @ px.mT - some) / scale).square().mean())
            shares.append(overlap(cosine(pq, px), best))
            k = projection.k
        point = Point(k, float(torch.stack(squares).mean().sqrt()), sum(shares) / config.plot_seeds)
        print(f"rank={rank}, compress={compress}: {point}")
        return point

    plain = [measure(rank, None) for rank in config.plot_ranks]
    hashed = [measure(COMPRESSED_RANK, point.k) for point in plain]

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for points, label in (
        (plain, f"rank=K ({config.proj_kind})"),
        (hashed, f"rank={COMPRESSED_RANK}, compress=k"),
    ):
        left.loglog([p.k for p in points], [p.error for p in points], "o-", label=label)
        right.semilogx([p.k for p in points], [p.overlap for p in points], "o-", label=label)
    first = hashed[0]
    theory = [first.error * (first.k / p.k) ** 0.5 for p in plain]
    left.loglog([p.k for p in plain], theory, "k--", label="1/sqrt(k)")
    left.axhline(layers_error, color="tab:red", label="full_layers against full")
    left.set(xlabel="k, numbers per sample", ylabel="RMS error / (|g| |g'|)")
    for axes in (left, right):
        axes.set_xticks([p.k for p in plain], labels=[str(p.k) for p in plain], rotation=45)
        axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=4)
    right.set(xlabel="k, numbers per sample", ylabel="overlap with the exact top 10", ylim=(0, 1))
    path = config.proj_dir.parent / "error_with_dim.png"
    left.set(title=f"full: k={full.k}, full_layers: k={chosen.k}")
    figure.savefig(path, dpi=150)
    print(f"drawn to {path}")


if __name__ == "__main__":
    main()
