"""A small problem with samples of unequal lengths, and a store for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ghostfunc as gf
from ghostfunc.store import Store, project_dataset

VOCABULARY = 11


def model_fn(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    ids, mask = batch["ids"], batch["mask"]
    hidden = torch.tanh(F.linear(F.embedding(ids, params["emb"]), params["w"], params["b"]))
    logits = F.linear(hidden, params["emb"])
    losses = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    return (losses.view(ids.shape) * mask).sum(1) / mask.sum(1)


def make_params(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"emb": (VOCABULARY, 6), "w": (6, 6), "b": (6,)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def make_data(n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [
        torch.randint(VOCABULARY, (int(torch.randint(2, 9, (), generator=g)),), generator=g)
        for _ in range(n)
    ]


def collate(samples: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(s)) for s in samples], batch_first=True)
    return {"ids": ids, "mask": mask}


def make_projection(seed: int = 0, kind: str = "rademacher") -> gf.Projection:
    return gf.kronecker_projection(make_params(), rank_total=16, rank_min=2, kind=kind, seed=seed)


def make_store(path: str | Path, n: int, **options: Any) -> Store:
    settings = {"dtype": "float32", "chunk_rows": 8, **options}
    store = Store.create(path, projection=make_projection(), n_samples=n, **settings)
    store.add_checkpoint("final", make_params(), lr=0.5)
    return store


def fill(store: Store, n: int, **options: Any) -> int:
    return project_dataset(
        model_fn,
        make_params(),
        make_data(n),
        make_projection(),
        store,
        checkpoint="final",
        **{
            "collate": collate,
            "length": len,
            "progress": False,
            "batch_size": 3,
            **options,
        },
    )


def expected(n: int) -> Tensor:
    """All rows, sample by sample, by the definition."""
    rows = [
        gf.ghost_project(
            model_fn, make_params(), collate([x]), make_projection(), mode="materialized"
        )
        for x in make_data(n)
    ]
    return torch.cat(rows)
