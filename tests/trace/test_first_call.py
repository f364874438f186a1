"""Runs of the model in a first call, counted by the number of samples."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from problems import energy, features, weights
from torch import Tensor

import ghostfunc as gf

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def passes() -> Iterator[ModuleType]:
    """The script that counts."""
    pytest.importorskip("transformers")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield __import__("passes")
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in ("passes", "calls", "shapes", "in_docs"):
            sys.modules.pop(name, None)


def test_the_table_is_that_of_today(passes: ModuleType) -> None:
    """`python benchmarks/passes.py --record` writes it."""
    assert passes.table() == passes.IN_DOCS.recorded()


def test_few_runs_of_few_samples(passes: ModuleType) -> None:
    """Six at most; one run of the batch; two passes of the proof over it."""
    for name, ask in passes.functions().items():
        found = passes.first_call(ask)
        assert len(found.few) <= 6, name
        assert len(found.batch) == 1, name
        assert sum(found.proof) == 2 * found.batch[0], name
        assert found.warm == found.batch, name


def linear(p: Any, x: Tensor) -> Tensor:
    return energy(x @ p["w"])


@pytest.mark.parametrize(
    ("n", "m", "cold", "other_shape"),
    [
        # pair, copies, tracing, uses; batch; proof
        (8, 1, [2, 2, 2, 3, 3, 2, 9, 9, 1, 2, 2, 2, 2], [10, 10, 1, 2, 2, 2, 3]),
        (8, 2, [2, 2, 2, 3, 3, 2, 10, 10, 2, 2, 2, 2, 2], [11, 11, 2, 2, 2, 2, 3]),
    ],
)
def test_a_small_model(n: int, m: int, cold: list[int], other_shape: list[int]) -> None:
    runs: list[int] = []

    def model_fn(p: Any, x: Tensor) -> Tensor:
        runs.append(x.shape[0])
        return linear(p, x)

    params = weights(w=(4, 3))

    def during(n: int) -> list[int]:
        runs.clear()
        x = features(4)(n + m, 1, torch.Generator().manual_seed(0))
        gf.ghost_dot_prod(model_fn, params, x[:n], x[n:])
        return list(runs)

    assert during(n) == cold
    assert during(n) == [n + m]
    assert during(n + 1) == other_shape
    assert during(n + 1) == [n + 1 + m]


def test_without_a_proof_the_batch_is_looked_at_once() -> None:
    """In the whole and in parts, for samples that depend on each other."""
    runs: list[int] = []

    def model_fn(p: Any, x: Tensor) -> Tensor:
        runs.append(x.shape[0])
        return linear(p, x)

    params, x = weights(w=(4, 3)), features(4)(8, 1, torch.Generator().manual_seed(0))
    gf.ghost_norm(model_fn, params, x, check="never")
    assert runs == [2, 2, 2, 3, 3, 8, 2, 2, 2, 8, 3, 2, 2, 2, 2]
    runs.clear()
    gf.ghost_norm(model_fn, params, x, check="never")
    assert runs == [8]


@pytest.mark.parametrize("check", ["new", "never"])
def test_samples_that_depend_on_each_other_in_large_batches_alone(check: Any) -> None:
    """Neither two samples nor three show it."""

    def model_fn(p: Any, x: Tensor) -> Tensor:
        own = linear(p, x)
        return own * own.detach().mean() if len(x) > 3 else own

    params, x = weights(w=(4, 3)), features(4)(8, 1, torch.Generator().manual_seed(0))
    with pytest.raises(gf.GhostError, match="depend"):
        gf.ghost_norm(model_fn, params, x, check=check)


@pytest.mark.parametrize("check", ["new", "never"])
def test_a_validation_sample_that_is_another_by_itself(check: Any) -> None:
    """A program that treats a batch of one in its own way has samples that depend on others."""

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return linear(p, x) * (1 if len(x) > 1 else 2)

    params, x = weights(w=(4, 3)), features(4)(9, 1, torch.Generator().manual_seed(0))
    with pytest.raises(gf.CoupledSamplesError):
        gf.ghost_dot_prod(model_fn, params, x[:8], x[8:], check=check)
