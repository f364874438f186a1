"""How the parameters of a module lie on the ranks: read off what `fully_shard` (FSDP2) and tensor
parallel plans (`parallelize_module`) have made of them. What neither makes is refused by name.

A parameter is cut by the plan first, and what is left of it by `fully_shard`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ghostfunc._base.errors import ParamsError
from ghostfunc._base.processes.dtensors import described, is_dtensor
from ghostfunc._base.processes.in_step import InStep
from ghostfunc._base.processes.sharding import Sharding
from ghostfunc._base.processes.shards import Cut, Shards
from ghostfunc._base.torch_private import fsdp_meshes, fsdp_policies, is_fsdp_unit


@dataclass(frozen=True)
class _Placed:
    """A distributed parameter as it was found.

    Attributes:
        name: the parameter's.
        x: the `DTensor`.
        sharded: how many dimensions of its mesh are `fully_shard`'s, the first ones: none, one, or
            those of a hybrid mesh. One more, if there is one, is the plan's.
    """

    name: str
    x: Any
    sharded: int

    @property
    def mesh(self) -> Any:
        return self.x.device_mesh

    @property
    def planned(self) -> bool:
        """Whether a tensor parallel plan has placed it."""
        return bool(self.mesh.ndim > self.sharded)

    def plan(self) -> list[int]:
        """The ranks that the plan has placed it on."""
        return _members(self.mesh, self.mesh.ndim - 1) if self.planned else []

    def cuts(self) -> tuple[Cut, ...]:
        """From the whole to this rank's piece."""
        shape, out = tuple(self.x.shape), []
        placements = self.x.placements
        if self.planned and placements[-1].is_shard():
            dim = placements[-1].dim % len(shape)
            out.append(Cut(shape, dim, *_group(self.mesh, self.mesh.ndim - 1), summed=False))
            shape = out[-1].local_shape
        if self.sharded:
            last = self.sharded - 1
            copies = self.mesh.get_group(0) if last else None
            out.append(Cut(shape, placements[last].dim, *_group(self.mesh, last), copies=copies))
        return tuple(out)


def sharding_of(module: nn.Module, held: Sequence[tuple[str, Tensor]]) -> Sharding | None:
    """How a module's parameters are sharded; None where they are not.

    Raises:
        ParamsError: some tensors are distributed in another way.
    """
    units = any(is_fsdp_unit(part) for part in module.modules())
    if not units and not any(is_dtensor(x) for _, x in held):
        return None
    _refuse_policies(module)
    meshes = fsdp_meshes(module)
    placed: list[_Placed] = []
    whole: dict[str, Tensor] = {}
    first_name: dict[int, str] = {}
    for name, x in held:
        if first_name.setdefault(id(x), name) != name:
            continue
        if is_dtensor(x):
            placed.append(_placed(module, name, x, meshes, units=units))
        elif isinstance(x, nn.Parameter):  # a buffer is the same on all ranks
            whole[name] = x.detach()
    if not placed:
        return None
    if units and whole:
        raise ParamsError(
            f"{next(iter(whole))!r} of {type(module).__name__} is an ordinary parameter, and "
            "others are sharded: nobody sums its gradient over ranks. Call fully_shard on the "
            "whole module as well, without ignored_params."
        )
    largest = max(placed, key=lambda p: p.mesh.ndim)
    for p in placed:
        _refuse_other_mesh(module, p, largest)
    ranks = _ranks_of(largest.mesh)
    shapes = {p.name: (p.x.shape, p.cuts()) for p in placed}
    shapes |= {name: (x.shape, ()) for name, x in whole.items()}
    shards = {
        name: Shards(name, tuple(shape), cuts, ranks, whole=not cuts)
        for name, (shape, cuts) in shapes.items()
    }
    pieces = {p.name: p.x.detach().to_local() for p in placed} | whole
    return Sharding(ranks, _alike(largest), shards, pieces)


def _group(mesh: Any, dim: int) -> tuple[Any, int, int]:
    """The ranks along one dimension of a mesh, this one's place among them, and their number."""
    return mesh.get_group(dim), mesh.get_local_rank(dim), mesh.size(dim)


