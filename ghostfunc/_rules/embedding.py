"""Table look-ups: `F.embedding` and indexing a parameter by integer tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ghostfunc._errors import UnsupportedOpError
from ghostfunc._factors import OneHot
from ghostfunc._rules._registry import coupled, refuse, register_rule


@refuse(F.embedding)
def check_embedding(  # type: ignore[no-untyped-def]
    input,
    weight,
    padding_idx=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
    sparse=False,
):
    if max_norm is not None:
        raise UnsupportedOpError(
            "F.embedding with max_norm rewrites its weight in the forward pass, so the function "
            "is not pure. Renormalise the weight outside model_fn and drop max_norm."
        )
    if scale_grad_by_freq:
        raise coupled(
            "F.embedding with scale_grad_by_freq=True counts ids over the whole batch",
            "Set scale_grad_by_freq=False.",
        )


@register_rule(F.embedding)
def embedding(  # type: ignore[no-untyped-def]
    b,
    input,
    weight,
    padding_idx=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
    sparse=False,
):
    def of_weight() -> OneHot:
        ids = input.flatten(1) if input.ndim > 1 else input[:, None]
        cotangent = b.reshape(*ids.shape, b.shape[-1])
        if padding_idx is not None:
            row = padding_idx % weight.shape[0]
            cotangent = cotangent.masked_fill((ids == row)[..., None], 0)
        return OneHot(ids, cotangent, weight.shape[0])

    return {"weight": of_weight}


@register_rule(torch.Tensor.__getitem__)
def getitem(b, input, index):  # type: ignore[no-untyped-def]
    def of_input() -> OneHot:
        ids = index[0] if isinstance(index, tuple) and len(index) == 1 else index
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
            raise UnsupportedOpError(
                "Indexing a parameter by samples is supported for one integer tensor, w[ids]. "
                f"Got an index of {type(ids).__name__}; use F.embedding, or index the result."
            )
        flat = ids.flatten(1) if ids.ndim > 1 else ids[:, None]
        row = b.reshape(*flat.shape, -1)
        return OneHot(flat % input.shape[0], row, input.shape[0])

    return {"input": of_input}
