"""Side effects of a model function, which a pure one does not have: it draws random numbers, or
writes to what it is given."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ghostfunc._base.errors import InPlaceError
from ghostfunc._base.modes import DispatchMode
from ghostfunc._base.module import ModuleFn
from ghostfunc._base.program import Program
from ghostfunc._base.refusals import COLLECTIVES, refuse_collective
from ghostfunc._base.torch_private import (
    address,
    in_transform,
    modules_within,
    tensors_of_module,
    versions,
)
from ghostfunc._base.trees import tensors_of
from ghostfunc._base.types import PyTree


class Draws(DispatchMode):
    """Sees whether random numbers are drawn, in this thread.

    Attributes:
        seen: whether they were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.seen = self.seen or _draws(func, args, kwargs)
        return func(*args, **kwargs)


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call takes numbers from a global generator: some take them in training only."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    arguments = func._schema.arguments
    given = {x.name: x.default_value for x in arguments if x.has_default_value()}
    given |= {x.name: value for x, value in zip(arguments, args, strict=False)}
    given |= kwargs
    rates = ["dropout_p", "dropout", *(["p"] if "dropout" in func.__name__ else [])]
    return (
        given.get("generator") is None
        and all(given.get(rate) != 0 for rate in rates)
        and all(given.get(mode) is not False for mode in ("train", "training"))
    )


def _changes_nothing(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a tensor is given the memory that it has: torch.nn.utils.parametrize does so."""
    if func is not torch.ops.aten.set_.source_Tensor:
        return False
    x, y = args
    places = [(address(z), z.storage_offset(), z.shape, z.stride()) for z in (x, y)]
    return places[0] == places[1]


class SideEffects(Draws):
    """Raises, besides, before an op writes to memory of the program or of its batch, or sends
    anything to another process.

    Attributes:
        dtypes: of what the ops return.
    """

    def __init__(self, program: Program, batch: PyTree) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self._protected = _protected(program, batch)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func.namespace in COLLECTIVES:
            refuse_collective(str(func))
        schema = func._schema
        if schema.is_mutable and not _changes_nothing(func, args):
            given = itertools.chain(
                zip(schema.arguments, args, strict=False),
                ((a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs),
            )
            for argument, value in given:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._check(func, value)
        out = super().call(func, args, kwargs)
        if isinstance(out, torch.Tensor):
            self.dtypes.add(out.dtype)
        return out

    def _check(self, func: Any, value: object) -> None:
        for x in tensors_of(value):
            name = self._protected.get(address(x)) if x.numel() else None
            if name is not None:
                raise InPlaceError(
                    f"model_fn writes to {name} in place ({func}). A pure function leaves what it "
                    "is given as it is: use the out-of-place op, or work on a copy."
                )


def _protected(program: Program, batch: PyTree) -> dict[int, str]:
    """What must not be written to, by address of its memory."""
    named: list[tuple[str, Tensor]] = [("its batch", x) for x in tensors_of(batch)]
    model_fn, spec, leaves = program.model_fn, program.spec, program.leaves
    if isinstance(model_fn, ModuleFn):
        sharding = model_fn.sharding
        named += [(f"buffer {name!r}", x) for name, x in model_fn.module.named_buffers()]
        held = model_fn.module.named_parameters() if sharding is None else sharding.own_memory()
        named += [(f"frozen parameter {k!r}", x) for k, x in held]
    named += [(f"parameter {k!r}", x) for k, x in zip(spec.names, leaves, strict=True)]
    return {address(x): name for name, x in named if x.numel()}


@dataclass(frozen=True)
class Footprint:
    """What side effects change for good: looked at before and after a pass that no mode watches, it
    tells whether there was one. Numbers of a generator that is put back leave nothing.

    Attributes:
        generators: states of the global generators of the processor and of the parameters' GPUs.
        given: tensors of the program and of its batch; `versions`: how often they were written to.
    """

    generators: list[bytes]
    given: Sequence[Tensor]
    versions: list[int]

    @staticmethod
    def of(program: Program, batch: PyTree) -> Footprint:
        given = [*tensors_of(batch), *program.leaves]
        if isinstance(program.model_fn, ModuleFn):
            modules = modules_within(program.model_fn.module)
            held = [x for m in modules for own in tensors_of_module(m) for x in own.values()]
            given += [x for x in held if x is not None]
        return Footprint(_generators(program.leaves), given, versions(given))

    def remains(self, program: Program) -> bool:
        """Whether nothing was drawn, and no tensor written to, since."""
        return (
            self.generators == _generators(program.leaves) and versions(self.given) == self.versions
        )


def _generators(leaves: Sequence[Tensor]) -> list[bytes]:
    states = [torch.default_generator.get_state()]
    for device in {x.device for x in leaves if x.is_cuda}:
        if not torch.cuda.is_current_stream_capturing():  # a graph's own state is not read
            states.append(torch.cuda.get_rng_state(device))
    # They lie on the host, so no device waits. Transforms wrap them, without memory to be read.
    return [bytes(x.tolist()) if in_transform() else x.numpy().tobytes() for x in states]
