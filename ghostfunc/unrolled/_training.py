"""A training run as a pure function of its samples' weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence, Set, Sized
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ghostfunc._base.errors import BatchError, OptionError
from ghostfunc._base.fingerprint import fingerprint, frozen
from ghostfunc._base.losses import check_losses
from ghostfunc._base.options import check_model_fn, check_type
from ghostfunc._base.processes.pieces import refuse_pieces
from ghostfunc._base.program import Program
from ghostfunc._base.purity import prove_independent
from ghostfunc._base.text_number import number_of_text
from ghostfunc._base.torch_private import unrounded
from ghostfunc._base.trees import batch_size, flatten_params, tensors_of
from ghostfunc._base.types import ModelFn, PyTree, Randomness
from ghostfunc.shapley._state import WHOLE
from ghostfunc.unrolled._errors import UnrolledError
from ghostfunc.unrolled._optimizers import Optimizer


class Micro(NamedTuple):
    """Samples that are run together, and their numbers in the data set.

    Attributes:
        ids: `[n]`, integers.
        batch: a pytree of tensors `[n, ...]`.
    """

    ids: Int[Tensor, " n"]
    batch: PyTree


class State(NamedTuple):
    """Parameters and the optimizer's state, after some steps; flat."""

    params: list[Tensor]
    slots: list[Tensor]

    def detach(self) -> State:
        return State([x.detach() for x in self.params], [x.detach() for x in self.slots])


