"""Distributed tensors that nothing here understands are refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ghostfunc as gf


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A mesh of one process."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    from torch.distributed.device_mesh import init_device_mesh

    yield init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    torch.distributed.destroy_process_group()


def loss(module: nn.Module, batch: Any) -> Tensor:
    out: Tensor = module(batch["x"]).square().sum(1)
    return out


def test_a_tensor_parallel_module_is_refused_by_name(mesh: Any) -> None:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with pytest.raises(gf.ParamsError) as caught:
        gf.from_module(net, loss)
    said = str(caught.value)
    for word in ("'0.weight'", "DTensor", "(6, 4)", "(tp)", "parallelize_module", "full_tensor"):
        assert word in said, (word, said)


def test_a_frozen_distributed_parameter_is_refused_too(mesh: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    parallelize_module(net, mesh, {"0": ColwiseParallel(use_local_output=True)})
    net[0].requires_grad_(False)
    with pytest.raises(gf.ParamsError, match=r"'0\.weight' of Sequential is a DTensor"):
        gf.from_module(net, loss)


def test_params_and_batches_of_dtensors_are_refused(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    w, x = torch.randn(3, 4), torch.randn(5, 4)
    spread = distribute_tensor(w, mesh, [Replicate()])

    def model_fn(params: Any, batch: Any) -> Tensor:
        return (batch @ params["w"].mT).square().sum(1)

    with pytest.raises(gf.ParamsError, match=r"leaf 'w' is a DTensor of shape \(3, 4\)"):
        gf.ghost_norm(model_fn, {"w": spread}, x)
    with pytest.raises(gf.BatchError, match=r"DTensor of shape \(5, 4\)"):
        gf.ghost_norm(model_fn, {"w": w}, distribute_tensor(x, mesh, [Replicate()]))
