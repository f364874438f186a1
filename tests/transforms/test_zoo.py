"""Every model of the zoo, parameter by parameter, against autograd one sample at a time."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from compare import assert_close, gram, sample_grads
from problems import Problem
from torch import Tensor, nn
from zoo import ZOO

import ghostfunc as gf

EXACT = [name for name, animal in ZOO.items() if not animal.ghost]
REFUSED = [name for name, animal in ZOO.items() if animal.ghost]


class Grown(NamedTuple):
    """A model with batches of different lengths, and the truth about them."""

    module: nn.Module
    model_fn: Any
    params: dict[str, Tensor]
    train: Any
    val: Any
    g: dict[str, Tensor]
    g_val: dict[str, Tensor]


@functools.cache
def grown(name: str) -> Grown:
    animal = ZOO[name]
    module, model_fn, params = animal.build()
    train, val = animal.draw(4, 7, 0), animal.draw(3, 9, 1)
    problem = Problem(model_fn, params, draw=lambda *_: None)
    g, g_val = (
        dict(zip(sorted(params), sample_grads(problem, batch), strict=True))
        for batch in (train, val)
    )
    return Grown(module, model_fn, params, train, val, g, g_val)


def first(batch: Any, m: int) -> Any:
    return {name: x[:m] for name, x in batch.items()}


def dots(x: Grown, m: int) -> dict[str, Tensor]:
    """`<g_i, mean of m>`, parameter by parameter."""
    val = [v[:m].mean(0, keepdim=True) for v in x.g_val.values()]
    table = gram(list(x.g.values()), val)
    return {name: row[:, 0] for name, row in zip(x.g, table, strict=True)}


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("name", EXACT)
def test_dot_products(name: str, m: int) -> None:
    x = grown(name)
    got = gf.ghost_dot_prod(x.model_fn, x.params, x.train, first(x.val, m), per_param=True)
    assert got.keys() == x.params.keys()
    # Parameters that hardly matter are rounding noise of the whole where parts run in float32.
    floor = 0.1 if ZOO[name].single else 1e-4
    assert_close(got, dots(x, m), ZOO[name].tolerance, floor=floor)


@pytest.mark.parametrize("name", EXACT)
def test_verify_runs_as_it_is_called_first(name: str) -> None:
    x = grown(name)
    report = gf.verify(x.model_fn, x.params, first(x.train, 2), first(x.val, 1), tolerance=1e-4)
    assert report.ok, report


@pytest.mark.parametrize("name", EXACT)
def test_gradients_and_norms(name: str) -> None:
    x, tolerance = grown(name), ZOO[name].tolerance
    floor = 0.1 if ZOO[name].single else 1e-4
    formed = gf.per_sample_grads(x.model_fn, x.params, x.train, mode="ghost")
    assert_close(formed, x.g, tolerance, floor=floor)
    norms = torch.stack([g.reshape(len(g), -1).square().sum(1) for g in x.g.values()]).sum(0).sqrt()
    assert_close(gf.ghost_norm(x.model_fn, x.params, x.train), norms, tolerance)


@pytest.mark.parametrize("name", ZOO)
def test_the_other_modes(name: str) -> None:
    x, animal = grown(name), ZOO[name]
    loop = gf.ghost_dot_prod(
        x.model_fn, x.params, x.train, x.val, mode="materialized", vectorize=False
    )
    total = sum(dots(x, 3).values())
    assert_close(loop, total, animal.tolerance)
    forward = gf.ghost_dot_prod(x.model_fn, x.params, x.train, x.val, mode="jvp")
    assert_close(forward, total, animal.tolerance)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_names_the_op_and_a_way_out(name: str) -> None:
    x, animal = grown(name), ZOO[name]
    with pytest.raises(gf.GhostError) as caught:
        gf.ghost_dot_prod(x.model_fn, x.params, x.train, x.val)
    said = str(caught.value)
    assert animal.ghost in said
    assert "vectorize=False" in said
    assert 'mode="jvp"' in said


@pytest.mark.parametrize("name", [name for name in ZOO if "LoRA" in name or "DoRA" in name])
def test_only_adapters_are_tracked(name: str) -> None:
    x = grown(name)
    base = {k: p for k, p in x.module.named_parameters() if "lora" not in k}
    before = {k: p.clone() for k, p in base.items()}
    step = gf.ghost_value_and_grad(x.model_fn, x.params, x.train, x.val)
    assert x.params
    assert all("lora" in k for k in x.params)
    mean = {k: g.mean(0) for k, g in x.g.items()}
    assert_close(step.grads, mean, ZOO[name].tolerance, floor=0.1)
    for k, p in base.items():
        assert torch.equal(p, before[k])
        assert p.grad is None
        assert not p.requires_grad


def test_the_table_lists_the_zoo() -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][2:]
    listed = {row[0].strip("| "): row for row in rows}
    assert list(listed) == list(ZOO)
    for name, animal in ZOO.items():
        assert listed[name][1].startswith("refused") == bool(animal.ghost), name
        assert not listed[name][2].startswith("no forward mode"), name
