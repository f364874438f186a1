"""Tensor parallel plans of one process; other distributed tensors are refused by name."""

from __future__ import annotations

import copy
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


def test_a_plan_of_one_process(mesh: Any) -> None:
    """Its hooks are put aside, and are back afterwards."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.LayerNorm(3)).double()
    net[3].requires_grad_(False)
    whole = gf.from_module(copy.deepcopy(net), loss)
    parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    model_fn, params = gf.from_module(net, loss)
    batch = {"x": torch.randn(5, 4, dtype=torch.float64)}
    before = loss(net, batch)
    torch.testing.assert_close(gf.ghost_norm(model_fn, params, batch), gf.ghost_norm(*whole, batch))
    assert torch.equal(loss(net, batch), before)
    assert not isinstance(params["0.weight"], torch.distributed.tensor.DTensor)


@pytest.mark.parametrize("kind", ["partial", "two dimensions", "fully_shard of a part"])
def test_other_distributed_parameters_are_refused_by_name(mesh: Any, kind: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    if kind == "partial":
        x = DTensor.from_local(torch.randn(6, 4), mesh, [Partial()])
        net[0].weight = nn.Parameter(x)
    elif kind == "two dimensions":
        two = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
        x = distribute_tensor(net[0].weight.detach(), two, [Replicate(), Shard(0)])
        net[0].weight = nn.Parameter(x)
    else:
        parallelize_module(net, mesh, {"0": ColwiseParallel()})
        fully_shard(net[1], mesh=init_device_mesh("cpu", (1,), mesh_dim_names=("dp",)))
    with pytest.raises(gf.ParamsError) as caught:
        gf.from_module(net, loss)
    said = str(caught.value)
    for word in ("'0.weight'", "DTensor", "(6, 4)", "tp", "parallelize_module", "full_tensor"):
        assert word in said, (word, said)


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
