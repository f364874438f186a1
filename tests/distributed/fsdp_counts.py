"""One rank that counts what a step moves and keeps, beside what FSDP2 itself does."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ghostfunc as gf
from ghostfunc._base.modes import DispatchMode

WIDTH, LAYERS, POSITIONS = 1024, 5, 4


class Moved(DispatchMode):
    """Counts the bytes that collectives make or take, tensors of a meeting by themselves.

    An all-gather counts its output, a reduce-scatter its input: the whole tensor. An all-reduce is
    both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.calls = 0
        self.meetings = 0

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func.namespace == "c10d":
            leaves = torch.utils._pytree.tree_leaves(args)
            sizes = [x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor)]
            floats = any(isinstance(x, Tensor) and x.is_floating_point() for x in leaves)
            if floats:
                self.bytes += max(sizes) * (2 if "allreduce" in str(func) else 1)
                self.calls += 1
            else:
                self.meetings += 1
        return func(*args, **kwargs)


class Alive(TorchDispatchMode):
    """The most bytes of tensors' memory that are alive at one time, of those made inside."""

    def __init__(self, before: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()
        for x in before:
            self._note(x)
        self.start = self.now

    def _note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self._note(x)
        return out


def loss(module: nn.Module, batch: Any) -> Tensor:
    out: Tensor = module(batch).square().mean((1, 2))
    return out


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)]
    return nn.Sequential(*layers)


def measured(call: Callable[[], Any], before: Sequence[Tensor]) -> dict[str, float]:
    moved = Moved()
    with moved:
        call()
    gc.collect()
    alive = Alive(before)
    with alive:
        call()
    return {
        "bytes": moved.bytes,
        "calls": moved.calls,
        "meetings": moved.meetings,
        "peak": alive.most - alive.start,
    }


def main() -> None:
    rank, world, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=world,
        timeout=timedelta(seconds=300),
    )  # fmt: skip
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    net = model()
    whole = sum(p.numel() * p.element_size() for p in net.parameters())
    for layer in net:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    model_fn, params = gf.from_module(net, loss)
    batch, val = torch.randn(2, POSITIONS, WIDTH), torch.randn(1, POSITIONS, WIDTH)
    # No samples of all ranks are to be computed on each, so many are those of the second.
    much = torch.randn(1 + 4 * rank, POSITIONS, WIDTH)
    longer = torch.randn(1, POSITIONS + 1, WIDTH)
    u = gf.direction(model_fn, params, val)
    held = [*params.values(), *u.values(), batch, val, much, longer]

    def scored() -> Any:
        return gf.ghost_value_and_grad(model_fn, params, batch, direction=u)

    def plain() -> Any:
        net.zero_grad()
        loss(net, batch).mean().backward()

    calls: dict[str, Callable[[], Any]] = {
        "ghost_value_and_grad with a direction": scored,
        "ghost_dot_prod with a direction": lambda: gf.ghost_dot_prod(
            model_fn, params, batch, direction=u
        ),
        "ghost_value_and_grad with val": lambda: gf.ghost_value_and_grad(
            model_fn, params, batch, val
        ),
        "ghost_dot_prod with val": lambda: gf.ghost_dot_prod(model_fn, params, batch, val),
        "ghost_value_and_grad with much val": lambda: gf.ghost_value_and_grad(
            model_fn, params, batch[:1], much
        ),
        "ghost_dot_prod with much val": lambda: gf.ghost_dot_prod(
            model_fn, params, batch[:1], much
        ),
        "ghost_value_and_grad with longer val": lambda: gf.ghost_value_and_grad(
            model_fn, params, batch, longer
        ),
        "ghost_norm": lambda: gf.ghost_norm(model_fn, params, batch),
        "direction": lambda: gf.direction(model_fn, params, val),
    }
    found: dict[str, Any] = {"model": whole, "unit": whole / LAYERS}
    for name, call in calls.items():
        call()  # traced and proved
        found[name] = measured(call, held)
    plain()
    found["FSDP2"] = measured(plain, held)
    (directory / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
