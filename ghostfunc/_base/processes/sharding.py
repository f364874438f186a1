"""Modules that `fully_shard` (FSDP2) has sharded, called with this rank's pieces.

FSDP2's own hooks would make parameters whole where torch functions do not see it. They are put
aside while `model_fn` runs. Instead a unit (a module that `fully_shard` was called with, and that
holds no other) is made whole when it is called; what lies outside of units is from the beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ghostfunc._base.errors import ParamsError, TransformError
from ghostfunc._base.processes.dtensors import described, is_dtensor
from ghostfunc._base.processes.in_step import InStep
from ghostfunc._base.processes.shards import Cut, Shards
from ghostfunc._base.processes.units import Unit
from ghostfunc._base.torch_private import fsdp_hooks, fsdp_policies, is_fsdp_unit

T = TypeVar("T")


@dataclass(frozen=True)
class Sharding:
    """How the parameters of a sharded module lie on the ranks; made by `sharding_of`.

    Attributes:
        ranks: that hold the pieces; `cut`: how they do.
        shards: of every parameter, frozen ones included, by its first name.
        pieces: the module's own pieces, by the same names.
        whole: the whole parameters that are frozen, where all ranks have all parameters whole.
    """

    ranks: InStep
    cut: Cut
    shards: Mapping[str, Shards]
    pieces: Mapping[str, Tensor]
    whole: Mapping[str, Tensor] | None = None

    def params(self, module: nn.Module) -> dict[str, Tensor]:
        """This rank's pieces of what is trained."""
        trained = (name for name, p in module.named_parameters() if p.requires_grad)
        return {name: self.pieces[name] for name in trained}

    def gathered(
        self, names: Sequence[str], leaves: Sequence[Tensor]
    ) -> tuple[Sharding, list[Tensor]]:
        """The same with all parameters whole, for what every rank does by itself."""
        frozen = {
            name: self.shards[name].all_gather(x)
            for name, x in self.pieces.items()
            if name not in names
        }
        wholes = [self.shards[name].all_gather(x) for name, x in zip(names, leaves, strict=True)]
        return replace(self, whole=frozen), wholes

    def own_memory(self) -> Iterator[tuple[str, Tensor]]:
        """The module's own memory, and what is held whole of frozen parameters."""
        yield from self.pieces.items()
        yield from (self.whole or {}).items()

    def likes(self, names: Sequence[str], leaves: Sequence[Tensor]) -> list[Tensor]:
        """Zeros like the whole parameters, without memory."""
        return [self.shards[name].like(x) for name, x in zip(names, leaves, strict=True)]

    def check(self, params: Mapping[str, Tensor]) -> None:
        """Raise unless these are pieces, or whole where they are to be."""
        for name, x in params.items():
            shards = self.shards[name]
            wanted = shards.local_shape if self.whole is None else shards.shape
            if tuple(x.shape) != wanted:
                raise ParamsError(
                    f"params leaf {name!r} has shape {tuple(x.shape)}; rank "
                    f"{shards.ranks.rank} of {shards.ranks.size} holds {wanted} of the parameter's "
                    f"{shards.shape}. Pass params as gf.from_module returns them."
                )
        if self.whole is None and not self.ranks.together:
            raise TransformError(
                "model_fn of a module that fully_shard has sharded runs on all ranks at a time, "
                "and was called outside of the functions that see to that: by itself, inside "
                "another function, or by a function of ghostfunc that is not for sharded modules. "
                "Pass it as it is to gf.ghost_dot_prod, ghost_value_and_grad, direction, "
                "ghost_norm, ghost_clipped_grad, ghost_gram or ghost_project."
            )

    def lent(self, params: Mapping[str, Tensor]) -> tuple[dict[str, Shards], dict[str, Tensor]]:
        """What `gather` makes the parameters of, by their first names."""
        if self.whole is None:
            return dict(self.shards), {**self.pieces, **params}
        known = {name: shards.held_whole() for name, shards in self.shards.items()}
        return known, {**self.whole, **params}

    def units(self, module: nn.Module, aliases: Mapping[str, Sequence[str]]) -> list[Unit]:
        """The units that hold no other, with the parameters that only they hold. `aliases` are all
        places of a parameter in `module`, by its first name."""
        found = [(prefix, part) for prefix, part in module.named_modules() if is_fsdp_unit(part)]
        out = []
        for prefix, part in found:
            if any(_within(other, prefix) and other != prefix for other, _ in found):
                continue
            places = {
                name: [alias[len(prefix) + 1 :] for alias in aliases[name]]
                for name in self.shards
                if prefix and all(_within(alias, prefix) for alias in aliases[name])
            }
            if places:
                out.append(Unit(part, places))
        return out


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Keep FSDP2's hooks from a module and all in it."""
    with ExitStack() as stack:
        for unit in module.modules():
            if is_fsdp_unit(unit):
                for hooks, own in fsdp_hooks(unit):
                    stack.enter_context(_put_aside(hooks, own))
        yield


