"""Hugging Face models as pure functions with per-sample losses, and a Trainer with scores."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ghostfunc.hf._grpo import grpo
from ghostfunc.hf._likelihoods import (
    causal_lm_likelihood,
    classification_likelihood,
    masked_lm_likelihood,
)
from ghostfunc.hf._losses import (
    causal_lm,
    image_classification,
    masked_lm,
    seq2seq_lm,
    sequence_classification,
)
from ghostfunc.hf._memory import disable_remat, enable_remat
from ghostfunc.hf._preferences import dpo, reference_logps, reward_pairs

if TYPE_CHECKING:
    from ghostfunc.hf._health import HealthCallback
    from ghostfunc.hf._mixin import GhostMixin
    from ghostfunc.hf._trained_loss import SampleLoss
    from ghostfunc.hf._trainer import GhostTrainer
    from ghostfunc.hf._trl import DPOMixin, RewardMixin, SFTMixin

__all__ = [
    "DPOMixin",
    "GhostMixin",
    "GhostTrainer",
    "HealthCallback",
    "RewardMixin",
    "SFTMixin",
    "SampleLoss",
    "causal_lm",
    "causal_lm_likelihood",
    "classification_likelihood",
    "disable_remat",
    "dpo",
    "enable_remat",
    "grpo",
    "image_classification",
    "masked_lm",
    "masked_lm_likelihood",
    "reference_logps",
    "reward_pairs",
    "seq2seq_lm",
    "sequence_classification",
]


_LAZY = {
    "GhostMixin": "ghostfunc.hf._mixin",
    "HealthCallback": "ghostfunc.hf._health",
    "GhostTrainer": "ghostfunc.hf._trainer",
    "SampleLoss": "ghostfunc.hf._trained_loss",
    "DPOMixin": "ghostfunc.hf._trl",
    "RewardMixin": "ghostfunc.hf._trl",
    "SFTMixin": "ghostfunc.hf._trl",
}
"""What needs transformers, accelerate and pyarrow, imported when it is asked for."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
