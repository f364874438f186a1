"""Modules that `fully_shard` (FSDP2) or a tensor parallel plan has sharded, called with this rank's
pieces.

Their own hooks would compute with distributed tensors where torch functions do not see it. They are
put aside while `model_fn` runs. Instead a unit is made whole when it is called: a module that
`fully_shard` was called with, and that holds no other; without `fully_shard`, a module that holds
parameters which a plan has cut. What lies outside of units is whole from the beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ghostfunc._base.errors import ParamsError, TransformError
from ghostfunc._base.processes.in_step import InStep
from ghostfunc._base.processes.shards import Shards
from ghostfunc._base.processes.units import Unit
from ghostfunc._base.torch_private import is_fsdp_unit


@dataclass(frozen=True)
class Sharding:
    """How the parameters of a sharded module lie on the ranks; made by `sharding_of`.

    Attributes:
        ranks: that hold the pieces.
        alike: of a tensor parallel plan, the ranks that have the same samples; none otherwise.
        shards: of every parameter, frozen ones included, by its first name.
        pieces: the module's own pieces, by the same names.
        whole: the whole parameters that are frozen, where all ranks have all parameters whole.
    """

    ranks: InStep
    alike: Sequence[Sequence[int]]
    shards: Mapping[str, Shards]
    pieces: Mapping[str, Tensor]
    whole: Mapping[str, Tensor] | None = None

    @property
    def copies_of_samples(self) -> int:
        """How many ranks have each sample."""
        return len(self.alike[0]) if self.alike else 1

    def params(self, module: nn.Module) -> dict[str, Tensor]:
        """This rank's pieces of the parameters that are trained."""
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
        """The module's own memory, and the frozen parameters that are held whole."""
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
                "model_fn of a sharded module runs on all ranks at a time, "
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
        parts = list(module.named_modules())
        found = [(prefix, part) for prefix, part in parts if is_fsdp_unit(part)]
        if not found:
            cut = (name for name, shards in self.shards.items() if not shards.whole)
            owners = {alias.rpartition(".")[0] for name in cut for alias in aliases[name]}
            found = [(prefix, part) for prefix, part in parts if prefix in owners]
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


def reshard(module: nn.Module) -> None:
    """Have `fully_shard`ed parameters be pieces again: a forward pass may have left them whole."""
    unit: Any
    for unit in module.modules():
        if is_fsdp_unit(unit):
            unit.reshard()


def _within(name: str, prefix: str) -> bool:
    """Whether a parameter's name is that of one in the module `prefix`."""
    return not prefix or name.startswith(f"{prefix}.")
