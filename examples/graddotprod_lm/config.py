"""The configuration of a run: every field is required, but for `compile`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from examples.graddotprod_lm.models import ARCHITECTURES

METHODS = ("GradDotProd", "Regular")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Config:
    """Train a GPT-2 on files of tokens, with or without a score for every sample."""

    method: str
    """GradDotProd scores every sample of every step; Regular trains without."""
    architecture: str
    """GPT2-Small, GPT2-Medium, GPT2-Large, or GPT2-Tiny (bytes; for trying things out)."""
    pile_dir: Path
    """Folder with train-<domain>.bin, val/ and test/, as prepare_data.py writes it."""
    num_domains: int
    """How many domains, from the start of the list, to train on."""
    results_dir: Path
    """The run gets a folder of its own in this one."""
    batch_size: int
    """Samples in a step, over all processes."""
    val_batch_size: int
    """Validation samples that score a step, over all processes."""
    learning_rate: float
    """The highest one, after the warm-up."""
    max_steps: int
    """Optimizer steps."""
    dtype: str
    """float32, or bfloat16 (autocast; parameters stay float32)."""
    dot_prod_save_interval: int
    """Steps between two checkpoints, scores included: what an interruption can cost."""
    eval_interval: int
    """Steps between two readings of the validation loss."""
    seed: int
    """Of the model and of the order of the data."""
    compile: bool = field(default=False, metadata={"optional": True})
    """Run the steps as one compiled program (GradDotProd)."""

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ValueError: an unknown method, architecture or dtype, or a number below its least.
        """
        for name, known in (
            ("method", METHODS),
            ("architecture", tuple(ARCHITECTURES)),
            ("dtype", DTYPES),
        ):
            if asdict(self)[name] not in known:
                raise ValueError(f"--{name} {asdict(self)[name]} is unknown. Known: {known}.")
        for name in (
            "num_domains",
            "batch_size",
            "val_batch_size",
            "max_steps",
            "dot_prod_save_interval",
            "eval_interval",
        ):
            if asdict(self)[name] < 1:
                raise ValueError(f"--{name} {asdict(self)[name]} has to be at least 1.")
        if not self.learning_rate > 0:
            raise ValueError(f"--learning_rate {self.learning_rate} has to be above 0.")
        if self.compile and self.method == "Regular":
            raise ValueError("--compile True is for --method GradDotProd.")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} has to be 0 or more.")

    @property
    def run_dir(self) -> Path:
        """Where everything of this run is."""
        return self.results_dir / (
            f"{self.method}-{self.architecture}-domains{self.num_domains}-bs{self.batch_size}"
            f"-val{self.val_batch_size}-lr{self.learning_rate:g}-{self.dtype}-seed{self.seed}"
            + ("-compiled" if self.compile else "")
        )

    def as_json(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


def check_dtype(dtype: str, device: torch.device) -> None:
    """Refuse a precision that the device does not have.

    Raises:
        RuntimeError: says which one to use instead.
    """
    if dtype != "bfloat16":
        return
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise RuntimeError(
            f"--dtype bfloat16 needs a device that computes in bfloat16, and {name} does not. Use "
            "--dtype float32, or a GPU of compute capability 8.0 or more."
        )
    if device.type not in ("cuda", "cpu"):
        raise RuntimeError(
            f"--dtype bfloat16 is for CUDA and CPU devices, not {device.type}. Use --dtype float32."
        )
