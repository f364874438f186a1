"""Hugging Face models as pure functions with per-sample losses, and a Trainer with scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ghostfunc.hf._likelihoods import (
    causal_lm_likelihood,
    classification_likelihood,
    masked_lm_likelihood,
)
from ghostfunc.hf._losses import (
    causal_lm,
    image_classification,
    masked_lm,
    sequence_classification,
)
from ghostfunc.hf._memory import disable_remat, enable_remat

if TYPE_CHECKING:
    from ghostfunc.hf._trainer import GhostTrainer

__all__ = [
    "GhostTrainer",
    "causal_lm",
    "causal_lm_likelihood",
    "classification_likelihood",
    "disable_remat",
    "enable_remat",
    "image_classification",
    "masked_lm",
    "masked_lm_likelihood",
    "sequence_classification",
]


def __getattr__(name: str) -> Any:
    # Only the Trainer needs transformers, accelerate and pyarrow.
    if name == "GhostTrainer":
        from ghostfunc.hf._trainer import GhostTrainer

        return GhostTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
