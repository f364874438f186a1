"""Names for the things every file speaks about.

Index letters, used in every shape comment of this package:
`n` train samples, `m` validation samples, `t` positions in a sample, `d` in features,
`p` out features, `k` projected dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

PyTree: TypeAlias = Any
"""Any optree pytree; where tensors are meant, every leaf is a tensor."""


ModelFn: TypeAlias = Callable[[PyTree, PyTree], Tensor]
"""A pure function `model_fn(params, batch) -> losses[n]`."""


Mode: TypeAlias = Literal["ghost", "jvp", "materialized"]


Reduction: TypeAlias = Literal["mean", "sum", "none"]


Randomness: TypeAlias = Literal["error", "different"]


Check: TypeAlias = Literal["new", "always", "never"]
"""When a run is held against plain autograd: where something about it is new, always, or never."""


ContractDtype: TypeAlias = torch.dtype | None
"""What operands of a contraction's matrix products are rounded to; None: not at all."""
