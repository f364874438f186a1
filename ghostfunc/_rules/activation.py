"""Activations with parameters."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._factors.factor import Dense
from ghostfunc._rules.registry import Factors, register_rule


@register_rule(F.prelu)
def prelu(b: Tensor, input: Tensor, weight: Tensor) -> Factors:
    def of_weight() -> Dense:
        g = wide(b) * wide(input).clamp(max=0)
        if weight.shape[1:].numel() == 1:
            return Dense(g.reshape(len(g), -1).sum(1))
        return Dense(g.movedim(2, 1).flatten(2).sum(2))  # the channels are the call's second axis

    return {"weight": of_weight}
