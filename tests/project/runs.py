"""Runs of `examples/graddotprod_lm` on small token files, in processes of their own."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forks import forked

from examples.graddotprod_lm.config import Config
from examples.graddotprod_lm.data import SPLITS, TOKEN, token_path
from examples.graddotprod_lm.scores import Table, load
from examples.graddotprod_lm.train import main

DOMAINS = ["Pile-CC", "PubMed Central", "Books3"]


def write_tokens(pile_dir: Path, domains: list[str] = DOMAINS) -> None:
    """Files of a few thousand bytes, every domain with letters of its own."""
    rng = np.random.default_rng(0)
    for i, domain in enumerate(domains):
        for split in SPLITS:
            path = token_path(pile_dir, split, domain)
            path.parent.mkdir(parents=True, exist_ok=True)
            rng.integers(40 * i, 40 * i + 30, 4000 + 500 * i).astype(TOKEN).tofile(path)


def make_config(pile_dir: Path, results_dir: Path, **changes: Any) -> Config:
    config = Config(
        method="GradDotProd",
        architecture="GPT2-Tiny",
        pile_dir=pile_dir,
        num_domains=3,
        results_dir=results_dir,
        batch_size=4,
        val_batch_size=4,
        learning_rate=1e-3,
        max_steps=50,
        dtype="float32",
        dot_prod_save_interval=10,
        eval_interval=25,
        seed=0,
    )
    return replace(config, **changes)


def run_here(config: Config, environment: dict[str, str]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    os.environ.update(environment)
    main(config)


def start(config: Config, environment: dict[str, str] | None = None) -> BaseProcess:
    return forked(run_here, config, environment or {})


def run_alone(config: Config) -> None:
    process = start(config)
    process.join(60)
    assert process.exitcode == 0


def run_together(config: Config, size: int) -> None:
    """What torchrun does with `size` processes on this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    address = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), **address} for r in range(size)]
    processes = [start(config, rank) for rank in ranks]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * size


def weights(config: Config) -> dict[str, torch.Tensor]:
    return torch.load(config.run_dir / "checkpoint.pt", weights_only=True)["model"]


def scores(config: Config) -> Table:
    return load(config.run_dir)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
