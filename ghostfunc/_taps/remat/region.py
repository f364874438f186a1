"""Regions: calls that can be made again later, when their modules may long have their own
parameters back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghostfunc._base.errors import TransformError
from ghostfunc._base.locks import alone_with
from ghostfunc._base.methods import overridden, overrides_now
from ghostfunc._base.modes import Mode
from ghostfunc._base.reach import modules_in_reach
from ghostfunc._base.torch_private import address, tensors_of_module, without_torch_functions
from ghostfunc._base.trees import flatten, tensors_of, unflatten


class Region:
    """One call `fn(*args, **kwargs)`.

    Modules in reach of the call are lent, when it is made again, the parameters and buffers that
    they had at first: `torch.func.functional_call` has taken them back by then. So are the methods
    that stood in for their own.

    Attributes:
        inputs: the tensors among the arguments, apart from those `held`: whoever makes the call
            gives them anew.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        held: Callable[[Tensor], bool] = lambda x: False,
    ) -> None:
        self._fn = fn
        leaves, self._treedef = flatten((args, kwargs))
        self._places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and not held(x)]
        self.inputs: list[Tensor] = [leaves[i] for i in self._places]
        for i in self._places:
            leaves[i] = None
        self._rest = leaves
        self._borrower = _Borrower(modules_in_reach((fn, *leaves), names_of_files=False))
        self._borrowed = self._borrower.tensors()
        self._overrides = overrides_now(self._borrower.modules())
        self._parameters: set[int] = set()

    def run(self, *inputs: Tensor) -> Any:
        """The first call."""
        with _Parameters(self._note):
            return self._call(inputs)

    def again(self, *inputs: Tensor) -> Any:
        """Every other call."""
        now = self._borrower.tensors()
        with _Parameters(self._check), overridden(self._overrides):
            if all(x is now[name] for name, x in self._borrowed.items()):
                return self._call(inputs)
            with alone_with(self._borrower):
                return torch.func.functional_call(
                    self._borrower, dict(self._borrowed), (lambda: self._call(inputs),),
                    tie_weights=False,
                )  # fmt: skip

    def _call(self, inputs: Sequence[Tensor]) -> Any:
        leaves = list(self._rest)
        for i, x in zip(self._places, inputs, strict=True):
            leaves[i] = x
        args, kwargs = unflatten(self._treedef, leaves)
        return self._fn(*args, **kwargs)

    def _note(self, x: nn.Parameter) -> None:
        self._parameters.add(address(x))  # peft makes a new one of a transposed weight in each call

    def _check(self, x: nn.Parameter) -> None:
        if address(x) not in self._parameters:
            raise TransformError(
                f"gf.remat: run again, {self._fn} uses a parameter of shape {tuple(x.shape)} that "
                "it did not use at first. Its module is out of sight: pass gf.remat the module, a "
                "method of it, or a function that takes it as an argument or closes over it."
            )


class _Borrower(nn.Module):
    """Modules in a row, which `functional_call` lends tensors to."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.modules_in_reach = nn.ModuleList(modules)

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()

    def tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers that the modules have now; a shared module's once."""
        return {
            f"{path}.{name}": x
            for path, module in self.named_modules()
            for own in tensors_of_module(module)
            for name, x in own.items()
            if x is not None
        }


class _Parameters(Mode):
    """Shows every `nn.Parameter` that a torch call is given."""

    def __init__(self, see: Callable[[nn.Parameter], None]) -> None:
        super().__init__()
        self._see = see

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with without_torch_functions():
            for x in tensors_of((args, kwargs)):
                if isinstance(x, nn.Parameter):
                    self._see(x)
        return func(*args, **kwargs)
