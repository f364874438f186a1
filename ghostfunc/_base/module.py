"""From an ordinary `nn.Module` to a pure function of its parameters."""

from __future__ import annotations

import copy
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from ghostfunc._base.errors import CoupledSamplesError, ParamsError
from ghostfunc._base.torch_private import BatchNorm
from ghostfunc._base.types import ModelFn, PyTree

Loss = Callable[[nn.Module, PyTree], Tensor]


T = TypeVar("T")


class _Bound(nn.Module):
    """Module and loss as one module, so that `functional_call` covers whatever the loss calls."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, run: Callable[[Callable[[PyTree], Tensor]], T]) -> T:
        return run(lambda batch: self.loss(self.module, batch))


_numbers = itertools.count()
_locks: weakref.WeakKeyDictionary[nn.Module, tuple[int, AbstractContextManager[bool]]]
_locks = weakref.WeakKeyDictionary()
_locks_within: weakref.WeakKeyDictionary[nn.Module, list[AbstractContextManager[bool]]]
_locks_within = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


@contextmanager
def alone_with(module: nn.Module) -> Iterator[None]:
    """Keep other threads from a module, and from all modules in it, while it has lent parameters.

    A thread may come back to a module that it has. Locks are taken in one order everywhere, so that
    threads with overlapping modules do not wait for each other for ever.
    """
    if torch.compiler.is_compiling():  # by one thread at a time
        yield
        return
    with _locks_lock:
        if module not in _locks_within:
            numbered = {
                _locks.setdefault(m, (next(_numbers), threading.RLock())) for m in module.modules()
            }
            _locks_within[module] = [lock for _, lock in sorted(numbered, key=lambda x: x[0])]
        locks = _locks_within[module]
    with ExitStack() as stack:
        for lock in locks:
            stack.enter_context(lock)
        yield


class ModuleFn:
    """`model_fn(params, batch)` of a module; made by `from_module`."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        self._bound = _Bound(module, loss)
        # Every name of every tensor: tied parameters have several.
        first_name: dict[int, str] = {}
        self._aliases: dict[str, list[str]] = {}
        self._state: dict[str, Tensor] = {}
        for name, x in itertools.chain(
            module.named_parameters(remove_duplicate=False),
            module.named_buffers(remove_duplicate=False),
        ):
            own = first_name.setdefault(id(x), name)
            self._aliases.setdefault(own, []).append(f"module.{name}")

    @property
    def module(self) -> nn.Module:
        return self._bound.module

    def training_flags(self) -> tuple[bool, ...]:
        """Training or evaluation, module by module: a trace holds for one setting of them."""
        return tuple(m.training for m in self.module.modules())

    def refuse_batch_norm(self) -> None:
        """Raise for layers that would normalise over the batch, before they count it."""
        for name, layer in self.module.named_modules():
            if isinstance(layer, BatchNorm) and layer.training:
                raise CoupledSamplesError(
                    f"{type(layer).__name__} {name!r} is batch_norm in training mode, which "
                    "normalises over the batch: the loss of one sample depends on the others, so "
                    "per-sample gradients do not exist. Call module.eval() (running statistics are "
                    "then used), or replace the layer by GroupNorm or LayerNorm."
                )

    def closed_over(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The module's parameters that are not among `params`, and its buffers."""
        state: dict[str, Tensor] = dict(self.module.named_buffers())
        for name, p in self.module.named_parameters():
            if name not in params:
                state[name] = p
        return state

    def closing_over(self, state: dict[str, Tensor]) -> ModuleFn:
        """The same function with other tensors in place of `closed_over`."""
        other = copy.copy(self)
        other._state = state
        return other

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModuleFn) and self._bound is other._bound

    def __hash__(self) -> int:
        return hash(self._bound)

    def __call__(self, params: dict[str, Tensor], batch: PyTree) -> Tensor:
        return self.lending(params, lambda losses: losses(batch))

    def lending(
        self, params: dict[str, Tensor], run: Callable[[Callable[[PyTree], Tensor]], T]
    ) -> T:
        """`run` a function of `losses(batch)` while the module has `params`: what calls the module
        later, as a checkpoint does in the backward pass, finds the module's own."""
        named = {**self._state, **params}
        tensors = {alias: x for name, x in named.items() for alias in self._aliases[name]}
        with alone_with(self.module):
            out: T = torch.func.functional_call(self._bound, tensors, (run,), tie_weights=False)
        return out


def from_module(module: nn.Module, loss: Loss) -> tuple[ModelFn, dict[str, Tensor]]:
    """Make a pure `model_fn(params, batch) -> losses[n]` of a module and a per-sample loss.

    Args:
        module: any module. It is not changed, and not copied: `params` share the memory of its
            parameters, so an optimizer step on the module is seen by the next call.
        loss: `loss(module, batch) -> [n]`, ordinary PyTorch code that calls the module in any way
            it likes and returns one loss per sample, not reduced over samples.

    Returns:
        `(model_fn, params)`. `params` holds the parameters with `requires_grad=True` under their
        names in `module.named_parameters()`, a tied parameter once. Frozen parameters and buffers
        are closed over: not tracked, never touched.

    Raises:
        ParamsError: no parameter requires a gradient.
    """
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    if not params:
        raise ParamsError(
            f"{type(module).__name__} has no parameter with requires_grad=True: there is nothing "
            "to take gradients of. Unfreeze the parameters you want scores for."
        )
    return ModuleFn(module, loss), params


def accumulate_grads(module: nn.Module, grads: dict[str, Tensor], *, weight: float = 1.0) -> None:
    """Add gradients to the `.grad` of a module's parameters, as `loss.backward()` would.

        p.grad = (p.grad or 0) + weight * grads[name of p]

    The one function here that writes: with it any `torch.optim` optimizer, gradient clipping, loss
    scaler and scheduler work as after `backward()`. Call `optimizer.zero_grad()` as ever.

    Args:
        module: the module that `gf.from_module` was given.
        grads: name -> gradient for every trainable parameter, as in `GhostStep.grads`: a tied
            parameter once, under its first name; frozen parameters not at all.
        weight: what to multiply by: for micro-batches, the share of each in the whole batch; for a
            loss scaler, its scale.

    Raises:
        ParamsError: names or shapes are not those of the trainable parameters. Nothing is written
            then.
    """
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if grads.keys() != trainable.keys():
        missing = sorted(trainable.keys() - grads.keys())
        extra = sorted(grads.keys() - trainable.keys())
        raise ParamsError(
            f"grads must have the names of the trainable parameters of {type(module).__name__}. "
            f"Missing: {missing or 'nothing'}; not among them: {extra or 'nothing'}. Make params "
            "and grads anew (gf.from_module) when parameters are frozen or unfrozen."
        )
    for name, p in trainable.items():
        if grads[name].shape != p.shape:
            raise ParamsError(
                f"The gradient of {name!r} has shape {tuple(grads[name].shape)}; the parameter's "
                f"is {tuple(p.shape)}."
            )
    with torch.no_grad():
        for name, p in trainable.items():
            # A new tensor: what the optimizer or a clipping does to .grad stays out of `grads`.
            grad = (grads[name] * weight).to(p.device, p.dtype)
            if p.grad is None:
                p.grad = grad
            else:
                p.grad += grad
