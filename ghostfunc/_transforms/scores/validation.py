"""The validation gradient, each parameter's in the form that is cheapest to dot with.

With the direction dense, `<g_i, u>` costs a product of the parameter's size; with the validation
gradient kept factored it costs a product of the validation tokens' number. The choice is made per
parameter, from shapes, for every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ghostfunc._base import batches, definition
from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import BatchError
from ghostfunc._base.losses import FiniteLosses, check_finite
from ghostfunc._base.processes.pieces import chunks_of_all, samples_of_all
from ghostfunc._base.program import Program
from ghostfunc._base.trees import batch_size, yields_batches
from ghostfunc._base.types import Check, ContractDtype, PyTree, Reduction
from ghostfunc._factors import bundles, cost
from ghostfunc._factors.cost import UseShape
from ghostfunc._factors.factor import Factor, times
from ghostfunc._factors.matmul import speed
from ghostfunc._quantities.quantity import Prepared
from ghostfunc._quantities.readers import (
    DeferredReader,
    DotReader,
    PairReader,
    TotalReader,
)
from ghostfunc._taps.run import run
from ghostfunc._taps.use_shapes import use_shapes
from ghostfunc._trace.fitting import prove_plain
from ghostfunc._transforms.factored import FactoredGrads


def validation_readers(
    program: Program,
    ours: Sequence[Sequence[UseShape]],
    val: PyTree,
    *,
    reduction: Reduction,
    grads: bool,
    contract_dtype: ContractDtype = None,
    check: Check,
    finite: FiniteLosses | None = None,
) -> list[Any]:
    """One reader of `<g_i, u>` per parameter; `u` is dense or factored, whichever is cheaper.

    Args:
        ours: the uses of every parameter in the run of the train samples.
        grads: whether the training gradient will be formed in the same backward pass.
    """
    m = batch_size(val, "val")
    each = reduction == "none"
    program, theirs = use_shapes(program, val, exact=True)
    forms = _Forms.of(
        program.leaves, ours, theirs, each=each, grads=grads, contract_dtype=contract_dtype
    )
    mean = 1 / m if reduction == "mean" else 1.0
    totals = [
        TotalReader(tuple(x.shape), contract_dtype) if i in forms.wider else None
        for i, x in enumerate(program.leaves)
    ]
    taken = run(
        program,
        val,
        [Prepared(totals, degree=1)] if forms.wider else [],
        grads=forms.dense,
        collect=forms.factored,
        defer=forms.deferred,
        scale=1.0 if forms.scaled_after else mean,
        check=check,
        finite=finite,
    )
    after = mean if forms.scaled_after else 1.0

    def scaled(factor: Factor) -> Factor:
        return factor if after == 1.0 else times(factor, after)

    def reader(i: int) -> DotReader | PairReader | DeferredReader:
        deferred = taken.deferred[i]
        if deferred is not None:  # only of reduction "none", which scales nothing
            return DeferredReader(deferred, m, contract_dtype)
        if i in forms.factored:
            factors = tuple(map(scaled, taken.factors[i]))
            return PairReader(factors, each, m, contract_dtype=contract_dtype)
        u = wide(taken.values[0][i] if i in forms.wider else taken.grads[i])
        return DotReader(u if after == 1.0 else u * after, contract_dtype)

    return [reader(i) for i in range(len(program.leaves))]


@dataclass(frozen=True)
class _Forms:
    """In which form each parameter's validation gradient is kept, by index.

    Attributes:
        factored: as factors; `deferred`: of these, the ones that are formed one sample at a time.
        wider: added up in a wider dtype than the parameter's, by a reader; `dense`: by autograd.
        scaled_after: whether the gradients are divided after they were added up.
    """

    factored: set[int]
    deferred: set[int]
    wider: set[int]
    dense: list[int]
    scaled_after: bool

    @classmethod
    def of(
        cls,
        leaves: Sequence[Tensor],
        ours: Sequence[Sequence[UseShape]],
        theirs: Sequence[Sequence[UseShape]],
        *,
        each: bool,
        grads: bool,
        contract_dtype: ContractDtype,
    ) -> _Forms:
        """`each`: the gradients of single validation samples are asked for, not their sum."""
        everything = range(len(leaves))

        def keep(i: int) -> bool:
            faster = speed(leaves[i], contract_dtype)
            return cost.keep_direction_factored(ours[i], theirs[i], grads=grads, speed=faster)

        factored = {i for i in everything if each or keep(i)}
        direct = [all(x.direct for x in theirs[i]) for i in everything]
        deferred = {
            i for i in everything if each and not (direct[i] and all(x.direct for x in ours[i]))
        }
        # In half precision 1 / m would be rounded, once in all cotangents or once in each, and a
        # gradient has its parameter's dtype: there the direction is added up and divided wider.
        # So it is where its products may be rounded, which those of a gradient may not.
        halves = {i for i, x in enumerate(leaves) if wide(x).dtype != x.dtype}
        apart = set(everything) if contract_dtype is not None else halves
        wider = {i for i in apart - factored if direct[i]}
        dense = [i for i in everything if i not in factored and i not in wider]
        return cls(factored, deferred, wider, dense, bool(apart))


def kept_readers(
    program: Program,
    ours: Sequence[Sequence[UseShape]],
    kept: FactoredGrads,
    *,
    reduction: Reduction,
    grads: bool,
    contract_dtype: ContractDtype = None,
) -> list[Any]:
    """`validation_readers`, of validation gradients that were collected before."""
    m = len(kept.losses)
    each = reduction == "none"
    c = 1 / m if reduction == "mean" else 1.0

    def reader(i: int) -> DotReader | PairReader:
        theirs = [bundles.use_shape(f) for f in kept.bundles[i]]
        faster = speed(program.leaves[i], contract_dtype)
        if each or cost.keep_direction_factored(ours[i], theirs, grads=grads, speed=faster):
            return PairReader(kept.scaled(i, c), each, m, contract_dtype=contract_dtype)
        return DotReader(kept.total(i, c), contract_dtype)

    return [reader(i) for i in range(len(program.leaves))]


def dense_direction(
    program: Program,
    val: PyTree,
    *,
    mean: bool,
    chunk_size: int | None,
    look: Callable[[Tensor], None] = check_finite,
    ready: Callable[[int, Tensor], None] | None = None,
    check: Check = "new",
) -> list[Tensor]:
    """The gradient of the mean or summed validation losses, a few samples at a time. `val` is a
    batch or an iterable of batches. `ready` gets the gradients of a batch that is run at one time
    as they come up."""

    def gradient(batch: PyTree, scale: float) -> list[Tensor]:
        def of_chunk(chunk: PyTree) -> list[Tensor]:
            prove_plain(program, chunk, check)
            whole = ready if chunk is val else None
            return definition.val_gradient(program, chunk, scale, look, whole)

        sums = batches.Sums()
        least = chunks_of_all(program.model_fn, batch, chunk_size)
        for grads in batches.each(of_chunk, batch, chunk_size, "val", least=least):
            sums.add(grads)
            del grads
        return sums.result()

    if not yields_batches(val):
        m = batch_size(val, "val")
        return gradient(val, 1 / samples_of_all(program.model_fn, m) if mean else 1.0)
    total, whole = 0, batches.Sums()
    for batch in val:
        m = samples_of_all(program.model_fn, batch_size(batch, "val"))
        total += m
        # Means, so that half precision does not overflow, weighed in float32 or wider.
        whole.add([wide(g) * m for g in gradient(batch, 1 / m)])
    if not total:
        raise BatchError(
            f"val is a {type(val).__name__} that yields no batches. An iterator can be used once: "
            "make a new one, or pass a list by iter(batches)."
        )
    sums = whole.result()
    return [
        (x / total if mean else x).to(leaf.dtype)
        for x, leaf in zip(sums, program.leaves, strict=True)
    ]
