"""Which training images matter for a test image: projected gradients of an MLP on digits.

Trains an MLP, projects every training sample's gradient into a store on disk, and asks the store
for the ten samples most like each test image. What the exact gradients say is printed beside it.

    python examples/ghost_proj_mlp.py --out outputs/proj_mlp
"""

from __future__ import annotations

import argparse
from pathlib import Path


def asked() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the store")
    parser.add_argument("--rank", type=int, default=256, help="columns per parameter")
    return parser.parse_args()


if __name__ == "__main__":
    asked()  # before torch is imported: --help and mistakes are answered at once

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ghostfunc as gf
from ghostfunc.store import Store, project_dataset

Sample = dict[str, Tensor]


def loss(module: nn.Module, batch: Sample) -> Tensor:
    return F.cross_entropy(module(batch["image"]), batch["label"], reduction="none")


def load_samples() -> list[Sample]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    labels = torch.tensor(digits.target)
    return [{"image": x, "label": y} for x, y in zip(images, labels, strict=True)]


def collate(samples: list[Sample]) -> Sample:
    return {key: torch.stack([s[key] for s in samples]) for key in samples[0]}


def train(module: nn.Module, samples: list[Sample], epochs: int) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    for _ in range(epochs):
        for at in torch.randperm(len(samples)).split(64):
            optimizer.zero_grad()
            loss(module, collate([samples[i] for i in at])).mean().backward()
            optimizer.step()


def main() -> None:
    arguments = asked()

    torch.manual_seed(0)
    samples = load_samples()
    corpus, queries = samples[:1500], samples[1500:1600]
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    train(module, corpus, epochs=5)
    model_fn, params = gf.from_module(module, loss)

    projection = gf.kronecker_projection(
        params, rank_total=arguments.rank, rank_min=4, kind="orthonormal", seed=0
    )
    print(projection)
    place = arguments.out / "store"
    if (place / "zarr.json").exists():  # killed while projecting: go on
        store = Store.open(place, projection=projection, writable=True)
    else:
        store = Store.create(place, projection=projection, n_samples=len(corpus), dtype="float32")
    if "final" not in store.checkpoints:
        store.add_checkpoint("final", params)
    project_dataset(
        model_fn,
        params,
        corpus,
        projection,
        store,
        checkpoint="final",
        collate=collate,
        batch_size=256,
    )

    query = gf.ghost_project(model_fn, params, collate(queries), projection)
    best = store.topk(query, 10, normalize="cosine")
    same = [
        float(torch.stack([samples[i]["label"] == q["label"] for i in ids]).float().mean())
        for q, ids in zip(queries, best.ids.tolist(), strict=True)
    ]
    print(f"of the ten most influential images, {sum(same) / len(same):.0%} show the same digit")

    exact = gf.projection.full_projection(params)
    x = gf.ghost_project(model_fn, params, collate(corpus), exact)
    q = gf.ghost_project(model_fn, params, collate(queries), exact)
    cosine = F.normalize(q) @ F.normalize(x).mT
    truth = cosine.topk(10).indices
    overlap = (best.ids[:, :, None] == truth[:, None, :]).any(2).float().mean()
    print(f"{projection.k} numbers a sample instead of {exact.k}: top-10 overlap {overlap:.2f}")


if __name__ == "__main__":
    main()
