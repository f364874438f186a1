"""Lengths of both sides of a dot product, that turn it into a cosine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base.losses import FiniteLosses
from ghostfunc._base.processes.pieces import on_any_rank
from ghostfunc._base.program import Program
from ghostfunc._base.torch_private import symbolic
from ghostfunc._base.trees import take
from ghostfunc._base.types import PyTree
from ghostfunc._factors import bundles, extreme_norms, pairs
from ghostfunc._quantities.readers import DeferredReader, DotReader, PairReader
from ghostfunc._transforms.factored import collect


def sample_norms(
    program: Program,
    batch: PyTree,
    squares: Sequence[Float[Tensor, " n"]],
    losses: Float[Tensor, " n"],
    finite: FiniteLosses,
) -> Float[Tensor, "params n"]:
    """`||g_i||`, one row per parameter or one of all, as the squares are; extreme samples are run
    once more. The losses are looked at on the same occasion; where nobody looks, extreme norms are
    NaN."""
    table = torch.stack(list(squares))
    if symbolic(table) or not finite.wanted:
        return extreme_norms.trusted_roots(table)
    rows = extreme_norms.root(table)
    extreme = extreme_norms.extremes(table.sum(0), losses)
    again = finite.look(extreme) and program.randomness == "error"
    if on_any_rank(program.model_fn, "asking whether norms over- or underflow", flag=again):
        index = extreme.nonzero().flatten()
        few = index.tolist() or [0]  # others run with those that have such samples
        book = collect(program, take(batch, few), check="never")
        if len(index):
            norms = book.param_norms() if len(rows) > 1 else book.norms()
            rows[:, index] = norms.to(rows.dtype)
    return rows


def length(reader: DotReader | PairReader | DeferredReader, like: Tensor) -> Tensor:
    """`||u||` in float64: `[1]`, or `[m]` for every validation sample."""
    match reader:
        case DotReader(u):
            return extreme_norms.length(u)[None]
        case DeferredReader(deferred, m):
            us = (deferred.gradient(j) for j in range(m))
            return torch.stack(list(map(extreme_norms.length, us)))
        case PairReader(()):  # the validation losses do not depend on the parameter
            return like.new_zeros(reader.m if reader.each else 1, dtype=torch.float64)
        case PairReader(factors, each, contract_dtype=contract_dtype):
            bundle = factors if each else [bundles.pooled(f) for f in factors]
            squares = pairs.sqnorms(bundle, contract_dtype=contract_dtype)
            return extreme_norms.root(squares).double()
