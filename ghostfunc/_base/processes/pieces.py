"""Model functions whose `params` are a rank's pieces of sharded parameters: what callers ask.

Every function here is for any model function; of one that is not sharded the answer is the obvious
one, and nothing communicates.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from ghostfunc._base import batches
from ghostfunc._base.errors import BatchError, OptionError, TransformError
from ghostfunc._base.module import ModuleFn
from ghostfunc._base.options import check_chunk_size
from ghostfunc._base.processes.in_step import InStep
from ghostfunc._base.processes.plans import check_alike, check_randomness, hold_against_plan
from ghostfunc._base.processes.sharding import Sharding
from ghostfunc._base.program import Program
from ghostfunc._base.text_number import number_of_text
from ghostfunc._base.torch_private import in_transform
from ghostfunc._base.trees import ParamSpec, batch_size, map_tensors, tensors_of
from ghostfunc._base.types import ModelFn, PyTree

F = TypeVar("F", bound=Callable[..., Any])

LITTLE = 1 << 20
"""Bytes of samples that may be brought together in any case."""


def _in_pieces(model_fn: ModelFn) -> Sharding | None:
    """How the parameters are sharded; None where `params` are whole."""
    sharding = model_fn.sharding if isinstance(model_fn, ModuleFn) else None
    return sharding if sharding is not None and sharding.whole is None else None


def in_step(model_fn: ModelFn) -> InStep | None:
    """The ranks that run this function together; None where each runs its own."""
    sharding = _in_pieces(model_fn)
    return None if sharding is None else sharding.ranks


def together(model_fn: ModelFn, place: str) -> AbstractContextManager[None]:
    """A stretch of the program that the ranks go through together, if there are several."""
    ranks = in_step(model_fn)
    return nullcontext() if ranks is None else ranks.in_step(place)


def of_all_ranks(name: str) -> Callable[[F], F]:
    """Have all ranks go through a public function `f(model_fn, *args, **kwargs)` together, from its
    arguments to its result: whatever ends it on one of them ends this call, and no later one, on
    all. Without it a rank that is refused a batch would give its next one to the others' last."""
    place = f"calling {name}"

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def called(model_fn: Any, *args: Any, **kwargs: Any) -> Any:
            ranks = in_step(model_fn)
            if ranks is None:
                return function(model_fn, *args, **kwargs)
            if in_transform():
                raise TransformError(
                    f"{name} got a sharded module inside a transform of "
                    "torch.func, which cannot follow what its ranks exchange. Call it outside."
                )
            ranks.meet(place)
            with ranks.apart(place):
                return function(model_fn, *args, **kwargs)

        return called  # type: ignore[return-value]

    return decorate


def on_any_rank(model_fn: ModelFn, place: str, *, flag: bool) -> bool:
    """Whether it is so on any rank."""
    ranks = in_step(model_fn)
    return flag if ranks is None else ranks.any(place, flag)


def samples_of_all(model_fn: ModelFn, n: int) -> int:
    """How many samples there are on all ranks."""
    sharding = _in_pieces(model_fn)
    if sharding is None:
        return n
    return sum(sharding.ranks.all("counting samples", n)) // sharding.copies_of_samples


def copies_of_samples(model_fn: ModelFn) -> int:
    """How many ranks have each sample."""
    sharding = _in_pieces(model_fn)
    return 1 if sharding is None else sharding.copies_of_samples


def few_of_all(model_fn: ModelFn, train: PyTree, val: PyTree, outline: str) -> list[int]:
    """How many samples of `val` every rank has, where they are so few that each may compute all of
    them: no rank then has more than twice the samples of its own two batches, and those of `val`
    are no larger than the model or `LITTLE`. Nothing elsewhere.

    The answer is the same on all ranks. `outline` says what their batches have to have in common.
    """
    sharding = _in_pieces(model_fn)
    if sharding is None:
        return []
    ranks = sharding.ranks
    alike = ranks.all("comparing batches", number_of_text(outline))
    theirs = ranks.all("counting validation samples", batch_size(val))
    ours = ranks.all("counting samples", batch_size(train))
    total = sum(theirs) // sharding.copies_of_samples
    if len(set(alike)) > 1 or any(total > n + 2 * m for n, m in zip(ours, theirs, strict=True)):
        return []
    bytes_of_one = sum(x[0].numel() * x.element_size() for x in tensors_of(val))
    model = sum(
        math.prod(sharding.shards[name].shape) * x.element_size()
        for name, x in sharding.pieces.items()
    )
    return theirs if total * bytes_of_one <= max(model, LITTLE) else []


