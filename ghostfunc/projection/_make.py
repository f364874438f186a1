"""Making projections: from sizes and a seed, from a stored specification, or none at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ghostfunc._base.errors import OptionError, ParamsError
from ghostfunc._base.options import check_type, check_whole
from ghostfunc._base.trees import flatten_params
from ghostfunc._base.types import PyTree
from ghostfunc.projection._blocks import Block, matrix_shape, ranks, select
from ghostfunc.projection._projection import (
    CompressedProjection,
    DenseProjection,
    KroneckerProjection,
    Projection,
    check_kind,
)

FULL = "full"
"""The kind of projections that reduce nothing."""


def kronecker_projection(
    params: PyTree,
    *,
    rank_total: int,
    rank_min: int,
    kind: str,
    seed: int,
    layers: Sequence[str] | None = None,
    compress: int | None = None,
) -> Projection:
    """Random projections of per-sample gradients, one small Kronecker product per parameter.

        out_i = concat_params vec(P_o g_i P_i^T) = concat_params vec(sum_t (P_o b_it)(P_i a_it)^T)

    Inner products are unbiased, `E <out_i, out_j> = <g_i, g_j>`. Their standard error falls as
    `1/sqrt(k)` for gradients of many directions, but as `sqrt(1/k_o + 1/k_i)` for those of rank one
    (a linear layer that sees one position per sample), and trained language models are nearer to
    that. So be generous with `rank_total`, which costs little time, and save on disk with
    `compress`, which has the full `1/sqrt(compress)`.

    Args:
        params: pytree of floating-point tensors; only names and shapes are used.
        rank_total: most columns per parameter (`kind="dense"`: columns in all). A parameter
            `[n_o, n_i]` gets `k_o k_i <= rank_total` with `k_i ~ sqrt(rank_total n_o / n_i)`,
            which is the least work. A convolution is seen as `[out, rest]`, a vector as
            `[1, size]`. A side that needs no reduction is kept exactly.
        rank_min: least `k_o` and `k_i`, as far as the parameter is that large.
        kind: "gaussian", "rademacher", "orthonormal" (random orthonormal rows), "sparse" (four
            nonzeros a column), or "dense" (one Johnson-Lindenstrauss map of random signs over the
            concatenated gradient, never held: exact in theory for any gradient, but it forms
            per-sample gradients, a block at a time, and costs `2 D k` operations a sample).
        seed: with a parameter's name it determines the parameter's matrices, whatever else is
            selected, on every machine: bit for bit for the kinds made of signs, to a rounding of
            float32 for the others. No global generator is used.
        layers: glob patterns of the parameters to cover, such as `["*.attn.*"]`; None for all.
        compress: hash the columns of all parameters together into this many, each to four places
            with random signs (SJLT). Parameters can then no longer be told apart. None keeps them
            side by side; not for `kind="dense"`, whose columns are shared already.

    Returns:
        A `Projection`: `.apply(per_sample_grads)`, `.k`, and `.blocks` with the columns of every
        parameter, in the order of `params`.

    Raises:
        OptionError: an unknown kind, ranks that contradict each other, a pattern that matches no
            parameter.

    References:
        Choe et al., "What is Your Data Worth to GPT?" (LoGra), 2024. Park et al., "TRAK:
        Attributing Model Behavior at Scale", ICML 2023. Kane and Nelson, "Sparser
        Johnson-Lindenstrauss Transforms", JACM 2014.
    """
    check_kind(kind, seed)
    check_whole("rank_total", rank_total)
    check_whole("rank_min", rank_min)
    if compress is not None:
        check_whole("compress", compress)
    if rank_total < rank_min**2:
        raise OptionError(
            f"rank_total={rank_total} and rank_min={rank_min} contradict each other: both sides of "
            "a parameter get rank_min or more, so rank_total must be at least rank_min ** 2."
        )
    if compress is not None and kind == "dense":
        raise OptionError(
            f"compress={compress} with kind={kind!r}: kind='dense' takes none, rank_total is its "
            "number of columns."
        )
    shapes = _chosen(params, layers)
    if kind == "dense":
        blocks = [
            Block(path, shape, *matrix_shape(shape), 1, rank_total, 0)
            for path, shape in shapes.items()
        ]
        return DenseProjection(kind, seed, blocks)
    sizes = {
        path: ranks(*matrix_shape(shape), rank_total, rank_min) for path, shape in shapes.items()
    }
    return _kronecker(kind, seed, _side_by_side(shapes, sizes), compress)


def full_projection(params: PyTree, *, layers: Sequence[str] | None = None) -> Projection:
    """No reduction at all: `out_i` is the gradient itself, flattened.

    As large as the selected parameters: the reference that projections are measured against.
    Arguments and errors are those of `kronecker_projection`.
    """
    shapes = _chosen(params, layers)
    sizes = {path: matrix_shape(shape) for path, shape in shapes.items()}
    return KroneckerProjection(FULL, 0, _side_by_side(shapes, sizes))


def projection_from_spec(spec: dict[str, Any]) -> Projection:
    """The projection that `Projection.spec()` describes."""
    check_type("spec", spec, dict, "what Projection.spec() returns")
    if spec.get("format") != 1:
        found = spec.get("format")
        raise OptionError(f"projection format {found!r} is unknown; this version reads 1.")
    missing = {"kind", "seed", "compress", "blocks"} - spec.keys()
    if missing or not spec["blocks"]:
        raise OptionError(
            f"spec lacks {', '.join(sorted(missing)) or 'blocks'}; take it from Projection.spec()."
        )
    shapes = {b["path"]: tuple(b["shape"]) for b in spec["blocks"]}
    sizes = {b["path"]: (b["k_o"], b["k_i"]) for b in spec["blocks"]}
    kind, seed = spec["kind"], spec["seed"]
    if kind != FULL:
        check_kind(kind, seed)
    if kind == "dense":
        blocks = [
            Block(path, shape, *matrix_shape(shape), *sizes[path], 0)
            for path, shape in shapes.items()
        ]
        return DenseProjection(kind, seed, blocks)
    for path, (k_o, k_i) in sizes.items():
        n_o, n_i = matrix_shape(shapes[path])
        if not (1 <= k_o <= n_o and 1 <= k_i <= n_i):
            raise OptionError(
                f"spec: parameter {path!r} is a matrix {n_o} x {n_i}, which no projection makes "
                f"{k_o} x {k_i} of."
            )
    return _kronecker(kind, seed, _side_by_side(shapes, sizes), spec["compress"])


def _kronecker(kind: str, seed: int, blocks: list[Block], compress: int | None) -> Projection:
    if compress is None:
        return KroneckerProjection(kind, seed, blocks)
    return CompressedProjection(kind, seed, blocks, compress)


def _chosen(params: PyTree, layers: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    leaves, spec = flatten_params(params)
    shapes = {name: tuple(x.shape) for name, x in zip(spec.names, leaves, strict=True)}
    if len(shapes) < len(leaves):
        twice = sorted({name for name in spec.names if spec.names.count(name) > 1})
        raise ParamsError(
            f"several parameters are called {', '.join(twice)}; a projection goes by names, so "
            "give every parameter its own."
        )
    chosen = {path: shapes[path] for path in select(spec.names, layers)}
    for path, shape in chosen.items():
        if math.prod(shape) == 0:
            raise ParamsError(f"parameter {path!r} of shape {shape} has no elements to project.")
    return chosen


def _side_by_side(
    shapes: dict[str, tuple[int, ...]], sizes: dict[str, tuple[int, int]]
) -> list[Block]:
    blocks: list[Block] = []
    start = 0
    for path, shape in shapes.items():
        blocks.append(Block(path, shape, *matrix_shape(shape), *sizes[path], start))
        start += blocks[-1].k
    return blocks