class Training:
    """A training run, fixed in advance: from the weights of its samples to the final parameters.

        G_t = 1/N_t sum_i c_i g_i(theta_t)
        (theta, state)_(t+1) = optimizer(G_t, (theta, state)_t)

    `N_t` is the number of samples in all micro-batches of step t, whatever their weights `c`. The
    run calls the model with these batches in this order, and nothing else is random: it can be
    replayed from any state.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses [n]`, twice differentiable.
        params: pytree of floating-point tensors, at the start.
        steps: a sequence, whose entry t is the `Micro`, or the list of them, of step t. It may be
            lazy, but entry t must be the same whenever it is asked for.
        optimizer: `gf.unrolled.sgd(...)`, `adam(...)` or `adamw(...)`, or one of them `clipped`.
        weights: `c` by sample id; by default all ones. 0 leaves a sample out.
        seed: for a model that draws random numbers (dropout): every micro-batch of every step is
            run with a generator state of its own, which depends on the seed, the step and its
            place alone. None refuses such a model.

    Raises:
        GhostError: one of its children: samples that depend on each other, random numbers without a
            seed, ids that do not fit.
    """

    def __init__(
        self,
        model_fn: ModelFn,
        params: PyTree,
        steps: Sequence[Micro | Sequence[Micro]],
        *,
        optimizer: Optimizer,
        weights: Float[Tensor, " samples"] | None = None,
        seed: int | None = None,
    ) -> None:
        check_model_fn(model_fn)
        leaves, self.spec = flatten_params(params)
        self.leaves = [x.detach().clone() for x in leaves]
        if not isinstance(optimizer, Optimizer):
            raise OptionError(
                f"optimizer must be such as gf.unrolled.adam(lr=...); got "
                f"{type(optimizer).__name__}. (Those of gf.shapley hold one step's state.)"
            )
        check_type("steps", steps, Sized, "a sequence of at least one step")
        unordered = isinstance(steps, (Iterator, Mapping, Set))
        if unordered or not len(steps):
            raise OptionError(
                "steps must be a sequence of at least one step, each of which can be had again."
            )
        if seed is not None and type(seed) is not int:
            raise OptionError(f"seed={seed!r} must be an integer or None.")
        refuse_pieces(model_fn, "gf.unrolled")
        self.model_fn, self.steps, self.optimizer = model_fn, steps, optimizer
        self.weights, self.seed = weights, seed
        if weights is not None:
            check_type("weights", weights, Tensor, "a tensor, one weight per sample id, or None")
        if weights is not None and (weights.ndim != 1 or not weights.is_floating_point()):
            raise OptionError(
                f"weights must be floating-point, one per sample id; got {tuple(weights.shape)} of "
                f"{weights.dtype}."
            )
        with self.generator(0, 0):
            randomness: Randomness = "error" if seed is None else "different"
            first = self.micros(0)[0].batch
            prove_independent(Program(model_fn, self.leaves, self.spec, randomness), first)

    def __len__(self) -> int:
        return len(self.steps)

    def micros(self, step: int) -> list[Micro]:
        """The micro-batches of a step."""
        entry = self.steps[step]
        micros = _micros(entry)
        if not micros or not all(isinstance(m, Micro) for m in micros):
            raise BatchError(
                f"steps[{step}] must be a gf.unrolled.Micro(ids, batch), or a list of them; got "
                f"{type(entry).__name__}."
            )
        for m in micros:
            n = batch_size(m.batch, f"steps[{step}]")
            if not isinstance(m.ids, Tensor) or m.ids.shape != (n,) or m.ids.dtype not in WHOLE:
                tensor = isinstance(m.ids, Tensor)
                found = f"{tuple(m.ids.shape)} of {m.ids.dtype}" if tensor else type(m.ids).__name__
                raise BatchError(
                    f"the ids of steps[{step}] must be a tensor of {n} integers, one per sample; "
                    f"got {found}."
                )
            top = int(m.ids.max())
            if self.weights is not None and (top >= len(self.weights) or int(m.ids.min()) < 0):
                raise BatchError(
                    f"steps[{step}] holds sample {top}, and there are {len(self.weights)} weights."
                )
        return list(micros)

    def shares(self, micros: Sequence[Micro]) -> list[Tensor]:
        """`c_i / N` of the samples of each micro-batch."""
        total = sum(len(m.ids) for m in micros)
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in self.leaves), torch.float32)
        out = []
        for m in micros:
            c = (
                torch.ones(len(m.ids), device="cpu")
                if self.weights is None
                else self.weights[m.ids.long()]  # torch takes uint8 for a mask
            )
            out.append(c.to(self.leaves[0].device, dtype) / total)
        return out

    def start(self) -> State:
        """The state before the first step."""
        return State([x.clone() for x in self.leaves], self.optimizer.init(self.leaves))

    def losses(self, params: Sequence[Tensor], micro: Micro, step: int, place: int) -> Tensor:
        """`[n]`, with this micro-batch's random numbers."""
        with self.generator(step, place):
            losses = self.model_fn(self.spec.unflatten(list(params)), micro.batch)
        return check_losses(losses, len(micro.ids))

    def gradient(self, state: State, step: int) -> list[Tensor]:
        """`G_t`."""
        micros = self.micros(step)
        leaves = [x.detach().requires_grad_() for x in state.params]
        total: list[Tensor] | None = None
        for place, (micro, share) in enumerate(zip(micros, self.shares(micros), strict=True)):
            with torch.enable_grad():
                loss = (self.losses(leaves, micro, step, place) * share).sum()
            with unrounded(loss):
                grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            total = (
                list(grads) if total is None else [x + g for x, g in zip(total, grads, strict=True)]
            )
        assert total is not None
        return total

    def after(self, state: State, gradient: Sequence[Tensor], step: int) -> State:
        """The state after a step."""
        with torch.no_grad(), unrounded(self.leaves[0]):
            out = State(*self.optimizer.update(gradient, state.slots, state.params, step))
        for name, x in zip(self.spec.names, out.params, strict=True):
            if not bool(x.isfinite().all()):
                raise UnrolledError(
                    f"parameter {name!r} is not finite after step {step}: training diverged. Lower "
                    "the learning rate, or clip gradients."
                )
        return out

    @contextmanager
    def generator(self, step: int, place: int) -> Iterator[None]:
        """Random numbers of one micro-batch, the same whenever it is run."""
        if self.seed is None:
            yield
            return
        number = number_of_text(f"ghostfunc unrolled {self.seed} {step} {place}")
        devices = sorted({x.device.index for x in self.leaves if x.is_cuda})
        with torch.random.fork_rng(devices):
            torch.manual_seed(number)
            yield

    def about(self) -> dict[str, Any]:
        """What tells this run from others, ready for JSON."""
        weights = [] if self.weights is None else [self.weights]
        ends = [m for t in (0, len(self) - 1) for m in self.micros(t)]
        data = [x for m in ends for x in (m.ids, *tensors_of(m.batch))]
        with torch.no_grad():
            first = self.losses(self.leaves, self.micros(0)[0], 0, 0)
        return {
            "params": fingerprint(self.spec.names, self.leaves),
            "optimizer": self.optimizer.settings(len(self)),
            "steps": len(self),
            "seed": self.seed,
            "data": fingerprint([str(i) for i in range(len(data))], data),
            "weights": fingerprint(["weights"] * len(weights), weights),
            "frozen": frozen(self.model_fn, self.spec.unflatten(self.leaves)),
            "losses": float(first.double().mean()),
        }

    def unflatten(self, params: Sequence[Tensor]) -> PyTree:
        return self.spec.unflatten(list(params))


def differing(kept: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    """In which entries a file belongs to another run. Losses are the same up to rounding, and are
    told where they alone say that the loss is another."""
    names = [key for key, x in about.items() if key != "losses" and kept.get(key) != x]
    loss = kept.get("losses")
    same = isinstance(loss, float) and math.isclose(loss, about["losses"], rel_tol=1e-2)
    return names or ([] if same else ["losses"])


def _micros(entry: object) -> list[Any]:
    """The micro-batches of one step, whatever they are."""
    if isinstance(entry, Micro) or not isinstance(entry, Sequence):
        return [entry]
    return list(entry)
