"""What readers read off the factor of one use, and the training gradient beside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ghostfunc._base.documents import Packing
from ghostfunc._factors import bundles, contract
from ghostfunc._factors.beside_total import dots_and_total
from ghostfunc._factors.factor import Dense, Factor, OneHot, Outer, flat_positions
from ghostfunc._factors.parts import Part
from ghostfunc._quantities.readers import (
    DotReader,
    OneRunReader,
    Reader,
    ValueReader,
    read_parts,
)
from ghostfunc._trace.tracked import Tracked, at_leaves, shaped


def as_param_shape(factor: Factor, target: Tracked) -> Factor:
    """The factor in a shape that fits the target, all positions of a sample on one axis. A dense
    factor, and that of a matrix, get the target's own shape: a matrix may be transposed later.
    Other factors need only have the target's elements in the target's order."""
    shape = target.real_shape
    match factor:
        case Outer(left, right) if left.ndim != 3:
            factor = Outer(flat_positions(left), flat_positions(right))
        case OneHot(ids, b, n_rows) if ids.ndim != 2:
            factor = OneHot(ids[:, None].flatten(1), flat_positions(b), n_rows)
    if factor.shape == shape or (not isinstance(factor, Dense) and len(shape) != 2):
        return factor
    g = contract.materialize(factor)
    return Dense(g.reshape(len(g), *shape))


def read_all(
    factor: Factor, target: Tracked, readers: Sequence[Reader], packing: Packing | None = None
) -> list[Tensor | None]:
    """What every reader of a target reads, and last its training gradient where that is read here:
    None if the gradient was added to a running total. With a `packing`, the factor is one of packed
    rows, and all readers are `DotReader`s.

    A reader that the target has of its own reads the factor, with the others of its kind. The
    parameter's reader, where there is no other, reads what the factor is pulled back to.
    """
    has_own = [reader is not None for reader, _ in target.readers.values()]
    pulled = {} if all(has_own) else leaf_factors(target, factor)
    at_leaf = [  # None where the target's own reader reads, further down
        None if own else reader.read(pulled[i])
        for (_, i), own, reader in zip(target.readers, has_own, readers, strict=True)
    ]
    own_readers = [reader for own, reader in zip(has_own, readers, strict=True) if own]
    one_run_roots = [root for _, root in target.readers.values() if isinstance(root, OneRunReader)]
    if one_run_roots:  # if one reader is a `OneRunReader`, all are
        leaves = [i for (_, i), own in zip(target.readers, has_own, strict=True) if own]
        own_readers = _readers_for_train_rows(factor, target, leaves, own_readers)
        factor = bundles.take(factor, slice(one_run_roots[0].n))
    read, grad = _read_with_total(factor, target, own_readers, packing)
    of_own = iter(read)
    out: list[Tensor | None] = [next(of_own) if x is None else x for x in at_leaf]
    if target.reads_grad:
        out.append(None if grad is None else shaped(grad, target.const))
    return out


def _read_with_total(
    factor: Factor, target: Tracked, readers: Sequence[Reader], packing: Packing | None
) -> tuple[list[Tensor], Tensor | None]:
    """What a target's own readers read, and its training gradient, formed in the same products
    where it is read here: None if it is not, or was added to a running total."""
    directions = [r for r in readers if isinstance(r, DotReader)]
    us = [r.u.reshape(factor.shape) for r in directions]
    contract_dtype = directions[0].contract_dtype if us else None  # one call has one
    giving = next((r for r in readers if isinstance(r, ValueReader) and r.gives_total), None)
    value: Tensor | None = None
    grad: Tensor | None = None
    if giving is not None and target.reads_grad:
        value, grad = giving.read_with_total([Part(None, [factor])])
        dots, _ = dots_and_total(
            factor, us, with_total=False, contract_dtype=contract_dtype, packing=packing
        )
        if target.running is not None:
            target.running.put(grad)
            grad = None
    elif target.running is not None:
        dots = target.running.add(factor, us, contract_dtype, packing)
    else:
        dots, grad = dots_and_total(
            factor,
            us,
            with_total=target.reads_grad,
            contract_dtype=contract_dtype,
            packing=packing,
        )
    read: list[Tensor] = []
    dotted = iter(dots)
    for r in readers:
        if isinstance(r, DotReader):
            read.append(next(dotted))
        else:
            read.append(value if r is giving and value is not None else r.read(factor))
    return read, grad


def read_all_parts(
    parts: Sequence[tuple[Tensor, Factor]], target: Tracked, readers: Sequence[Reader]
) -> list[Tensor | None]:
    """`read_all` of readers that take samples in parts, each with its factor."""
    has_own = [reader is not None for reader, _ in target.readers.values()]
    pulled = [] if all(has_own) else [(samples, leaf_factors(target, f)) for samples, f in parts]
    at_hand = [Part(samples, [f]) for samples, f in parts]
    out: list[Tensor | None] = []
    grad: Tensor | None = None
    for (_, i), own, reader in zip(target.readers, has_own, readers, strict=True):
        giving = own and isinstance(reader, ValueReader) and reader.gives_total
        if giving and target.reads_grad and grad is None:
            assert isinstance(reader, ValueReader)
            value, grad = reader.read_with_total(at_hand)
        else:
            # Nothing is pulled back for a reader that the target has of its own.
            at_leaf = [Part(samples, [factors[i]]) for samples, factors in pulled if not own]
            value = read_parts(reader, at_leaf or at_hand)
        out.append(value)
    if target.reads_grad:
        grad = bundles.summed([f for _, f in parts]) if grad is None else grad
        if target.running is not None:
            target.running.put(grad)
        out.append(None if target.running is not None else shaped(grad, target.const))
    return out


def _readers_for_train_rows(
    factor: Factor, target: Tracked, leaves: Sequence[int], readers: Sequence[Any]
) -> list[Reader]:
    """Readers of the train samples, which come first, made of the validation samples' factors."""

    def at_parameter(i: int, total: Tensor) -> Tensor:
        (g,) = contract.materialize(leaf_factors(target, Dense(total[None]))[i])
        return g

    return [
        reader.for_train_rows([factor], grads=target.reads_grad, pull=partial(at_parameter, i))
        for i, reader in zip(leaves, readers, strict=True)
    ]


def leaf_factors(target: Tracked, factor: Factor) -> dict[int, Factor]:
    """One factor per parameter that `target` derives from."""
    out: dict[int, Factor] = {}
    for leaf, factors in at_leaves([(target, factor)]).items():
        out[leaf] = factors[0]
        if len(factors) > 1:
            whole = list(map(contract.materialize, factors))
            out[leaf] = Dense(contract.add_up([x.reshape(whole[0].shape) for x in whole]))
    return out
