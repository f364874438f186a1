"""How results print: one line with shapes, and a table in a notebook."""

from __future__ import annotations

import html
from typing import Any, cast

import optree
from torch import Tensor


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
