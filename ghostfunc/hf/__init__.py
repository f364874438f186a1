"""Hugging Face models as pure functions with per-sample losses."""

from ghostfunc.hf._losses import (
    causal_lm,
    image_classification,
    masked_lm,
    sequence_classification,
)

__all__ = ["causal_lm", "image_classification", "masked_lm", "sequence_classification"]
