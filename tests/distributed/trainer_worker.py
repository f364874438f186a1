"""Runs of trainers, in one process or in the ranks of a group as torchrun starts them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hf_trainers import arguments, gpt2, texts
from transformers import Trainer

import ghostfunc as gf


def as_torchrun() -> None:
    """What torchrun puts into the environment; the group itself is there."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


def arguments_of(folder: str, together: int, **options: Any) -> Any:
    """A step of 12 samples, in two micro-batches where that divides, on any number of processes."""
    parts = 2 if 6 % together == 0 else 1
    own: dict[str, Any] = {
        "per_device_train_batch_size": 12 // parts // together,
        "gradient_accumulation_steps": parts,
    }
    if together > 1:
        own["ddp_backend"] = "gloo"
    return arguments(Path(folder), **{**own, **options})


DATA = {"train_dataset": texts(24, 0), "score_dataset": {"a": texts(5, 1), "b": texts(3, 2)}}


def ghost(folder: str, together: int, resume: str | None, args: Any, **options: Any) -> Any:
    trainer = gf.hf.GhostTrainer(
        model=gpt2(),
        args=arguments_of(folder, together, **args),
        **{**DATA, **options},
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def outcome(trainer: Any) -> dict[str, Any]:
    """Scores by sample, how often each was trained on, weights, and what was logged."""
    ids, values, counts = trainer.scores
    order = ids.argsort()
    return {
        "ids": ids[order].tolist(),
        "values": values[order].tolist(),
        "counts": counts[order].tolist(),
        "weights": weights(trainer),
        "logged": {
            k: v for row in trainer.state.log_history for k, v in row.items() if "ghost/" in k
        },
        "loss": trainer.state.log_history[-1]["train_loss"],
    }


def weights(trainer: Any) -> list[float]:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).tolist()


def trained_by_trainer(
    folder: str, args: dict[str, Any], options: dict[str, Any], resume: str | None, plain: bool
) -> dict[str, Any]:
    """A run with scores, and one without."""
    as_torchrun()
    size = dist.get_world_size()
    out = outcome(ghost(folder, size, resume, args, **options))
    if plain:
        other = Trainer(
            model=gpt2(),
            args=arguments_of(f"{folder}/plain", size, **args),
            train_dataset=DATA["train_dataset"],
        )
        other.train()
        out["plain"] = weights(other)
        out["plain loss"] = other.state.log_history[-1]["train_loss"]
    return out


def refused(folder: str, kind: str) -> str:
    """What a rank says when rank 1 has other data, or a model that fails."""
    as_torchrun()
    data, other = dict(DATA), dist.get_rank() == 1
    if other and kind == "data":
        data["train_dataset"] = texts(24, 5)
    trainer = gf.hf.GhostTrainer(model=gpt2(), args=arguments_of(folder, 2), **data)
    if other and kind == "model":
        trainer.model.transformer.wte.register_forward_pre_hook(_fail)
    try:
        trainer.train()
    except (gf.GhostError, LookupError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _fail(*_: Any) -> None:
    raise LookupError("this model fails")
