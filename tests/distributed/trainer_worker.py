"""Runs of trainers, in one process or in the ranks of a group as torchrun starts them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from hf_trainers import arguments, gpt2, texts
from transformers import GPT2LMHeadModel, Trainer
from transformers.distributed.configuration_utils import DistributedConfig

import ghostfunc as gf
from ghostfunc._base.processes.dtensors import is_dtensor


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


def ghost(
    folder: str, together: int, resume: str | None, args: Any, shards: str = "", **options: Any
) -> Any:
    own = {"train_dataset": DATA["train_dataset"], **options}
    if "score_dataset" not in own:
        own["score_dataset"] = DATA["score_dataset"]
    made = trainer_of(gf.hf.GhostTrainer, folder, together, args, shards, **own)
    made.train(resume_from_checkpoint=resume)
    return made


def trainer_of(
    kind: type[Trainer], folder: str, together: int, args: Any, shards: str, **options: Any
) -> Any:
    """A trainer, whose model is sharded as it is loaded, or by accelerate, where that is asked."""
    settings = arguments_of(folder, together, **args)
    model: Any = gpt2()
    if shards == "loaded":
        model.save_pretrained(f"{folder}/model")  # the first process does
        dist.barrier()
        config = DistributedConfig(fsdp_size=together)
        model = GPT2LMHeadModel.from_pretrained(f"{folder}/model", distributed_config=config)
    made = kind(model=model, args=settings, **options)
    if shards == "accelerate":
        shard_by_accelerate(made)
    return made


def shard_by_accelerate(trainer: Any) -> None:
    """Accelerate has FSDP on accelerators alone: what it decides by the device is set by hand."""
    trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        cpu_ram_efficient_loading=False,
        state_dict_type="FULL_STATE_DICT",
    )
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.accelerator.state.distributed_type = DistributedType.FSDP
    trainer.is_fsdp_enabled = True
    assert trainer.accelerator.is_fsdp2


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
    whole = (p.full_tensor() if is_dtensor(p) else p for p in trainer.model.parameters())
    return torch.cat([p.detach().flatten() for p in whole]).tolist()


def trained_by_trainer(
    folder: str,
    args: dict[str, Any],
    options: dict[str, Any],
    resume: str | None,
    plain: bool,
    shards: str = "",
) -> dict[str, Any]:
    """A run with scores, and one without."""
    as_torchrun()
    size = dist.get_world_size()
    out = outcome(ghost(folder, size, resume, args, shards, **options))
    if plain:
        data = {"train_dataset": DATA["train_dataset"]}
        data |= {k: x for k, x in options.items() if k in ("train_dataset", "data_collator")}
        other = trainer_of(Trainer, f"{folder}/plain", size, args, shards, **data)
        other.train()
        out["plain"] = weights(other)
        out["plain loss"] = other.state.log_history[-1]["train_loss"]
    if shards == "loaded":
        out["refused"] = refused(f"{folder}/refused", "options", shards)
    return out


def refused(folder: str, kind: str, shards: str = "") -> str:
    """What a rank says when rank 1 has other data, or a model that fails; or of options that are
    not for shards."""
    as_torchrun()
    data, other = dict(DATA), dist.get_rank() == 1
    if other and kind == "data":
        data["train_dataset"] = texts(24, 5)
    more = {"score_form": "exact", "log_gradients": True} if kind == "options" else {}
    try:
        trainer = trainer_of(gf.hf.GhostTrainer, folder, 2, {}, shards, **data, **more)
    except gf.GhostError as error:
        return f"{type(error).__name__}: {error}"
    if other and kind == "model":
        trainer.model.transformer.wte.register_forward_pre_hook(_fail)
    try:
        trainer.train()
    except (gf.GhostError, LookupError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _fail(*_: Any) -> None:
    raise LookupError("this model fails")
