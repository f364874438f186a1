"""What `GhostTrainer` does not train with, and the way out of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import unwrap_peft_model

from ghostfunc._base.errors import BatchError, OptionError
from ghostfunc.hf._numbered import SAMPLE_ID


def refuse_own_step(trainer: type[Trainer], mixin: type[Trainer]) -> None:
    """Raise where a trainer behind the mixin has a training step of its own: it would not run."""
    classes = trainer.__mro__
    behind = classes[classes.index(mixin) + 1 : classes.index(Trainer)]
    own = [x for x in behind if "training_step" in vars(x) and library_of(x) not in KNOWN]
    if own:
        raise OptionError(
            f"{own[0].__name__}.training_step would not run: {mixin.__name__} has a training step "
            "of its own, with scores. Put what it does besides into a callback (on_step_begin, "
            "on_pre_optimizer_step), or into a class before the mixin that calls super()."
        )


def refuse_missing_input(module: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise for a micro-batch without the model's main input, in words of the training set."""
    base = unwrap_peft_model(module)
    if not isinstance(base, PreTrainedModel):
        return
    name = base.main_input_name
    if name not in inputs and "inputs_embeds" not in inputs:
        columns = sorted(k for k in inputs if k != SAMPLE_ID)
        raise BatchError(
            f"The collated training batch has no {name!r}, the main input of "
            f"{type(base).__name__}; it has {columns}. Give train_dataset a column {name!r}, or "
            "pass sample_loss for a loss of other columns."
        )


KNOWN = ("ghostfunc", "transformers", "trl")
"""Libraries whose trainers are known here."""


def library_of(x: Any) -> str:
    """The package that a class or a function is from."""
    return str(x.__module__).partition(".")[0]


def is_sharded(trainer: Trainer) -> bool:
    """Whether the parameters are, or will be, sharded by FSDP2: by accelerate, or as
    `from_pretrained(distributed_config=...)` loads them."""
    loaded = trainer.is_distributed_loading_by_transformers
    return bool(loaded or trainer.accelerator.is_fsdp2)


def _flat_fsdp(trainer: Trainer) -> bool:
    ours = trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2
    return bool(ours or trainer.is_fsdp_xla_enabled)


def _beyond_fsdp(trainer: Trainer) -> bool:
    """Whether a model was loaded with more than `fully_shard`."""
    if not trainer.is_distributed_loading_by_transformers:
        return False
    plan: Any = cast(PreTrainedModel, unwrap_peft_model(trainer.model)).config.distributed_config
    return any(size not in (None, 1) for size in (plan.tp_size, plan.pp_size, plan.ep_size))


def refuse_of_shards(trainer: Trainer, asked: Mapping[str, bool]) -> None:
    """Raise for what a trainer of sharded parameters does not do. `asked` says which options of its
    own have been taken, by name."""
    settings = {
        "bf16 or fp16": trainer.accelerator.mixed_precision != "no",
        "torch_compile": bool(trainer.args.torch_compile),
    }
    taken = [name for name, given in {**asked, **settings}.items() if given]
    if taken and is_sharded(trainer):
        raise OptionError(
            f"GhostTrainer with FSDP does not take {', '.join(taken)}: it takes score_form "
            '"sgd" or "previous_state" of order 1, in float32, uncompiled. Leave out one of the '
            "two; without FSDP it trains with DistributedDataParallel under torchrun."
        )


def refuse_settings(trainer: Trainer, *, several_processes: bool) -> None:
    """Raise for settings under which scores or weights would be other than they are said to be."""
    args = trainer.args
    several = args.world_size > 1
    found: Mapping[str, bool] = {
        f"several devices in one process ({args.parallel_mode}): start one process for each, "
        "torchrun --nproc-per-node=N, or one that sees one device (CUDA_VISIBLE_DEVICES=0)": (
            args.n_gpu > 1
        ),
        "several processes, of TRL's trainers: start one process that sees one device "
        "(CUDA_VISIBLE_DEVICES=0)": several and not several_processes,
        "several processes and an iterable train_dataset (who is given which sample is not known): "
        "give a map-style one": several and isinstance(trainer.train_dataset, IterableDataset),
        "DeepSpeed (it keeps gradients in buffers of its own): leave deepspeed out, which trains "
        "with DistributedDataParallel under torchrun": trainer.is_deepspeed_enabled,
        "FSDP of version 1, or of XLA (their parameters are views of flat buffers): set "
        "fsdp_version 2, or load the model with from_pretrained(..., distributed_config="
        "DistributedConfig(fsdp_size=N))": _flat_fsdp(trainer),
        "tensor, pipeline, expert, context or sequence parallel layers: leave parallelism_config "
        "out, and have fsdp_size alone in distributed_config": args.parallelism_config is not None
        or _beyond_fsdp(trainer),
        "NEFTune noise (it is scaled by the length of the longest sample of the batch, so samples "
        "depend on each other): leave neftune_noise_alpha out": trainer.neftune_noise_alpha
        is not None,
        "auto_find_batch_size on several processes (the one that is out of memory would begin "
        "again alone): set per_device_train_batch_size": several and args.auto_find_batch_size,
        "use_liger_kernel (its kernels are Functions of their own, in which parameters are not "
        "seen): leave it out": args.use_liger_kernel,
    }
    refused = [name for name, present in found.items() if present]
    if refused:
        raise OptionError(f"GhostTrainer does not train with {'; nor with '.join(refused)}.")
