"""Recurrent layers, by an equivalent of elementary ops: exact, and slower than the fused kernels.

What the recurrent weight `W` sees, the hidden states `H`, is known only after the recurrence, and
every step would be a use of its own. So the recurrence is run twice: once to know `H`, and once
on a constant `W`, to whose products the zeros `H W^T - H constant(W)^T` are added. Their cotangent
is that of all steps' products, in one use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostfunc._base.torch_private import in_transform
from ghostfunc._rules.registry import constant, register_decomposition

State: TypeAlias = tuple[Tensor, ...]
Gates: TypeAlias = Callable[[Tensor, Tensor, State], State]
"""From the input's and the state's share of the gates and the last state to the next one."""


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), h.chunk(3, -1)
    new = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return (new + (x_z + h_z).sigmoid() * (state[0] - new),)


def _tanh(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).tanh(),)


def _relu(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).relu(),)


class _Weights(NamedTuple):
    """Of one layer in one direction."""

    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None
    hidden_bias: Tensor | None
    projection: Tensor | None

    @classmethod
    def of(cls, params: Sequence[Tensor], has_biases: bool) -> _Weights:
        biases = params[2:4] if has_biases else (None, None)
        projection = params[-1] if len(params) > (4 if has_biases else 2) else None
        return cls(params[0], params[1], biases[0], biases[1], projection)

    def constants(self) -> _Weights:
        others = [w if w is None else constant(w) for w in self[2:]]
        return _Weights(constant(self.input), constant(self.hidden), *others)


def _direction(x: Tensor, state: State, weights: _Weights, gates: Gates) -> tuple[Tensor, State]:
    """One layer in one direction over `[t, n, d]`: all hidden states, and the last state."""
    held = weights.constants()
    shares = F.linear(x, weights.input, weights.input_bias).unbind()
    none: Sequence[Any] = (0,) * len(shares)
    with _values_only():
        before, inner, _ = _steps(shares, state, held, gates, none, none)
    zeros = _zeros(before, (weights.hidden, weights.hidden_bias), (held.hidden, held.hidden_bias))
    inner_zeros = none
    if weights.projection is not None:
        inner_zeros = _zeros(inner, (weights.projection,), (held.projection,))
    _, _, states = _steps(shares, state, held, gates, zeros, inner_zeros)
    return torch.stack([h for h, *_ in states]), states[-1]


def _steps(
    shares: Sequence[Tensor],
    state: State,
    weights: _Weights,
    gates: Gates,
    zeros: Sequence[Any],
    inner_zeros: Sequence[Any],
) -> tuple[list[Tensor], list[Tensor], list[State]]:
    """What the recurrent weight and the projection see at every step, and the states after it."""
    before, inner, states = [], [], []
    for share, zero, inner_zero in zip(shares, zeros, inner_zeros, strict=True):
        before.append(state[0])
        h = F.linear(state[0], weights.hidden, weights.hidden_bias) + zero
        state = gates(share, h, state)
        inner.append(state[0])
        if weights.projection is not None:
            state = (F.linear(state[0], weights.projection) + inner_zero, *state[1:])
        states.append(state)
    return before, inner, states


def _zeros(seen: Sequence[Tensor], weights: Sequence[Any], held: Sequence[Any]) -> Sequence[Tensor]:
    h = torch.stack(list(seen))
    return (F.linear(h, *weights) - F.linear(h, *held)).unbind()


def _values_only() -> AbstractContextManager[object]:
    """That the zeros depend on the states matters to second derivatives alone, which only a
    transform around us can take."""
    return nullcontext() if in_transform() else torch.no_grad()


def _network(
    gates: Gates,
    x: Tensor,
    states: State,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """All layers: the last one's hidden states, and the last states of all."""
    directions = 2 if bidirectional else 1
    per_cell = len(params) // (num_layers * directions)
    x = x.transpose(0, 1) if batch_first else x
    last: list[State] = []
    for layer in range(num_layers):
        outs = []
        for backwards in range(directions):
            cell = len(last)
            weights = _Weights.of(params[cell * per_cell :][:per_cell], has_biases)
            now = tuple(s[cell] for s in states)
            out, now = _direction(x.flip(0) if backwards else x, now, weights, gates)
            outs.append(out.flip(0) if backwards else out)
            last.append(now)
        x = torch.cat(outs, -1) if bidirectional else outs[0]
        if train and dropout and layer + 1 < num_layers:
            x = F.dropout(x, dropout, True)
    x = x.transpose(0, 1) if batch_first else x
    return (x, *(torch.stack(s) for s in zip(*last, strict=True)))


_PACKED = (
    "A packed sequence reorders samples and mixes their rows. Pass padded sequences and take each "
    "sample's own positions from the output"
)


@register_decomposition(torch.lstm, otherwise=_PACKED)
def lstm(x: Tensor, hx: Any, params: Any, has_biases: Any, *options: Any) -> Any:
    if isinstance(hx, Tensor):  # batch_sizes: the overload for packed sequences
        return NotImplemented
    return _network(_lstm, x, tuple(hx), params, has_biases, *options)


def _register_single_state(op: Callable[..., Any], gates: Gates) -> None:
    @register_decomposition(op, otherwise=_PACKED)
    def network(x: Tensor, hx: Tensor, params: Any, has_biases: Any, *options: Any) -> Any:
        if isinstance(params, Tensor):
            return NotImplemented
        return _network(gates, x, (hx,), params, has_biases, *options)


_register_single_state(torch.gru, _gru)
_register_single_state(torch.rnn_tanh, _tanh)
_register_single_state(torch.rnn_relu, _relu)


# --- cells: one step, the program's own loop -----------------------------------------------------


@register_decomposition(torch.lstm_cell)
def lstm_cell(
    x: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> State:
    return _lstm(F.linear(x, w_ih, b_ih), F.linear(hx[0], w_hh, b_hh), tuple(hx))


def _register_single_state_cell(op: Callable[..., Any], gates: Gates) -> None:
    @register_decomposition(op)
    def cell(
        x: Tensor,
        hx: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor:
        return gates(F.linear(x, w_ih, b_ih), F.linear(hx, w_hh, b_hh), (hx,))[0]


_register_single_state_cell(torch.gru_cell, _gru)
_register_single_state_cell(torch.rnn_tanh_cell, _tanh)
_register_single_state_cell(torch.rnn_relu_cell, _relu)
