"""A wrapped module is never trained without the exchange that its wrapper makes."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

import ghostfunc as gf


class Distributed(nn.Module):
    """Holds a module as `DistributedDataParallel` does; that one itself needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


def wrapper(name: str, base: type = Distributed) -> type:
    return type(name, (base,), {})


def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return module(batch).square().sum(-1)


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("DistributedDataParallel", r"from_module\(ddp\.module, loss\).*group=ddp\.process_group"),
        ("DataParallel", r"wrapped\.module"),
        ("FullyShardedDataParallel", r"fully_shard \(FSDP2\)"),
        ("DeepSpeedEngine", r"engine\.module, loss\), at stage 0 alone"),
    ],
)
def test_wrappers_are_refused_by_name(name: str, way_out: str) -> None:
    cls = wrapper(name)
    with pytest.raises(gf.ParamsError, match=f"(?s)from_module got a {name}: .*{way_out}"):
        gf.from_module(cls(nn.Linear(3, 2)), loss)
    with pytest.raises(gf.ParamsError, match=f"(?s)'1' in Sequential is a {name}: .*{way_out}"):
        gf.from_module(nn.Sequential(nn.Linear(3, 3), cls(nn.Linear(3, 2))), loss)
    with pytest.raises(gf.ParamsError, match=name):  # megatron and others derive from it
        gf.from_module(wrapper("Mine", cls)(nn.Linear(3, 2)), loss)


def test_data_parallel_itself_is_refused() -> None:
    with pytest.raises(gf.ParamsError, match="from_module got a DataParallel"):
        gf.from_module(nn.DataParallel(nn.Linear(3, 2)), loss)


def test_replicated_modules_are_refused() -> None:
    """`replicate(module)` has the module itself be of another class."""
    replicate = importlib.import_module("torch.distributed._composable.replicate")
    module = nn.Linear(3, 2)
    module.__class__ = type("DDPLinear", (replicate.DDP, nn.Linear), {})
    with pytest.raises(gf.ParamsError, match=r"(?s)replicate\.DDP: .*before replicate\(module\)"):
        gf.from_module(module, loss)


def test_other_modules_that_hold_one_are_not() -> None:
    model_fn, params = gf.from_module(Distributed(nn.Linear(3, 2)), loss)
    assert gf.ghost_norm(model_fn, params, torch.ones(4, 3)).shape == (4,)


def test_group_needs_torch_distributed() -> None:
    model_fn, params = gf.from_module(nn.Linear(3, 2), loss)
    x = torch.ones(4, 3)
    with pytest.raises(gf.OptionError, match=r"Start the program with torchrun"):
        gf.ghost_value_and_grad(model_fn, params, x, x, group=object())
    with pytest.raises(gf.OptionError, match=r"gather got a group, and torch\.distributed is not"):
        gf.distributed.gather(x, group=object())