def _members(mesh: Any, dim: int) -> list[int]:
    members: list[int] = torch.distributed.get_process_group_ranks(mesh.get_group(dim))
    return members


def _ranks_of(mesh: Any) -> InStep:
    """All ranks of a mesh."""
    if mesh.ndim == 1:
        return InStep(mesh.get_group(0))
    members = sorted(mesh.mesh.flatten().tolist())
    return InStep(torch.distributed.new_group(members, use_local_synchronization=True))


def _alike(placed: _Placed) -> list[list[int]]:
    """The ranks of the mesh that have the same samples, by their places among all of them."""
    if not placed.planned:
        return []
    places = {rank: i for i, rank in enumerate(sorted(placed.mesh.mesh.flatten().tolist()))}
    rows = placed.mesh.mesh.flatten(0, -2) if placed.mesh.ndim > 1 else placed.mesh.mesh[None]
    return [[places[rank] for rank in row] for row in rows.tolist()]


def _placed(
    module: nn.Module, name: str, x: Any, meshes: dict[int, Any], *, units: bool
) -> _Placed:
    """A distributed parameter, if it is of a kind that is known."""
    mesh = meshes.get(id(x))
    sharded = 0 if mesh is None else mesh.ndim
    placements, found = x.placements, _Placed(name, x, sharded)
    known = x.device_mesh.ndim - sharded in (0, 1) and units == (sharded > 0)
    if known and sharded:
        copied = [p.is_replicate() for p in placements[:sharded]]
        known = copied == [True] * (sharded - 1) + [False]
        known &= all(_members(mesh, i) == _members(x.device_mesh, i) for i in range(sharded))
    if known and found.planned:
        known = placements[-1].is_replicate() or placements[-1].is_shard()
    if not known or sharded > 2:
        raise ParamsError(
            f"{name!r} of {type(module).__name__} is {described(x)}. Supported is what fully_shard "
            "makes of a module, on a mesh of one dimension or a hybrid one of two, and what "
            "parallelize_module makes of it on a mesh of one dimension; if both are used, "
            "fully_shard after it, and on the whole module as well. Of other distributed tensors a "
            "rank's part of a gradient is not the gradient. Give from_module the module before it "
            "is distributed, or with its parameters gathered (x.full_tensor())."
        )
    return found


def _refuse_other_mesh(module: nn.Module, p: _Placed, largest: _Placed) -> None:
    """Raise unless a parameter lies on the ranks of all others."""
    same = all(_members(p.mesh, i) == _members(largest.mesh, i) for i in range(p.sharded))
    if p.sharded == largest.sharded and p.plan() in ([], largest.plan()) and same:
        return
    raise ParamsError(
        f"{p.name!r} of {type(module).__name__} is {described(p.x)}, on another mesh than "
        f"{largest.name!r}, which is {described(largest.x)}. Shard all of the module over one mesh."
    )


def _refuse_policies(module: nn.Module) -> None:
    """Raise for policies by which FSDP2 computes with other tensors than the parameters."""
    for name, unit in module.named_modules():
        if not is_fsdp_unit(unit):
            continue
        policy, offloaded = fsdp_policies(unit)
        dtypes = {
            option: dtype
            for option, dtype in (
                ("param_dtype", policy.param_dtype),
                ("reduce_dtype", policy.reduce_dtype),
                ("output_dtype", policy.output_dtype),
            )
            if dtype is not None
        }
        where = f"{name or 'the module'!r} in {type(module).__name__}"
        if dtypes:
            listed = ", ".join(f"{option}={dtype}" for option, dtype in dtypes.items())
            raise ParamsError(
                f"{where} was sharded with MixedPrecisionPolicy({listed}), which is not supported: "
                "gradients would be those of another program. Shard it without mp_policy, and "
                "convert the module (module.to(torch.bfloat16)) or use torch.autocast in the loss."
            )
        if any(offloaded):
            raise ParamsError(
                f"{where} was sharded with CPUOffloadPolicy, which is not supported. Shard it "
                "without offload_policy."
            )
