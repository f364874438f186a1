"""What `fully_shard` can do and ghostfunc cannot is refused by name; one process, a mesh of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ghostfunc as gf


@pytest.fixture
def group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def mesh(*shape: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    names = ("replicate", "shard")[-len(shape) :]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def loss(module: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = module(batch).square().sum(1)
    return out


@pytest.mark.usefixtures("group")
def test_one_process_is_a_group_too() -> None:
    from torch.distributed.fsdp import fully_shard

    whole, whole_params = gf.from_module(net(), loss)
    module = net()
    fully_shard(module[0], mesh=mesh(1))
    fully_shard(module, mesh=mesh(1))
    model_fn, params = gf.from_module(module, loss)
    batch = torch.randn(5, 4, dtype=torch.float64)
    expected = gf.ghost_norm(whole, whole_params, batch)
    torch.testing.assert_close(gf.ghost_norm(model_fn, params, batch), expected)


@pytest.mark.usefixtures("group")
def test_the_module_is_left_as_it_was() -> None:
    """Its own forward and backward pass, hooks and all, go on as before, in between too."""
    from torch.distributed.fsdp import fully_shard

    module, plain = net(), net()
    fully_shard(module[0], mesh=mesh(1))
    fully_shard(module, mesh=mesh(1))
    batch = torch.randn(5, 4, dtype=torch.float64)
    loss(plain, batch).mean().backward()
    model_fn, params = gf.from_module(module, loss)
    for _ in range(2):
        gf.ghost_norm(model_fn, params, batch)
        assert "forward" not in vars(module[0])
        module.zero_grad()
        loss(module, batch).mean().backward()
        for p, q in zip(module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad)


@pytest.mark.usefixtures("group")
def test_mixed_precision_is_refused() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    module = fully_shard(
        net(), mesh=mesh(1), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    )
    with pytest.raises(gf.ParamsError, match=r"MixedPrecisionPolicy\(param_dtype=torch.bfloat16"):
        gf.from_module(module, loss)


@pytest.mark.usefixtures("group")
def test_offloading_is_refused() -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    module = fully_shard(net(), mesh=mesh(1), offload_policy=CPUOffloadPolicy(pin_memory=False))
    with pytest.raises(gf.ParamsError, match="CPUOffloadPolicy"):
        gf.from_module(module, loss)


@pytest.mark.usefixtures("group")
def test_a_part_that_is_not_sharded_is_refused() -> None:
    from torch.distributed.fsdp import fully_shard

    module = net()
    fully_shard(module[0], mesh=mesh(1))
    with pytest.raises(gf.ParamsError, match=r"'2\.weight' .* is an ordinary parameter"):
        gf.from_module(module, loss)


@pytest.mark.usefixtures("group")
def test_options_that_are_not_for_sharded_modules() -> None:
    from torch.distributed.fsdp import fully_shard

    module = fully_shard(net(), mesh=mesh(1))
    model_fn, params = gf.from_module(module, loss)
    x = torch.randn(5, 4, dtype=torch.float64)
    calls = {
        'mode="materialized"|mode=': lambda: gf.ghost_norm(
            model_fn, params, x, mode="materialized"
        ),
        "reduction=": lambda: gf.ghost_dot_prod(model_fn, params, x, x, reduction="none"),
        "per_position": lambda: gf.ghost_dot_prod(model_fn, params, x, x, per_position=True),
        "leave out group": lambda: gf.ghost_dot_prod(
            model_fn, params, x, x, group=torch.distributed.group.WORLD
        ),
        "gf.explain": lambda: gf.explain(model_fn, params, x, quantity="norm"),
        "gf.curvature": lambda: gf.curvature.ekfac(model_fn, params, [x], fisher="empirical"),
        "one rank's samples": lambda: gf.ghost_dot_prod(
            model_fn, params, x, direction=gf.factored_grads(model_fn, params, x)
        ),
        "order=2": lambda: gf.shapley.step(
            model_fn, params, x, {"val": x}, optimizer=gf.shapley.sgd(lr=0.1), order=2
        ),
        "mix the gradient's places": lambda: gf.shapley.step(
            model_fn,
            params,
            x,
            {"val": x},
            optimizer=gf.shapley.clipped(gf.shapley.sgd(lr=0.1), max_norm=1.0),
        ),
    }
    for said, call in calls.items():
        with pytest.raises(gf.OptionError, match=said):
            call()
