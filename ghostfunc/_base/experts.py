"""Routed experts of transformers, run so that every row stays with its sample.

transformers sorts the rows of all samples by expert (`"grouped_mm"`), or gathers those of one
expert after the other (`"eager"`): what lies where depends on the router. Here the rows stay in
their order, and one op takes each to its expert:

    routed(x, W, ids):  y_rj = W[ids_rj] x_rj     x [N, k, d], W [E, p, d], ids [N, k] -> [N, k, p]

The router's choice is an argument of that op, read anew in every run. What a layer computes is held
against its own `forward` when a model function calls it for the first time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import UnsupportedOpError
from ghostfunc._base.methods import Override, override
from ghostfunc._base.torch_private import in_transform, without_torch_functions

_MARKS = {
    "config", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated",
    "_is_expert_parallel",
}  # fmt: skip
"""What `transformers.integrations.use_experts_implementation` gives a layer of experts."""

_RUN_HERE = ("eager", "grouped_mm", None)
"""The implementations that reorder rows, by name; None is "eager"."""

_AGREE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Relative to the largest output, what two orders of summation may differ by; else 0.1."""


def static() -> bool:
    """Whether no size may depend on values."""
    return torch.compiler.is_compiling() or in_transform()


def routed(x: Tensor, weight: Tensor, ids: Tensor, transposed: bool = False) -> Tensor:
    """Each row times the matrix of its expert: `[N, k, d]`, `[E, p, d]`, `[N, k]` -> `[N, k, p]`.
    Matrices may be `transposed`, `[E, d, p]`."""
    if has_torch_function((x, weight, ids)):
        seen: Tensor = handle_torch_function(
            routed, (x, weight, ids), x, weight, ids, transposed=transposed
        )
        return seen
    matrices = weight if transposed else weight.mT
    rows, own = x.flatten(0, 1), ids.flatten()
    if static():
        return (rows[:, None] @ matrices[own]).view(*ids.shape, -1)
    order = own.argsort()
    chosen = rows[order].split(own.bincount(minlength=len(weight)).tolist())
    pairs = zip(chosen, matrices.unbind(), strict=True)
    by_expert = torch.cat([some @ matrix for some, matrix in pairs if len(some)])
    return by_expert[order.argsort()].unflatten(0, ids.shape)


def layers_of_experts(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those that are layers of experts."""
    return [m for m in modules if vars(m).keys() >= _MARKS]


def _is_routed(layer: nn.Module) -> bool:
    """Whether a layer of experts sorts or gathers rows, as it is configured now."""
    own = vars(layer)
    if "forward" in own or own["_is_expert_parallel"]:
        return False
    return own["config"]._experts_implementation in _RUN_HERE


def rows_in_order(layers: Iterable[nn.Module], known: set[nn.Module]) -> list[Override]:
    """Methods of `layers_of_experts` that leave rows where they are. Those that are not `known` yet
    are held against their own `forward` when they are called."""
    routed = filter(_is_routed, layers)
    return [override(layer, "forward", _forward, layer, known) for layer in routed]


def _forward(
    layer: Any,
    known: set[nn.Module],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """The forward pass of a layer of experts."""
    out = _in_order(layer, hidden_states, top_k_index, top_k_weights)
    if layer not in known and not static():
        with without_torch_functions(), torch.no_grad():
            _compare(layer, out, hidden_states, top_k_index, top_k_weights)
        known.add(layer)
    return out


def _compare(layer: Any, out: Tensor, *given: Tensor) -> None:
    """Raise unless the layer's own `forward` says the same."""
    wanted = wide(type(layer).forward.__wrapped__(layer, *given))
    error = float((wide(out) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9))
    if not error <= _AGREE.get(out.dtype, 0.1):
        raise UnsupportedOpError(
            f"{type(layer).__name__} is not what its attributes say (has_gate, has_bias, "
            f"is_transposed, has_post_expert_norm): outputs differ by {error:.1g} of the "
            'largest. model.set_experts_implementation("batched_mm") runs the layer as it is; '
            'mode="materialized" with vectorize=False then says whether that is right.'
        )


def _in_order(layer: Any, x: Tensor, ids: Tensor, top_k_weights: Tensor) -> Tensor:
    """As `batched_mm` of transformers, each expert's matrices in one piece."""
    y = x[:, None].expand(-1, ids.shape[1], -1)
    up = "gate_up_proj" if layer.has_gate else "up_proj"
    for name in (up, "down_proj"):
        y = routed(y, getattr(layer, name), ids, transposed=layer.is_transposed)
        if layer.has_bias:
            y = y + getattr(layer, f"{name}_bias")[ids]
        if name == up:
            gate = layer._apply_gate if layer.has_gate else layer.act_fn
            y = gate(y.flatten(0, 1)).unflatten(0, ids.shape)
    if layer.has_post_expert_norm:
        y = layer.post_expert_norm(y)
    return (y * top_k_weights[..., None]).sum(1).to(x.dtype)
