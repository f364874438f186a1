"""Tensors that are given by keyword."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_quantity import GHOST, Case, assert_right, assert_right_or_refused
from problems import energy, sequences, weights
from torch import Generator, Tensor

import ghostfunc as gf

Model = Callable[[Any, Tensor], Tensor]

OF_SAMPLES: dict[str, Model] = {
    "cat": lambda p, x: torch.cat(tensors=[x @ p["w"], x], dim=-1),
    "stack": lambda p, x: torch.stack(tensors=[x @ p["w"], 2 * x @ p["w"]], dim=1),
    "softmax": lambda p, x: torch.softmax(input=x @ p["w"], dim=-1),
    "log_softmax": lambda p, x: F.log_softmax(input=x @ p["w"], dim=-1),
    "topk": lambda p, x: torch.topk(input=x @ p["w"], k=2, dim=-1)[0],
    "sort": lambda p, x: torch.sort(input=x @ p["w"], dim=-1)[0],
    "where": lambda p, x: torch.where(condition=x > 0, input=x, other=x.sin()) @ p["w"],
    "flatten": lambda p, x: torch.flatten(input=x @ p["w"], start_dim=1),
    "reshape": lambda p, x: torch.reshape(input=x @ p["w"], shape=(len(x), -1)),
    "cumsum": lambda p, x: torch.cumsum(input=x @ p["w"], dim=1),
    "transpose": lambda p, x: torch.transpose(input=x @ p["w"], dim0=1, dim1=2),
    "gather": lambda p, x: torch.gather(input=x, dim=-1, index=(x > 0).long()) @ p["w"],
    "masked_select": lambda p, x: (
        torch.masked_select(input=x, mask=torch.ones_like(x) > 0).view_as(x) @ p["w"]
    ),
}

OF_PARAMETERS: dict[str, Model] = {
    "cat": lambda p, x: x @ torch.cat(tensors=[p["w"], p["v"]], dim=1),
    "stack": lambda p, x: x @ torch.stack(tensors=[p["w"], p["v"]]).sum(0),
    "softmax": lambda p, x: x @ torch.softmax(input=p["w"], dim=0),
    "flatten": lambda p, x: torch.flatten(input=x, start_dim=1) @ torch.flatten(input=p["f"]),
    "where": lambda p, x: x @ torch.where(condition=p["w"] > 0, input=p["w"], other=p["v"]),
    "transpose": lambda p, x: F.linear(
        input=x, weight=torch.transpose(input=p["w"], dim0=0, dim1=1)
    ),
    "linear": lambda p, x: F.linear(input=x, weight=p["w"].t(), bias=p["s"]),
    "matmul": lambda p, x: torch.matmul(input=x, other=p["w"]),
    "add": lambda p, x: torch.add(input=x @ p["w"], other=p["s"], alpha=2),
    "mul": lambda p, x: torch.mul(input=p["s"], other=x @ p["w"]),
    "addmm": lambda p, x: torch.addmm(input=p["s"], mat1=x[:, 0], mat2=p["w"]),
    "layer_norm": lambda p, x: F.layer_norm(
        input=x @ p["w"], normalized_shape=(6,), weight=p["s"], bias=p["s"]
    ),
    "joined with samples": lambda p, x: torch.cat(
        tensors=[x @ p["w"], p["s"].expand(len(x), 1, -1)], dim=1
    ),
    "einsum": lambda p, x: torch.einsum("ntd,dp->ntp", x, p["w"]),
    "index_select": lambda p, x: x @ torch.index_select(
        input=p["w"], dim=1, index=torch.tensor([0, 0, 3])
    ),
    "sum": lambda p, x: x @ p["w"] + torch.sum(input=p["w"].square()),
}  # fmt: skip


def case_of(model: Model) -> Case:
    params = weights(w=(4, 6), v=(4, 6), s=(6,), f=(4, 3))
    draw = sequences(4)
    batches = (draw(n, 3, Generator().manual_seed(n)) for n in (4, 2))

    def energy_of(p: Any, x: Tensor) -> Tensor:
        out = model(p, x)
        return energy(out if out.ndim > 1 else out[:, None])

    return Case(energy_of, params, *batches)


@pytest.mark.parametrize("model", OF_SAMPLES.values(), ids=OF_SAMPLES)
def test_of_samples(model: Model) -> None:
    if model is OF_SAMPLES["masked_select"]:  # rows by value
        assert_right_or_refused(case_of(model), gf.SampleAxisError)
    else:
        assert_right(case_of(model), GHOST)


@pytest.mark.parametrize("model", OF_PARAMETERS.values(), ids=OF_PARAMETERS)
def test_of_parameters(model: Model) -> None:
    assert_right(case_of(model), GHOST)
