"""Running a part of a program again with other tensors: which ones it meets, what to give it in
their place, and what else it depends on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states
from torch.utils.weak import WeakIdKeyDictionary

from ghostfunc._base.errors import InPlaceError, UntrackedUseError
from ghostfunc._base.modes import Mode
from ghostfunc._base.torch_private import function_modes, version, without_torch_functions
from ghostfunc._base.trees import flatten, tensors_of, unflatten


class FreeTensors(Mode):
    """Finds the tensors that torch calls are given and that were not made by other calls, and gives
    the calls constants in their place.

    Attributes:
        found: those that are not among the `given` ones.
    """

    def __init__(
        self, given: Sequence[Tensor], held: Callable[[Tensor], bool] = lambda x: False
    ) -> None:
        super().__init__()
        self.found: list[Tensor] = []
        self._held = held
        self._given = list(given)
        self._versions = [version(x) for x in given]
        self._known = WeakIdKeyDictionary()
        self._constants: dict[int, Tensor] = {}
        self._know(given)

    def _know(self, tensors: Sequence[Tensor]) -> None:
        for x in tensors:
            self._known[x] = True

    def _constant(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x not in self._known:
            self._known[x] = True
            self.found.append(x)
            self._versions.append(version(x))
            if not self._held(x):
                self._constants[id(x)] = standing_in(x).detach()
        return self._constants.get(id(x), x)

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, treedef = flatten((args, kwargs))
        with without_torch_functions():  # nobody else is to see what is done here
            leaves = [self._constant(x) for x in leaves]
        args, kwargs = unflatten(treedef, leaves)
        out = func(*args, **kwargs)
        self._know(tensors_of(out))
        return out

    def refuse_writes(self) -> None:
        """Raise if a tensor that is not the program's own has been written to."""
        for x, before in zip((*self._given, *self.found), self._versions, strict=True):
            if version(x) != before:
                raise InPlaceError(
                    f"gf.remat: the function writes in place to a tensor of shape {tuple(x.shape)} "
                    "that it did not make: run again, it would find it changed. Use the "
                    "out-of-place op."
                )


class Substitutes(Mode):
    """Gives torch calls other tensors in place of some, known by identity."""

    def __init__(self, originals: Sequence[Tensor], stand_ins: Sequence[Tensor]) -> None:
        super().__init__()
        self._originals = list(originals)  # an identity lasts as long as its object
        self._of = {id(x): y for x, y in zip(originals, stand_ins, strict=True)}

    def of(self, x: Any) -> Any:
        """What stands in for `x`."""
        return self._of.get(id(x), x)

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, treedef = flatten((args, kwargs))
        args, kwargs = unflatten(treedef, [self.of(x) for x in leaves])
        return func(*args, **kwargs)


def hidden_tensor() -> UntrackedUseError:
    return UntrackedUseError(
        "gf.remat: the function depends on a tensor that is not among its arguments, in a way "
        "torch functions do not show (a custom autograd.Function, torch.vmap). Its gradient would "
        "be lost: make that tensor an argument."
    )


def standing_in(x: Tensor) -> Tensor:
    """What torch calls made now would be given in place of `x`."""
    for mode in reversed(function_modes()):
        if isinstance(mode, Substitutes):
            x = mode.of(x)
    return x


class RngAndAutocast:
    """What a part of a program depends on besides tensors, as it was when this was made: the states
    of the random generators, and autocasting."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices, self._states = get_device_states(*inputs)
        self._autocast = [
            torch.autocast(
                device,
                dtype=torch.get_autocast_dtype(device),
                enabled=torch.is_autocast_enabled(device),
                cache_enabled=torch.is_autocast_cache_enabled(),
            )
            for device in sorted({"cpu", *(x.device.type for x in inputs)})
            if torch.amp.is_autocast_available(device)
        ]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(self._devices))
            torch.set_rng_state(self._cpu)
            set_device_states(self._devices, self._states)
            for autocast in self._autocast:
                stack.enter_context(autocast)
            yield