@contextmanager
def _put_aside(hooks: dict[int, Any], own: int) -> Iterator[None]:
    """A table of hooks without one of them, which comes back to its place."""
    before = dict(hooks)
    hooks.pop(own, None)
    try:
        yield
    finally:
        hooks.clear()
        hooks.update(before)


def reshard(module: nn.Module) -> None:
    """Have `fully_shard`ed parameters be pieces again: a forward pass may have left them whole."""
    unit: Any
    for unit in module.modules():
        if is_fsdp_unit(unit):
            unit.reshard()


def sharding_of(module: nn.Module, held: Sequence[tuple[str, Tensor]]) -> Sharding | None:
    """How a module's parameters are sharded by `fully_shard`; None where they are not.

    Raises:
        ParamsError: some tensors are distributed in another way.
    """
    units = [part for part in module.modules() if is_fsdp_unit(part)]
    if not units and not any(is_dtensor(x) for _, x in held):
        return None
    _refuse_policies(module)
    shards: dict[str, Shards] = {}
    pieces: dict[str, Tensor] = {}
    ranks: InStep | None = None
    cut: Cut | None = None
    mesh: Any = None
    first_name: dict[int, str] = {}
    for name, x in held:
        if first_name.setdefault(id(x), name) != name:
            continue
        if not isinstance(x, nn.Parameter) and not is_dtensor(x):
            continue  # a buffer, the same on all ranks
        _refuse_unknown(module, name, x, mesh)
        tensor: Any = x
        if ranks is None:
            mesh = tensor.device_mesh
            ranks, cut = _ranks_of(mesh)
        assert cut is not None
        shards[name] = Shards(name, tuple(x.shape), tensor.placements[-1].dim, ranks, cut)
        pieces[name] = tensor.detach().to_local()
    if ranks is None or cut is None:
        return None
    return Sharding(ranks, cut, shards, pieces)


def _ranks_of(mesh: Any) -> tuple[InStep, Cut]:
    """All ranks of a mesh, and how they cut parameters: copies along its first dimension, if it has
    two, and pieces along its last."""
    pieces = mesh.get_group(mesh.ndim - 1)
    rank, size = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    if mesh.ndim == 1:
        return InStep(pieces), Cut(pieces, rank, size)
    members = mesh.mesh.flatten().tolist()
    everybody = torch.distributed.new_group(members, use_local_synchronization=True)
    return InStep(everybody), Cut(pieces, rank, size, mesh.get_group(0))


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


def _refuse_unknown(module: nn.Module, name: str, x: Tensor, mesh: Any) -> None:
    """Raise unless a parameter is sharded by `fully_shard` over one mesh with all others."""
    kind = type(module).__name__
    if not is_dtensor(x):
        raise ParamsError(
            f"{name!r} of {kind} is an ordinary parameter, and others are sharded: nobody sums its "
            "gradient over ranks. Call fully_shard on the whole module as well, without "
            "ignored_params."
        )
    tensor: Any = x
    placements = tensor.placements
    unit = any(
        is_fsdp_unit(part) for prefix, part in module.named_modules() if _within(name, prefix)
    )
    copied = len(placements) == 2 and placements[0].is_replicate()
    if not unit or not (len(placements) == 1 or copied) or not placements[-1].is_shard():
        raise ParamsError(
            f"{name!r} of {kind} is {described(x)}. Supported is what fully_shard makes of a "
            "module of ordinary parameters, on a mesh of one dimension or a hybrid one of two. "
            "Tensor parallel plans (parallelize_module) and other distributed tensors are not, and "
            "a rank's part of a gradient is not the gradient. Give from_module the module before "
            "it is distributed, or with its parameters gathered (x.full_tensor())."
        )
    if mesh is not None and tensor.device_mesh != mesh:
        raise ParamsError(
            f"{name!r} of {kind} is {described(x)}, on another mesh than the parameters before it. "
            "Shard all of the module over one mesh."
        )


def _within(name: str, prefix: str) -> bool:
    """Whether a parameter's name is that of one in the module `prefix`."""
    return not prefix or name.startswith(f"{prefix}.")
