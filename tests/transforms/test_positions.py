"""Shares of positions add up to the score, and are what positions with weights of their own say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, leaves_of, random_direction
from problems import CASES, Problem, energy, next_token, sequences, tokens, weights
from torch import Tensor

import ghostfunc as gf
from ghostfunc import OptionError, PositionAxisError

HAVE_NONE = {
    # No axis of positions in the batch, or a length that is not free.
    "mlp", "dropout_in_eval_mode", "layer_called_three_times", "regulariser", "nested_batch",
    "layer_norm_over_two_axes", "matmul_per_head", "matmul_per_expert",
    "parameter_larger_than_the_samples",
    # Uses without positions, with two axes of them, or with fewer than others.
    "matmul_parameter_left", "learned_queries", "class_token", "class_token_time_first",
    "class_token_written_into_the_sequence", "relative_position_bias", "in_place_arithmetic",
}  # fmt: skip


def test_shares_add_up(problem: Problem, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["problem"]
    for n, t in ((3, 3), (2, 6), (1, 5)):
        train, val = problem.batch(n, t), problem.batch(2, 5, seed=1)
        u = gf.direction(problem.model_fn, problem.params, val)
        args = problem.model_fn, problem.params, train
        if name in HAVE_NONE:
            with pytest.raises(PositionAxisError):
                gf.ghost_dot_prod(*args, val, per_position=True)
            continue
        shares = gf.ghost_dot_prod(*args, val, per_position=True)
        assert shares.shape == (n, t)
        assert_close(shares.sum(1), gf.ghost_dot_prod(*args, val), problem.tolerance)
        us = {"u": u, "v": random_direction(u)}
        both = gf.ghost_dot_prod(*args, direction=us, per_position=True, per_param=True)
        for direction, each in zip(us.values(), both.values(), strict=True):
            exact = gf.ghost_dot_prod(*args, direction=direction, per_param=True)
            assert_close([x.sum(1) for x in leaves_of(each)], exact, problem.tolerance)
        assert_close(sum(leaves_of(both["u"])), shares, problem.tolerance)


# --- weights of their own -----------------------------------------------------------------------

VOCABULARY, WIDTH = 7, 5
SHAPES = {
    "e": (VOCABULARY, WIDTH), "positions": (8, WIDTH), "w": (WIDTH, WIDTH), "b": (WIDTH,),
    "scale": (WIDTH,), "shift": (WIDTH,), "q": (3 * WIDTH, WIDTH), "gain": (),
}  # fmt: skip


def attend(qkv: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*qkv.chunk(3, -1), is_causal=True)


def lm(p: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Embedding (tied with the head), position table, packed attention, layer norm, linear."""
    x = F.embedding(ids, p["e"]) + p["positions"][: ids.shape[1]]
    x = x + attend(F.linear(x, p["q"]))
    x = F.layer_norm(x, (WIDTH,), p["scale"], p["shift"]) * p["gain"]
    return next_token(torch.tanh(F.linear(x, p["w"], p["b"])) @ p["e"].t(), ids)