def batch_of_all(model_fn: ModelFn, batch: PyTree, counts: Sequence[int]) -> PyTree:
    """The samples of all ranks' batches, of which each has as many as `counts` says: rank by rank,
    those of a tensor parallel plan once."""
    sharding = _in_pieces(model_fn)
    if sharding is None:
        return batch
    copies = {rank for row in sharding.alike for rank in row[1:]}

    def of_all(x: Tensor) -> Tensor:
        rows = sharding.ranks.samples("bringing validation samples together", x, counts)
        return torch.cat([part for rank, part in enumerate(rows) if rank not in copies])

    return map_tensors(of_all, batch)


def chunks_of_all(model_fn: ModelFn, batch: PyTree, chunk_size: int | None) -> int:
    """The chunks that a batch is run in at least: as many on every rank."""
    ranks = in_step(model_fn)
    if ranks is None or chunk_size is None:
        return 1
    check_chunk_size(chunk_size)
    n = batch_size(batch)
    counts = ranks.all("counting chunks", batches.chunk_count(n, chunk_size))
    with ranks.apart("counting chunks"):
        if n < max(counts):
            raise BatchError(
                f"This rank has {n} samples, and another rank runs its own in {max(counts)} chunks "
                f"of at most {chunk_size}: every rank has to run as many. Give every rank about as "
                "many samples, or take a larger chunk_size."
            )
    return max(counts)


def refuse_pieces(model_fn: ModelFn, what: str) -> None:
    """Raise for a function that is not for sharded modules."""
    if in_step(model_fn) is not None:
        raise OptionError(
            f"{what} is not for sharded modules. Use it on one process with "
            "the whole model; gf.ghost_dot_prod, ghost_value_and_grad, ghost_cosine, direction, "
            "ghost_norm, ghost_gram, ghost_clipped_grad, ghost_project, ghost_vjp and "
            "factored_grads take sharded ones."
        )


def refuse_group(model_fn: ModelFn, call: str) -> None:
    """Raise for a group beside a sharded module: gradients would be added up twice."""
    if in_step(model_fn) is not None:
        raise OptionError(
            f"{call} got a group and a sharded module, whose gradients are "
            "those of all its ranks' samples already: leave out group=."
        )


def held_whole(program: Program, batch: PyTree) -> Program:
    """The program at whole parameters, in place of one at pieces: for what a rank does by itself
    with a batch. All ranks gather them."""
    sharding = _in_pieces(program.model_fn)
    if sharding is None:
        return program
    assert isinstance(program.model_fn, ModuleFn)
    hold_against_plan(sharding, program.model_fn, batch)
    other = copy.copy(program.model_fn)
    with sharding.ranks.in_step("making parameters whole"):
        other.sharding, wholes = sharding.gathered(program.spec.names, program.leaves)
    return Program(other, wholes, program.spec, program.randomness)


def refuse_other_samples(program: Program, batch: PyTree) -> None:
    """Raise unless ranks that have to have the same samples do."""
    sharding = _in_pieces(program.model_fn)
    if sharding is not None:
        with sharding.ranks.apart("reading randomness="):
            check_randomness(sharding, program.randomness)
        check_alike(sharding, batch, "batches")


def refuse_other_weights(model_fn: ModelFn, weights: Tensor) -> None:
    """Raise unless ranks that have the same samples give them the same weights."""
    sharding = _in_pieces(model_fn)
    if sharding is not None:
        check_alike(sharding, weights, "weights of samples")


def whole_likes(program: Program) -> Sequence[Tensor]:
    """Tensors of the shapes of the whole parameters: the leaves themselves, or zeros without memory
    in place of pieces."""
    sharding = _in_pieces(program.model_fn)
    if sharding is None:
        return program.leaves
    return sharding.likes(program.spec.names, program.leaves)


def gathered(model_fn: ModelFn, pieces: Sequence[Tensor], spec: ParamSpec) -> Sequence[Tensor]:
    """Whole tensors like the parameters, of all ranks' pieces."""
    sharding = _in_pieces(model_fn)
    if sharding is None:
        return pieces
    shards = sharding.shards
    return [shards[name].all_gather(x) for name, x in zip(spec.names, pieces, strict=True)]


def lengths_of_whole(model_fn: ModelFn, names: Sequence[str], lengths: Tensor) -> Tensor:
    """Lengths of whole tensors, a row per parameter, of those of this rank's pieces."""
    sharding = _in_pieces(model_fn)
    if sharding is None:
        return lengths
    holders = lengths.new_tensor([sharding.shards[name].holders for name in names])
    shares = lengths.square() / holders.view(-1, *[1] * (lengths.ndim - 1))
    return sharding.ranks.add_up("adding up a length", shares).sqrt()


def summed_and_cut(model_fn: ModelFn, name: str, x: Tensor) -> Tensor:
    """This rank's piece of the sum over ranks of a tensor like a whole parameter."""
    sharding = _in_pieces(model_fn)
    if sharding is None:
        return x
    shards = sharding.shards[name]
    return shards.reduce_scatter(x.reshape(shards.shape))
