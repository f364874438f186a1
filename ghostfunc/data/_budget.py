"""How many tokens fit into a batch."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ghostfunc._base.errors import BatchError
from ghostfunc._base.options import check_model_fn, check_whole
from ghostfunc._base.trees import batch_size, flatten_params, tensors_of
from ghostfunc._base.types import ModelFn, PyTree

SHARE = 0.25
"""Of the device's memory for activations; the rest is for parameters, cotangents and others."""

MOST, MOST_ELSEWHERE = 4096, 65536
"""Tokens beyond which a batch gets no faster: on CPUs, whose caches are small, and elsewhere."""

WORK, LEAST = 1 << 37, 256
"""Parameters times tokens beyond which a batch gets no faster on CPUs, and tokens below which it
gets slower whatever the model. The first batch of a shape is proved, which takes several times what
a batch takes: smaller batches need shorter proofs."""


def find_token_budget(model_fn: ModelFn, params: PyTree, batch: PyTree, *, tokens: int) -> int:
    """The most tokens of a batch, from what a few of them take.

        budget = 2^floor(log2(share * memory of the device / bytes per token)),
        on CPUs at most 2^floor(log2(2^37 / parameters)) between 2^8 and 2^12

    The bytes are those of all tensors that autograd keeps for the backward pass, counted in one
    forward pass over `batch`, twice: cotangents come beside them. Nothing is timed, so the same
    model on the same machine gets the same budget, and the same batches.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses [n]`.
        params: pytree of floating-point tensors.
        batch: a few samples, pytree of tensors `[n, ...]`.
        tokens: how many tokens `batch` has, padding included.

    Returns:
        A power of two, at least 16.

    Raises:
        BatchError: `tokens` is not positive.
    """
    check_model_fn(model_fn)
    batch_size(batch)
    if check_whole("tokens", tokens, -1) < 1:
        raise BatchError(f"tokens={tokens}: a batch has at least one token.")
    leaves = flatten_params(params)[0]
    device = leaves[0].device
    per_token = 2 * _kept_bytes(model_fn, params, batch) / tokens
    fitting = int(SHARE * _memory_of(device) / max(per_token, 1.0))
    if device.type == "cpu":
        work = WORK // max(1, sum(x.numel() for x in leaves))
        most = min(fitting, max(LEAST, min(MOST, work)))
    else:
        most = min(fitting, MOST_ELSEWHERE)
    return 1 << max(most.bit_length() - 1, 4)


def _kept_bytes(model_fn: ModelFn, params: PyTree, batch: PyTree) -> int:
    leaves, spec = flatten_params(params)
    inputs = [x.detach().requires_grad_() for x in leaves]
    own = {x.untyped_storage().data_ptr() for x in (*inputs, *tensors_of(batch))}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = model_fn(spec.unflatten(inputs), batch)
    del losses  # until here the storages live, so that no two share an address
    return sum(kept.values())


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def padded_tokens(lengths: Sequence[int]) -> int:
    """Tokens of a batch of samples of these lengths, padding included."""
    return len(lengths) * max(lengths)
