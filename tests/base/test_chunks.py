"""`chunk_size` changes no number, and bounds what is alive at one time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, random_direction
from problems import CASES, Problem, energy, sequences, weights
from torch import Tensor

import ghostfunc as gf
from benchmarks.live_bytes import LiveBytes

DOTS = [
    (name, partial(fn, mode=mode, reduction=reduction, per_param=per_param))
    for name, fn, modes in (
        ("dot_prod", gf.ghost_dot_prod, ("ghost", "jvp", "materialized")),
        ("value_and_grad", gf.ghost_value_and_grad, ("ghost", "jvp")),
        ("cosine", gf.ghost_cosine, ("ghost", "materialized")),
    )
    for mode in modes
    for reduction in ("mean", "sum", "none")
    for per_param in ((True, False) if mode == "ghost" else (True,))
]


def along(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda f, p, train, val, **more: fn(
        f, p, train, direction=random_direction(p), **options, **more
    )


def project(mode: str) -> Callable[..., Any]:
    def call(f: Any, p: Any, train: Any, val: Any, **options: Any) -> Any:
        projection = gf.kronecker_projection(p, rank_total=4, rank_min=2, kind="gaussian", seed=0)
        return gf.ghost_project(f, p, train, projection, mode=mode, **options)

    return call


def several(f: Any, p: Any, train: Any, val: Any, **options: Any) -> Any:
    quantities = {"dot": gf.Dot(random_direction(p)), "norm": gf.SqNorm(), "g": gf.SampleGrad()}
    got = gf.ghost_vjp(f, p, train, quantities, grads=True, **options)
    return got.losses, got.values, got.grads


CALLS: dict[str, Callable[..., Any]] = {
    **{f"{name}-{'-'.join(map(str, fn.keywords.values()))}": fn for name, fn in DOTS},
    "dot_prod-along": along(gf.ghost_dot_prod),
    "dot_prod-along-materialized": along(gf.ghost_dot_prod, mode="materialized"),
    "value_and_grad-along": along(gf.ghost_value_and_grad, per_param=True),
    "cosine-along": along(gf.ghost_cosine, mode="materialized"),
    "norm": lambda f, p, train, val, **options: gf.ghost_norm(f, p, train, **options),
    "norm-per_param": lambda f, p, train, val, **options: gf.ghost_norm(
        f, p, train, per_param=True, mode="materialized", **options
    ),
    "project": project("ghost"),
    "project-materialized": project("materialized"),
    "several": several,
    "direction": lambda f, p, train, val, **options: gf.direction(f, p, val, **options),
    "direction-sum": lambda f, p, train, val, **options: gf.direction(
        f, p, val, reduction="sum", **options
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_no_number_changes(call: str) -> None:
    problem = CASES["tied_lm"]()
    train, val = problem.batch(7, 5), problem.batch(5, 6, seed=1)
    args = problem.model_fn, problem.params, train, val
    want = CALLS[call](*args)
    for chunk_size in (1, 3, 6, 7, 20):
        assert_close(CALLS[call](*args, chunk_size=chunk_size), want, 1e-10)


def test_gradients_keep_their_dtype() -> None:
    p = {"w": torch.randn(3, 4).bfloat16()}
    x = torch.randn(6, 4).bfloat16()
    grads = gf.ghost_value_and_grad(
        lambda p, x: F.linear(x, p["w"]).square().mean(1), p, x, direction=p, chunk_size=2
    ).grads
    assert grads["w"].dtype == torch.bfloat16


# --- memory -----------------------------------------------------------------------------------


def long_chain() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        for _ in range(6):
            x = torch.tanh(F.linear(x, p["w"]))
        return energy(x)

    return Problem(model_fn, weights(w=(8, 8)), sequences(8))


MEASURED = (
    "dot_prod-ghost-mean-False",
    "dot_prod-ghost-none-False",
    "dot_prod-materialized-mean-True",
    "value_and_grad-ghost-mean-False",
    "cosine-ghost-mean-False",
    "norm",
    "project",
    "direction",
)


@pytest.mark.parametrize("call", MEASURED)
def test_memory_is_that_of_a_chunk(call: str) -> None:
    problem = long_chain()

    def peak(n: int, chunk_size: int | None) -> int:
        train, val = problem.batch(n, 40), problem.batch(n, 40, seed=1)
        args = problem.model_fn, problem.params, train, val
        CALLS[call](*args, chunk_size=chunk_size)
        with LiveBytes() as memory:
            CALLS[call](*args, chunk_size=chunk_size)
        return memory.peak

    of_one = peak(4, None)
    assert peak(32, 4) < 1.3 * of_one
    assert peak(32, None) > 4 * of_one


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4"])
def test_bad_sizes_are_refused(value: Any) -> None:
    problem = CASES["mlp"]()
    train, val = problem.batch(4), problem.batch(2, seed=1)
    for call in ("dot_prod-ghost-mean-True", "cosine-along", "norm", "several", "direction"):
        with pytest.raises(gf.OptionError, match="chunk_size must be a positive integer"):
            CALLS[call](problem.model_fn, problem.params, train, val, chunk_size=value)


def test_pairs_of_samples_are_refused() -> None:
    problem = CASES["mlp"]()
    with pytest.raises(gf.OptionError, match=r"Gram pairs .* chunk_size of its own"):
        gf.ghost_vjp(problem.model_fn, problem.params, problem.batch(4), gf.Gram(), chunk_size=2)


def test_samples_are_counted_over_the_whole_batch() -> None:
    problem = CASES["mlp"]()
    x = problem.batch(6)
    x[4] = torch.nan
    with pytest.raises(
        gf.NonFiniteLossError, match=r"samples of batch from number 3 on.*losses\[1\] = nan"
    ):
        gf.ghost_norm(problem.model_fn, problem.params, x, chunk_size=3)