def lm_of_positions(p: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The same for one sample `[t]`, every parameter with a leading axis of positions."""
    t = torch.arange(len(ids))
    x = p["e"][t, ids] + p["positions"][t, t]
    x = x + attend(torch.einsum("td,tpd->tp", x, p["q"]))
    x = F.layer_norm(x, (WIDTH,)) * p["scale"] + p["shift"]
    x = torch.tanh(torch.einsum("td,tpd->tp", x * p["gain"][:, None], p["w"]) + p["b"])
    return next_token(torch.einsum("td,tvd->tv", x, p["e"])[None], ids[None])[0]


def conv(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return energy(torch.tanh(F.conv1d(x.mT, p["k"], p["b"], padding=1)).mT @ p["v"])


def conv_of_positions(p: dict[str, Tensor], x: Tensor) -> Tensor:
    windows = F.pad(x, (0, 0, 1, 1)).unfold(0, 3, 1)  # [t, d, 3]
    y = torch.tanh(torch.einsum("tdk,tpdk->tp", windows, p["k"]) + p["b"])
    return energy(torch.einsum("tp,tpv->tv", y, p["v"])[None])[0]


CONV = {"k": (3, 4, 3), "b": (3,), "v": (3, 2)}


@pytest.mark.parametrize(
    ("model_fn", "copied", "shapes", "draw"),
    [
        (lm, lm_of_positions, SHAPES, tokens(VOCABULARY)),
        (conv, conv_of_positions, CONV, sequences(4)),
    ],
    ids=["lm", "conv"],
)
def test_shares_are_those_of_copies(
    model_fn: Any, copied: Callable[..., Tensor], shapes: dict[str, Any], draw: Any
) -> None:
    """Give every position a copy of the parameters: its share is the copy's dot product."""
    params = weights(**shapes)
    batch = draw(3, 6, torch.Generator().manual_seed(0))
    u = random_direction(params)
    copies = {k: x.expand(6, *x.shape) for k, x in params.items()}
    torch.testing.assert_close(
        model_fn(params, batch), torch.stack([copied(copies, sample) for sample in batch])
    )
    got = gf.ghost_dot_prod(model_fn, params, batch, direction=u, per_position=True, per_param=True)
    for i, sample in enumerate(batch):
        grads = torch.func.grad(copied)(copies, sample)
        expected = {
            k: (g * u[k]).flatten(1).sum(1) if g.ndim > 1 else g * u[k] for k, g in grads.items()
        }
        assert_close({k: x[i] for k, x in got.items()}, expected, 1e-10)


def test_a_causal_language_model() -> None:
    """The last token predicts nothing and nothing follows it: it has no share."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=16,
        n_head=2,
        vocab_size=13,
        n_positions=12,
        bos_token_id=0,
        eos_token_id=0,
    )
    model_fn, params = gf.hf.causal_lm(transformers.GPT2LMHeadModel(config).double().eval())
    g = torch.Generator().manual_seed(0)
    train = {"input_ids": torch.randint(13, (4, 9), generator=g)}
    val = {"input_ids": torch.randint(13, (2, 12), generator=g)}
    for _ in range(2):  # 9 positions, then 5
        shares = gf.ghost_dot_prod(model_fn, params, train, val, per_position=True)
        assert shares.shape == train["input_ids"].shape
        assert_close(shares.sum(1), gf.ghost_dot_prod(model_fn, params, train, val), 1e-10)
        assert float(shares[:, -1].abs().max()) <= 1e-14 * float(shares.abs().max())
        assert bool((shares[:, :-1] != 0).all())
        train = {"input_ids": train["input_ids"][:, :5]}


@pytest.mark.parametrize("case", ["nanogpt", "tied_lm", "rms_norm"])
def test_what_is_proved_of_a_shape_holds_for_its_shares(case: str) -> None:
    """Shares are read on the way of scores: of gradients that are proved, only two samples' shares
    are compared; scores of a shape whose shares were asked for first cost no more."""
    problem = CASES[case]()
    runs: list[int] = []

    def model_fn(p: Any, batch: Any) -> Tensor:
        runs.append(len(leaves_of(batch)[0]))
        return problem.model_fn(p, batch)

    u = random_direction(problem.params)
    n = 6

    def passes(length: int, **options: bool) -> list[int]:
        runs.clear()
        batch = problem.batch(n, length)
        gf.ghost_dot_prod(model_fn, problem.params, batch, direction=u, **options)
        return sorted(runs)

    passes(7)  # traces
    assert passes(5).count(n) == 2  # a run, and the one that is held against plain autograd
    assert passes(5, per_position=True) == [2, 2, 2, n]  # two tell where positions lie
    assert passes(5, per_position=True) == [n]
    passes(4, per_position=True)
    assert passes(4) == [2, n]


def test_shares_can_be_differentiated() -> None:
    params, batch = weights(**CONV), sequences(4)(2, 5, torch.Generator().manual_seed(0))
    u = random_direction(params)

    def second(p: Any, **options: bool) -> Tensor:
        return gf.ghost_dot_prod(conv, p, batch, direction=u, **options).sum()

    shares = torch.func.grad(lambda p: second(p, per_position=True))(params)
    assert_close(shares, torch.func.grad(second)(params), 1e-10)


def test_chunks() -> None:
    problem = CASES["nanogpt"]()
    args = problem.model_fn, problem.params, problem.batch(5, 4)
    val = {k: problem.batch(k, 5, seed=k) for k in (1, 3)}
    for options in ({}, {"per_param": True}):
        whole = gf.ghost_dot_prod(*args, val, per_position=True, **options)
        chunked = gf.ghost_dot_prod(*args, val, per_position=True, chunk_size=2, **options)
        assert_close(chunked, whole, 1e-10)


# --- where there are none -----------------------------------------------------------------------


def pooled(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return energy(torch.tanh(x @ p["w"]).mean(1) @ p["v"])


def penalised(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return energy(x @ p["w"]) + p["w"].square().sum()


def shifted(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return energy(torch.tanh(x @ p["w"])[:, :-1] @ p["v"])


def pairs(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return energy(x @ x.mT * p["s"])


def fixed(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return energy(torch.einsum("ntd,td->n", x, p["table"])[:, None])


P = weights(w=(4, 4), v=(4, 2), s=(), table=(4, 4))


@pytest.mark.parametrize(
    ("model_fn", "names", "message"),
    [
        (pooled, "wv", r"matmul.* on 'v': .*no axis of its output got shorter \(\[2, 2\]"),
        (penalised, "w", "no axis of its output got shorter"),
        (shifted, "wv", "unequal numbers of positions .4 at .*'w'; 3 at .*'v'"),
        (pairs, "s", "several axes of its output got shorter"),
    ],
    ids=["pooled", "penalised", "shifted", "pairs"],
)
def test_uses_without_positions(model_fn: Any, names: str, message: str) -> None:
    x = sequences(4)(2, 4, torch.Generator().manual_seed(0))
    with pytest.raises(PositionAxisError, match=message):
        gf.ghost_dot_prod(model_fn, {k: P[k] for k in names}, x, x, per_position=True)


def test_samples_that_cannot_be_shorter() -> None:
    x = sequences(4)(2, 4, torch.Generator().manual_seed(0))
    with pytest.raises(PositionAxisError, match=r"4 to 3\). That failed"):
        gf.ghost_dot_prod(fixed, {"table": P["table"]}, x, x, per_position=True)
    mlp = CASES["mlp"]()
    with pytest.raises(PositionAxisError, match="failed"):
        gf.ghost_dot_prod(mlp.model_fn, mlp.params, mlp.batch(2), mlp.batch(2), per_position=True)
    uneven = CASES["nested_batch"]()
    batch = uneven.batch(2, 5)
    with pytest.raises(PositionAxisError, match="the same number"):
        gf.ghost_dot_prod(uneven.model_fn, uneven.params, batch, batch, per_position=True)


def test_regions_that_are_run_again() -> None:
    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return energy(gf.remat(lambda x: torch.tanh(x @ p["w"]))(x) @ p["v"])

    x = sequences(4)(2, 4, torch.Generator().manual_seed(0))
    params = {k: P[k] for k in "wv"}
    gf.ghost_dot_prod(model_fn, params, x, x)
    with pytest.raises(PositionAxisError, match=r"regions under gf\.remat"):
        gf.ghost_dot_prod(model_fn, params, x, x, per_position=True)


@pytest.mark.parametrize(
    "options", [{"mode": "jvp"}, {"reduction": "none"}, {"normalize": True}], ids=str
)
def test_options_that_have_no_shares(options: dict[str, Any]) -> None:
    x = sequences(4)(2, 4, torch.Generator().manual_seed(0))
    with pytest.raises(OptionError, match="per_position=True needs"):
        gf.ghost_dot_prod(pooled, P, x, x, per_position=True, **options)
