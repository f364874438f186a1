"""From an ordinary `nn.Module` to a pure function of its parameters."""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from ghostfunc._base.errors import CoupledSamplesError, OptionError, ParamsError
from ghostfunc._base.experts import layers_of_experts, rows_in_order
from ghostfunc._base.hand_written import hand_written, shown
from ghostfunc._base.locks import Loan, alone_with
from ghostfunc._base.methods import overridden
from ghostfunc._base.options import check_number
from ghostfunc._base.processes.dtensors import like_parameter, local
from ghostfunc._base.processes.placements import sharding_of
from ghostfunc._base.processes.sharding import Sharding, reshard
from ghostfunc._base.processes.shards import gather
from ghostfunc._base.processes.units import Unit, made_whole_when_called, without_hooks
from ghostfunc._base.processes.wrappers import refuse_wrapped
from ghostfunc._base.torch_private import BatchNorm, gradient_hooks, lend_to, modules_within
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


class ModuleFn:
    """`model_fn(params, batch)` of a module; made by `from_module`."""

    def __init__(self, module: nn.Module, loss: Loss, sharding: Sharding | None = None) -> None:
        self._bound = _Bound(module, loss)
        self.sharding = sharding
        # Every name of every tensor: tied parameters have several.
        first_name: dict[int, str] = {}
        self._aliases: dict[str, list[str]] = {}
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        self._parts = modules_within(module)
        self._experts = layers_of_experts(self._parts)
        self._adapters = hand_written(self._parts)
        self._compared: set[nn.Module] = set()
        self._state: dict[str, Tensor] = {}
        for prefix, owner, attribute, x in _held(module):
            name = f"{prefix}.{attribute}" if prefix else attribute
            own = first_name.setdefault(id(x), name)
            self._aliases.setdefault(own, []).append(f"module.{name}")
            self._places.setdefault(own, []).append((owner, attribute))
        self._units: list[Unit] = []
        if sharding is not None:
            places = {name: [x[7:] for x in alias] for name, alias in self._aliases.items()}
            self._units = sharding.units(module, places)

    @property
    def module(self) -> nn.Module:
        return self._bound.module

    @property
    def loss(self) -> Loss:
        return self._bound.loss

    def training_flags(self) -> tuple[bool, ...]:
        """Training or evaluation, module by module: a trace holds for one setting of them."""
        if torch.compiler.is_dynamo_compiling():
            return tuple(m.training for m in self.module.modules())
        return tuple([m.training for m in modules_within(self.module)])

    def refuse_batch_norm(self) -> None:
        """Raise for layers that would normalise over the batch, before they count it."""
        for name, layer in self.module.named_modules():
            if isinstance(layer, BatchNorm) and layer.training:
                raise CoupledSamplesError(
                    f"{type(layer).__name__} {name!r} is batch_norm in training mode, which "
                    "normalises over the batch: the loss of one sample depends on the others, so "
                    "per-sample gradients do not exist. Call module.eval() or, between "
                    "steps that train, use `with gf.evaluating(module):` (running statistics are "
                    "then used, see docs/batch_norm.md), or replace the layer by GroupNorm or "
                    "LayerNorm."
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
        self._check(params)
        if self.sharding is not None:
            return self._lending_pieces(self.sharding, params, run)
        named = {**self._state, **params}
        with alone_with(self.module), self._methods_of_run():
            if torch.compiler.is_compiling():
                return self._called(named, run)
            parts = modules_within(self.module)
            loan = Loan(parts, named.values())
            try:
                if not self._lend(named, parts):
                    return self._called(named, run)
                return run(lambda batch: self.loss(self.module, batch))
            finally:
                loan.give_back()

    def _lending_pieces(
        self,
        sharding: Sharding,
        params: dict[str, Tensor],
        run: Callable[[Callable[[PyTree], Tensor]], T],
    ) -> T:
        """`lending`, where `params` are this rank's pieces."""
        sharding.check(params)

        shards, pieces = sharding.lent(params)
        keep = sharding.whole is not None
        in_units = {name for unit in self._units for name in unit.places}

        def losses(batch: PyTree) -> Tensor:
            outside = [name for name in shards if name not in in_units]
            wholes = {name: gather(pieces[name], shards[name]) for name in outside}
            loan = Loan(modules_within(self.module), wholes.values())
            try:
                with made_whole_when_called(self._units, shards, pieces, keep=keep):
                    return self._called(wholes, lambda of: of(batch))
            finally:
                loan.give_back()

        with alone_with(self.module), without_hooks(self.module), self._methods_of_run():
            return run(losses)

    def _methods_of_run(self) -> AbstractContextManager[None]:
        """What parts of the module do in a way of their own is done in one that taps see."""
        if not (self._experts or self._adapters):
            return nullcontext()
        methods = [*shown(self._adapters), *rows_in_order(self._experts, self._compared)]
        return overridden(methods)

    def _lend(self, named: dict[str, Tensor], parts: list[nn.Module]) -> bool:
        """Put tensors where the module holds its own, as `functional_call` does; False where it
        has other modules than it had, or holds something of it elsewhere."""
        if len(parts) != len(self._parts) or not all(map(operator.is_, parts, self._parts)):
            return False
        for name, x in named.items():
            for owner, attribute in self._places[name]:
                if not lend_to(owner, attribute, x):
                    return False
        return True

    def _check(self, params: object) -> None:
        """Raise unless these are tensors under names of the module's."""
        if not isinstance(params, Mapping):
            raise ParamsError(
                f"params is a {type(params).__name__}; model_fn of from_module takes a dict from "
                f"the names of {type(self.module).__name__}'s parameters to tensors, such as "
                "from_module returns."
            )
        unknown = [name for name in params if name not in self._aliases]
        if unknown:
            raise ParamsError(
                f"params has names that {type(self.module).__name__} does not: {unknown}. Its "
                f"names are {sorted(self._aliases)[:8]} and so on; a tied parameter goes by the "
                "first of them. Layers added later need a new from_module."
            )

    def _called(
        self, named: dict[str, Tensor], run: Callable[[Callable[[PyTree], Tensor]], T]
    ) -> T:
        tensors = {alias: x for name, x in named.items() for alias in self._aliases[name]}
        out: T = torch.func.functional_call(self._bound, tensors, (run,), tie_weights=False)
        return out


def _held(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every place of the module that holds a parameter or buffer, once: the prefix of its owner,
    the owner, the attribute, and what it holds.

    A submodule that is reached by several names holds its tensors in one place: lent twice, that
    place would be given back what was lent to it instead of its own parameter.
    """
    for prefix, owner in module.named_modules():
        own = {"recurse": False, "remove_duplicate": False}
        for name, x in itertools.chain(owner.named_parameters(**own), owner.named_buffers(**own)):
            yield prefix, owner, name, x


def check_module(module: object) -> None:
    """Raise `OptionError` unless it is a module."""
    if not isinstance(module, nn.Module):
        raise OptionError(
            f"module is a {type(module).__name__}; expected a model, a torch.nn.Module."
        )


def from_module(module: nn.Module, loss: Loss) -> tuple[ModelFn, dict[str, Tensor]]:
    """Make a pure `model_fn(params, batch) -> losses[n]` of a module and a per-sample loss.

    Args:
        module: any module. It is not changed, and not copied: `params` share the memory of its
            parameters, so an optimizer step on the module is seen by the next call.
        loss: `loss(module, batch) -> [n]`, ordinary PyTorch code that calls the module in any way
            it likes and returns one loss per sample, not reduced over samples.

    Of a module that `torch.distributed.fsdp.fully_shard` has sharded, `params` are this rank's
    pieces of the parameters. All ranks then make the same calls, each with samples of its own:
    scores, norms and projections are those of the whole parameters, and gradients (the training
    gradient, a direction) are of the mean over all ranks' samples, in pieces. So it is with a
    tensor parallel plan (`parallelize_module`), alone or beneath `fully_shard`, whose ranks share
    one batch.

    Returns:
        `(model_fn, params)`. `params` holds the parameters with `requires_grad=True` under their
        names in `module.named_parameters()`, a tied parameter once. Frozen parameters and buffers
        are closed over: not tracked, never touched.

    Raises:
        ParamsError: no parameter requires a gradient, or the module or a part of it has been
            compiled or wrapped (DistributedDataParallel, DataParallel, FullyShardedDataParallel,
            DeepSpeedEngine), or holds distributed tensors of another kind: the
            message names what to give instead.
    """
    check_module(module)
    if isinstance(loss, nn.Module) or not callable(loss):
        raise OptionError(
            f"loss is a {type(loss).__name__}; expected a function loss(module, batch) -> [n] that "
            "calls the module and returns one loss per sample."
        )
    refuse_wrapped(module)
    reshard(module)
    held = [(f"{prefix}.{name}" if prefix else name, x) for prefix, _, name, x in _held(module)]
    sharding = sharding_of(module, held)
    if sharding is None:
        params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    else:
        params = sharding.params(module)
    if not params:
        raise ParamsError(
            f"{type(module).__name__} has no parameter with requires_grad=True: there is nothing "
            "to take gradients of. Unfreeze the parameters you want scores for."
        )
    return ModuleFn(module, loss, sharding), params


def _check_weight(weight: object) -> None:
    """Raise `OptionError` unless it is one number; a loss scaler's may be infinite."""
    if isinstance(weight, Tensor):
        if weight.ndim:
            raise OptionError(f"weight has shape {tuple(weight.shape)}; it must be one number.")
    elif not isinstance(weight, float) or not math.isinf(weight):
        check_number("weight", weight)


def _check_grad(name: str, grad: object) -> None:
    """Raise `ParamsError` unless it is a floating-point tensor."""
    if not isinstance(grad, Tensor) or not grad.is_floating_point():
        found = grad.dtype if isinstance(grad, Tensor) else type(grad).__name__
        raise ParamsError(
            f"grads[{name!r}] is a {found}; expected a tensor of a floating-point dtype."
        )


def _in_memory_like(p: Tensor, grad: Tensor) -> Tensor:
    """A gradient with the strides that `backward()` gives it, those of its parameter: fused
    optimizers read both in the order of memory."""
    return grad if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)


def accumulate_grads(module: nn.Module, grads: dict[str, Tensor], *, weight: float = 1.0) -> None:
    """Add gradients to the `.grad` of a module's parameters, as `loss.backward()` would.

        p.grad = (p.grad or 0) + weight * grads[name of p]

    The one function here that writes: with it any `torch.optim` optimizer, gradient clipping, loss
    scaler and scheduler work as after `backward()`. Call `optimizer.zero_grad()` as ever.

    Args:
        module: the module that `gf.from_module` was given.
        grads: name -> gradient for every trainable parameter, as in `GhostStep.grads`: a tied
            parameter once, under its first name; frozen parameters not at all.
            Of a sharded module, this rank's pieces.
        weight: what to multiply by: for micro-batches, the share of each in the whole batch; for a
            loss scaler, its scale.

    Raises:
        ParamsError: names or shapes are not those of the trainable parameters. Nothing is written
            then.
    """
    check_module(module)
    _check_weight(weight)
    reshard(module)
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not isinstance(grads, Mapping):
        raise ParamsError(
            f"grads is a {type(grads).__name__}; expected a dict from names of parameters to "
            "gradients, such as the field grads of what gf.ghost_value_and_grad returns."
        )
    if grads.keys() != trainable.keys():
        missing = sorted(trainable.keys() - grads.keys())
        extra = sorted(grads.keys() - trainable.keys())
        raise ParamsError(
            f"grads must have the names of the trainable parameters of {type(module).__name__}. "
            f"Missing: {missing or 'nothing'}; not among them: {extra or 'nothing'}. Make params "
            "and grads anew (gf.from_module) when parameters are frozen or unfrozen."
        )
    for name, p in trainable.items():
        grad = grads[name]
        _check_grad(name, grad)
        if grad.shape != local(p).shape:
            raise ParamsError(
                f"grads: the gradient of {name!r} has shape {tuple(grad.shape)}; the parameter's "
                f"is {tuple(local(p).shape)}."
            )
        if gradient_hooks(p):
            raise OptionError(
                f"Parameter {name!r} has hooks on its gradient (register_hook, or "
                "register_post_accumulate_grad_hook, as optimizers have that step layer by "
                "layer), which backward() calls and nobody calls here: its .grad would be "
                "another. Remove them, and do what they do once the gradient is whole."
            )
    with torch.no_grad():
        for name, p in trainable.items():
            # A new tensor: what the optimizer or a clipping does to .grad stays out of `grads`.
            grad = (grads[name] * weight).to(p.device, p.dtype)
            if p.grad is None:
                p.grad = like_parameter(_in_memory_like(local(p), grad), p)
            else:
                p.grad += like_parameter(grad, p)
