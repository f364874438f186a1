"""Hugging Face models as pure functions with per-sample losses."""

from ghostfunc.hf._losses import (
    causal_lm,
    image_classification,
    masked_lm,
    sequence_classification,
)
from ghostfunc.hf._memory import disable_remat, enable_remat

__all__ = [
    "causal_lm",
    "disable_remat",
    "enable_remat",
    "image_classification",
    "masked_lm",
    "sequence_classification",
]
