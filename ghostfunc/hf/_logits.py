"""Logits in pieces: `[n, T, V]` of them are often the largest tensor of a language model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import BatchError, OptionError
from ghostfunc._taps.remat.remat import remat

IGNORED = -100
"""The label of positions that do not count, as everywhere in Hugging Face."""


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy `[n, T]` of logits `[n, T, V]`, zero where nothing is to be predicted."""
    if labels.shape != logits.shape[:-1]:
        raise BatchError(
            f"labels must be {list(logits.shape[:-1])}, one for every position of the model's "
            f"logits (-100 where nothing is to be predicted); got {list(labels.shape)}."
        )
    # Flat logits: on [n, V, T] the same function takes a tenth of a whole step.
    return F.cross_entropy(
        wide(logits.flatten(0, 1)), labels.flatten(), reduction="none", ignore_index=IGNORED
    ).view(labels.shape)


def chunked_token_means(
    model: Any, inputs: dict[str, Tensor], labels: Tensor, count: int
) -> Tensor:
    """Each sample's mean loss `[n]` over its own labelled tokens; `count` pieces of positions.

    The number of pieces does not depend on the length, so a trace holds for all lengths.
    """
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    labels = labels[:, 1:]
    pieces = min(count, labels.shape[1])
    sums = [
        remat(_token_sums)(model.get_output_embeddings(), h, y)
        for h, y in zip(
            hidden.tensor_split(pieces, dim=1), labels.tensor_split(pieces, dim=1), strict=True
        )
    ]
    return sum(sums[1:], sums[0]) / (labels != IGNORED).sum(1)


def _token_sums(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    return token_losses(head(hidden), labels).sum(1)


def check_head(model: Any, count: object) -> None:
    """Raise unless logits can be computed in `count` pieces."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise OptionError(f"logit_chunks must be a positive integer or None; got {count!r}.")
    head, body = model.get_output_embeddings(), model.base_model
    if head is not None and body is not model and _plain(model, body, head):
        return
    raise OptionError(
        f"logit_chunks: the logits of {type(model).__name__} are not what its output embeddings "
        "make of its last hidden state (there may be a scale or a soft cap), so they cannot be "
        "computed in pieces here. Leave logit_chunks out, or write the loss for gf.from_module "
        "with gf.remat around the head."
    )


@torch.no_grad()
def _plain(model: Any, body: Any, head: Any) -> bool:
    """Whether the head alone makes the model's logits of the body's last hidden state."""
    seen: list[tuple[Tensor, Tensor]] = []

    def amplify(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        out = out * (1000 / out.abs().max())  # so large that no cap lets it pass as it is
        seen.append((inputs[0], out))
        return out

    rows, device = model.get_input_embeddings().weight.shape[0], head.weight.device
    ids = torch.arange(min(rows, 8), device=device)[None]
    handle = head.register_forward_hook(amplify)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same dropout in both
            logits = model(input_ids=ids, use_cache=False).logits
            torch.manual_seed(0)
            hidden = body(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        handle.remove()
    if len(seen) != 1:
        return False
    head_input, head_output = seen[0]
    return torch.equal(hidden, head_input) and torch.equal(
        logits.to(head_output.dtype), head_output
    )
