"""Names for the things every file speaks about.

Index letters, used in every shape comment of this package:
`n` train samples, `m` validation samples, `t` positions in a sample, `d` in features,
`p` out features, `k` projected dimensions.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import optree
import torch
from jaxtyping import Float
from torch import Tensor

PyTree: TypeAlias = Any
"""Any optree pytree; where tensors are meant, every leaf is a tensor."""

ModelFn: TypeAlias = Callable[[PyTree, PyTree], Tensor]
"""A pure function `model_fn(params, batch) -> losses[n]`."""

Mode: TypeAlias = Literal["ghost", "jvp", "materialized"]
Reduction: TypeAlias = Literal["mean", "sum", "none"]
Randomness: TypeAlias = Literal["error", "different"]

ContractDtype: TypeAlias = torch.dtype | None
"""What operands of a contraction's matrix products are rounded to; None: not at all."""


def brief(name: str, **fields: object) -> str:
    """A result in one line: shapes and dtypes of tensors, sizes of trees; no numbers."""
    return f"{name}({', '.join(f'{key}={_outline(x)}' for key, x in fields.items())})"


def _outline(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    leaves: list[Any] = optree.tree_leaves(cast(Any, x))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        return repr(x)
    if len(tensors) == 1:
        return f"{{{_outline(tensors[0])}}}"
    return f"{{{len(tensors)} tensors, {sum(t.numel() for t in tensors):,} numbers}}"


def preformatted(text: object) -> str:
    """A table of text for a notebook."""
    return f"<pre>{html.escape(str(text))}</pre>"


class GhostStep(NamedTuple):
    """What one training step with scores returns.

    Attributes:
        losses: per-sample losses, `[n]`.
        grads: gradient of the mean loss, a pytree like `params`.
        dot_prods: `<g_i, u>`, `[n]` (`[n, m]` for `reduction="none"`), or a pytree of those like
            `params` for `per_param=True`; for several validation batches a dict of that.
    """

    losses: Float[Tensor, " n"]
    grads: PyTree
    dot_prods: PyTree

    def __repr__(self) -> str:
        return brief("GhostStep", **self._asdict())
