"""Recurrent layers and cells: their equivalent of elementary ops is exact, with every option."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from whole_modules import check_module

import ghostfunc as gf

OPS = {nn.LSTM: torch.lstm, nn.GRU: torch.gru, nn.RNN: torch.rnn_tanh}


def outputs(out: Tensor, states: Any, *, batch_first: bool) -> Tensor:
    """Everything a recurrent layer returns, samples first."""
    states = states if isinstance(states, tuple) else (states,)
    out = out if batch_first else out.transpose(0, 1)
    return torch.cat([out.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)


@given(
    st.sampled_from(list(OPS)),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2),
    st.integers(1, 4),
)
@settings(max_examples=20)
def test_layers(
    kind: Any, layers: int, bias: bool, batch_first: bool, both_ways: bool, proj: int, t: int
) -> None:
    options: dict[str, Any] = {"proj_size": proj} if kind is nn.LSTM else {}
    options |= {"bias": bias, "batch_first": batch_first, "bidirectional": both_ways}
    module = kind(3, 4, layers, **options)

    def run(module: nn.Module, x: Any) -> Tensor:
        y = x["x"] if batch_first else x["x"].transpose(0, 1)
        return outputs(*module(y), batch_first=batch_first)

    check_module(module, {"x": (t, 3)}, run, OPS[kind])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_initial_states_of_samples_and_of_parameters(kind: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(3, 4, batch_first=True)
            self.start = nn.Parameter(torch.randn(1, 1, 4))

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            learned = self.start.expand(-1, len(x), -1)
            given = h[None] * 1.0
            state = (learned, given) if kind is nn.LSTM else learned + given
            return outputs(*self.rnn(x, state), batch_first=True)

    check_module(Net(), {"x": (3, 3), "h": (4,)}, lambda m, x: m(x["x"], x["h"]), OPS[kind])


def test_relu_network_and_a_frozen_layer() -> None:
    relu = nn.RNN(3, 4, nonlinearity="relu", batch_first=True)
    check_module(relu, {"x": (3, 3)}, lambda m, x: m(x["x"])[0], torch.rnn_relu)

    net = nn.Sequential(nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)).double()
    net[0].requires_grad_(False)
    model_fn, params = gf.from_module(net, lambda m, x: m[1](m[0](x)[0]).sin().sum((1, 2)))
    x = torch.randn(3, 5, 3).double()
    grads = gf.per_sample_grads(model_fn, params, x, mode="ghost")
    expected = gf.per_sample_grads(model_fn, params, x, vectorize=False)
    assert set(grads) == {"1.weight", "1.bias"}
    assert all(torch.allclose(grads[k], expected[k]) for k in grads)


@pytest.mark.parametrize(
    ("kind", "op"),
    [
        (nn.LSTMCell, torch.lstm_cell),
        (nn.GRUCell, torch.gru_cell),
        (nn.RNNCell, torch.rnn_tanh_cell),
        (lambda d, h, b: nn.RNNCell(d, h, b, "relu"), torch.rnn_relu_cell),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_cells(kind: Any, op: Any, bias: bool) -> None:
    def run(cell: nn.Module, x: Any) -> Tensor:
        state = None
        for step in x["x"].unbind(1):
            state = cell(step, state)
        return torch.cat(state, 1) if isinstance(state, tuple) else state

    check_module(kind(3, 4, bias), {"x": (3, 3)}, run, op)


def test_dropout_between_layers_in_eval_mode() -> None:
    module = nn.LSTM(3, 4, 2, dropout=0.5, batch_first=True).eval()
    check_module(module, {"x": (3, 3)}, lambda m, x: m(x["x"])[0], torch.lstm)


def test_the_length_may_change_without_tracing_anew() -> None:
    """Every weight meets the samples once per layer and direction, not once per step."""
    module = nn.LSTM(3, 4, batch_first=True, bidirectional=True).double()
    calls = []

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        calls.append(x.shape[1])
        return m(x)[0].sin().sum((1, 2))

    model_fn, params = gf.from_module(module, loss)
    x = torch.randn(2, 8, 3).double()
    for t in (4, 6, 3, 6, 3):
        gf.per_sample_grads(model_fn, params, x[:, :t], mode="ghost")
    # Other lengths are other sequences of calls: that samples do not talk there is proved once.
    first, then = (calls[calls.index(t) :].count(t) for t in (6, 3))
    assert first == then
    before = len(calls)
    gf.per_sample_grads(model_fn, params, x[:, :6], mode="ghost")
    assert len(calls) == before + 1


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_packed_sequences_are_refused_and_the_way_out_works(kind: Any) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(3, 4, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(
                x, lengths, batch_first=True, enforce_sorted=False
            )
            states = self.rnn(packed)[1]
            return (states[0] if isinstance(states, tuple) else states)[0]

    module = Packed().double()
    model_fn, params = gf.from_module(module, lambda m, b: m(b["x"], b["lengths"]).sin().sum(1))
    batch = {"x": torch.randn(3, 5, 3).double(), "lengths": torch.tensor([2, 5, 3])}
    with pytest.raises(gf.UnsupportedOpError, match="packed sequence") as caught:
        gf.per_sample_grads(model_fn, params, batch, mode="ghost")
    assert "vectorize=False" in str(caught.value)
    grads = gf.per_sample_grads(model_fn, params, batch, vectorize=False)
    # The same, padded.
    rnn = module.rnn
    padded, _ = gf.from_module(
        module,
        lambda m, b: (
            (m.rnn(b["x"])[0].gather(1, (b["lengths"] - 1)[:, None, None].expand(-1, 1, 4))[:, 0])
            .sin()
            .sum(1)
        ),
    )
    ghost = gf.per_sample_grads(padded, params, batch, mode="ghost")
    assert isinstance(rnn, kind)
    assert all(torch.allclose(ghost[k], grads[k]) for k in grads)


def test_second_derivatives_through_the_states() -> None:
    """A transform around ghost mode differentiates what the recurrent weight sees, too."""
    module = nn.GRU(2, 3, batch_first=True).double()
    model_fn, params = gf.from_module(module, lambda m, x: m(x)[0].sin().sum((1, 2)))
    x = torch.randn(2, 3, 2).double()

    def dots(p: Any, mode: Any) -> Tensor:
        u = {k: torch.ones_like(v) for k, v in p.items()}
        return gf.ghost_dot_prod(model_fn, p, x, direction=u, mode=mode).sum()

    def exact(p: Any) -> Tensor:
        g = torch.func.grad(lambda q: model_fn(q, x).sum())(p)
        return sum(v.sum() for v in g.values())

    ours = torch.func.grad(lambda p: dots(p, "ghost"))(params)
    theirs = torch.func.grad(exact)(params)
    for k, g in theirs.items():
        assert torch.allclose(ours[k], g), k


def test_every_option_once() -> None:
    """A grid beside the random draws, so that no pair of options is left to chance."""
    for bias, both_ways, proj in itertools.product((False, True), (False, True), (0, 2)):
        module = nn.LSTM(2, 3, 2, bias, True, 0.0, both_ways, proj)
        check_module(module, {"x": (2, 2)}, lambda m, x: m(x["x"])[0], torch.lstm)
