"""One of two processes that make one curvature, each of its own batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import ghostfunc as gf


def logits(p: Any, b: Any) -> torch.Tensor:
    return F.linear(torch.tanh(F.linear(b["x"], p["w"], p["b"])), p["v"])


def model(p: Any, b: Any) -> torch.Tensor:
    return F.cross_entropy(logits(p, b), b["y"], reduction="none")


def problem() -> tuple[Any, list[Any]]:
    g = torch.Generator().manual_seed(0)
    shapes = {"w": (3, 4), "b": (3,), "v": (5, 3)}
    params = {k: torch.randn(s, generator=g, dtype=torch.float64) for k, s in shapes.items()}
    batches = [
        {
            "x": torch.randn(6, 4, generator=g, dtype=torch.float64),
            "y": torch.randint(5, (6,), generator=g),
        }
        for _ in range(3)
    ]
    return params, batches


def curvatures(rank: int, directory: Path) -> None:
    """What one process makes of its batches, and what it says of a loss that is not finite."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2
    )
    params, batches = problem()
    made = gf.curvature.ekfac(
        model,
        params,
        batches[rank::2],  # two here, one there
        fisher="empirical",
        group=torch.distributed.group.WORLD,
    )
    made.save(directory / f"{rank}.safetensors")
    if rank:
        batches[1]["x"][0, 0] = torch.nan
    try:
        gf.curvature.ekfac(
            model,
            params,
            batches[rank::2],
            fisher="empirical",
            group=torch.distributed.group.WORLD,
        )
    except gf.GhostError as error:
        (directory / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    torch.distributed.destroy_process_group()
