"""What `GhostTrainer` does not train with, and the way out of each."""

from __future__ import annotations

from collections.abc import Mapping

from torch.utils.data import IterableDataset
from transformers import Trainer

from ghostfunc._base.errors import OptionError


def refuse_settings(trainer: Trainer, *, second_order: bool, several_processes: bool) -> None:
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
        "FSDP (parameters are shards there): leave fsdp out, which trains with "
        "DistributedDataParallel under torchrun, or call fully_shard and gf.shapley.step in a loop "
        "of your own (docs/sharded.md)": bool(
            trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled
        ),
        "tensor, context or sequence parallel layers: leave parallelism_config out, which trains "
        "with DistributedDataParallel under torchrun": args.parallelism_config is not None,
        "NEFTune noise (it is scaled by the length of the longest sample of the batch, so samples "
        "depend on each other): leave neftune_noise_alpha out": trainer.neftune_noise_alpha
        is not None,
        "auto_find_batch_size (a step is begun again after some of its samples were scored): set "
        "per_device_train_batch_size": args.auto_find_batch_size,
        "use_liger_kernel (its kernels are Functions of their own, in which parameters are not "
        "seen): leave it out": args.use_liger_kernel,
        "mixed precision and score_order=2 (torch cannot take second derivatives under autocast): "
        "load the model in bfloat16 instead, or use score_order=1": second_order
        and (args.bf16 or args.fp16),
    }
    refused = [name for name, present in found.items() if present]
    if refused:
        raise OptionError(f"GhostTrainer does not train with {'; nor with '.join(refused)}.")
