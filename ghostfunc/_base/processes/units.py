"""Units of a sharded module: parts whose parameters are made whole when they are called.

A unit is made whole for as long as it runs. Its activations are not kept for the backward pass:
there the unit is made whole once more, and runs again. `call_again` is an op of the program as
torch functions see it; what it means under taps, `gf.remat` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import checkpoint

from ghostfunc._base.locks import Loan
from ghostfunc._base.processes.shards import Shards, gather
from ghostfunc._base.torch_private import fsdp_hooks, is_fsdp_unit, modules_within, plan_hooks


@dataclass(frozen=True)
class Unit:
    """A part of a module, and the parameters that nobody else in it has.

    Attributes:
        part: the module that `fully_shard` was called with, or whose parameters a plan has cut.
        places: where its parameters lie in it, by their names in the whole module.
    """

    part: nn.Module
    places: Mapping[str, Sequence[str]]


class _Part(nn.Module):
    """A unit and what calling it does, so that `functional_call` can lend it parameters."""

    def __init__(self, part: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.part = part
        self.call = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def _run(
    unit: Unit,
    forward: Callable[..., Any],
    shards: Mapping[str, Shards],
    pieces: Mapping[str, Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The unit, made whole."""
    tensors = {
        f"part.{place}": whole
        for name, places in unit.places.items()
        for whole in [gather(pieces[name], shards[name])]
        for place in places
    }
    loan = Loan(modules_within(unit.part), tensors.values())
    try:
        with without_hooks(unit.part):  # the backward pass may come when the call is over
            return torch.func.functional_call(
                _Part(unit.part, forward), tensors, args, kwargs, tie_weights=False
            )
    finally:
        loan.give_back()


def call_again(
    tensors: Sequence[Tensor],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    keep: bool,
) -> Any:
    """`function(*args, **kwargs)`, which depends on `tensors` besides, and is called again in the
    backward pass. To `keep` its activations there may be no reason not to."""
    if has_torch_function(tensors):
        return handle_torch_function(call_again, tensors, tensors, function, args, kwargs, keep)
    if keep or not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


@contextmanager
def made_whole_when_called(
    units: Sequence[Unit],
    shards: Mapping[str, Shards],
    pieces: Mapping[str, Tensor],
    *,
    keep: bool,
) -> Iterator[None]:
    """Have units run with whole parameters, of this rank's pieces."""

    def called(unit: Unit, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        function = partial(_run, unit, forward, shards, pieces)
        own = [pieces[name] for name in unit.places]
        return call_again(own, function, args, kwargs, keep)

    with ExitStack() as stack:
        for unit in units:
            own = vars(unit.part)
            stack.enter_context(_in_place(own, partial(called, unit, unit.part.forward)))
        yield


@contextmanager
def _in_place(own: dict[str, Any], forward: Callable[..., Any]) -> Iterator[None]:
    """What an object is called by, among its own attributes, for a while."""
    before = [own["forward"]] if "forward" in own else []
    own["forward"] = forward
    try:
        yield
    finally:
        del own["forward"]
        for x in before:
            own["forward"] = x


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Keep FSDP2's hooks, and those of tensor parallel plans, from a module and all in it."""
    with ExitStack() as stack:
        for part in module.modules():
            own = fsdp_hooks(part) if is_fsdp_unit(part) else []
            for hooks, number in [*own, *plan_hooks(part)]:
                stack.enter_context(_put_aside(hooks, number))
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
