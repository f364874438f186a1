"""`ekfac`: an eigenvalue-corrected Kronecker-factored curvature of any pure function."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

from ghostfunc._base.errors import OptionError
from ghostfunc._base.fingerprint import fingerprint, frozen
from ghostfunc._base.options import (
    check_chunk_size,
    check_flags,
    check_model_fn,
    check_path,
    one_of,
)
from ghostfunc._base.trees import flatten_params
from ghostfunc._base.types import ModelFn, PyTree
from ghostfunc.curvature._blocks import Limits, patterns
from ghostfunc.curvature._errors import check_batches, check_count
from ghostfunc.curvature._fisher import Fisher, Gradients
from ghostfunc.curvature._likelihood import Likelihood
from ghostfunc.curvature._operator import EKFAC
from ghostfunc.curvature._passes import (
    Batches,
    Data,
    Keeper,
    about_of,
    blocks_of,
    find_bases,
    find_eigenvalues,
)

Sharing: TypeAlias = Literal["expand", "reduce"]


def ekfac(
    model_fn: ModelFn,
    params: PyTree,
    batches: Batches,
    *,
    fisher: Fisher = "sampled",
    likelihood: Likelihood | None = None,
    draws: int = 1,
    seed: int = 0,
    sharing: Sharing = "expand",
    max_side: int = 8192,
    max_dense: int = 1024,
    diagonal: Sequence[str] = (),
    identity: Sequence[str] = (),
    chunk_size: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 16,
    progress: bool = False,
    group: Any = None,
) -> EKFAC:
    """The curvature of a mean loss, one Kronecker-factored block per parameter.

        C = (B (x) A) diag(L) (B (x) A)^T,    L = mean_i (B^T g_i A)^2, elementwise

    For an op `y = a W^T`, the columns of A are the eigenvectors of `sum_it a_it a_it^T`, and those
    of B the eigenvectors of `sum_it b_it b_it^T`. L is the exact second moment of the gradient
    along these directions, so no other diagonal in these bases is closer to `mean_i g_i g_i^T`.
    Gradients are those of whole parameters: the uses of a tied or shared parameter add up before
    they are squared, and gradients of derived tensors are pulled back.

    | parameter | bases |
    | --- | --- |
    | linear layers, convolutions (patches) | both sides |
    | tables that are looked up in (also tied to a head) | features; rows keep their own axes |
    | grouped and batched products | both sides of every group |
    | vectors (biases, scales) | of `mean_i g_i g_i^T`, exact; own axes above `max_dense` |
    | derived or broadcast matrices | of `sum_i g_i g_i^T` and `sum_i g_i^T g_i` |

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses [n]`.
        params: pytree of floating-point tensors.
        batches: batches of a data set, each a pytree of tensors `[n, ...]`; gone through twice, and
            once more where the first two samples do not use all parameters. So a list or a data
            loader in a fixed order, not an iterator.
        fisher: "sampled": gradients for labels drawn from the model's own distribution. In
            expectation, their second moment is the generalised Gauss-Newton matrix (GGN) of the
            mean loss, which for these likelihoods is the Fisher information. "empirical": gradients
            of the losses as they are. "exact": the GGN without drawing, from one backward pass per
            output of a sample; for small models.
        likelihood: `gf.curvature.softmax(...)` or `gf.curvature.gaussian(...)`: how losses are made
            of outputs. Needed unless `fisher="empirical"`.
        draws: how many times labels are drawn for every sample.
        seed: of the draws. Each chunk has draws of its own, so another `chunk_size` makes others.
        sharing: over the positions of a sample, the bases are those of "expand" (every position by
            itself) or "reduce" (positions are summed first). L is exact in both. Where a side is
            longer than the samples are many, "reduce" leaves the rest of the basis to rounding.
        max_side: the largest side of a matrix with an eigenbasis. Larger ones are an error.
        max_dense: the largest vector with an eigenbasis.
        diagonal: glob patterns of parameters whose larger sides keep their own axes instead.
        identity: glob patterns of parameters that are left out: their C is the identity.
        chunk_size: the most samples to run at one time.
        checkpoint: a file to keep the state in, every `checkpoint_every` batches. A call with the
            same arguments goes on from there; other batches, or another order, are refused.
        checkpoint_every: how many batches apart.
        progress: show a progress bar (needs tqdm).
        group: of `torch.distributed`: every process brings batches of its own, and all get
            the curvature of all of them. Each needs a `checkpoint` of its own.

    Returns:
        An `EKFAC`: `matvec`, `solve`, `inverse_sqrt`, `report`, `save`. Scale: C is a mean over
        samples of products of two gradients of a sample's own loss.

    Raises:
        CurvatureError: a side that is too large, statistics that are not finite, a checkpoint of
            another computation.
        OptionError: no likelihood, or not that of `model_fn`; batches that cannot be gone through
            twice.
        GhostError: another of its children, as for `ghost_vjp`: an op without a rule is named.

    References:
        George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored
        Eigenbasis", NeurIPS 2018. Grosse et al., "Studying Large Language Model Generalization with
        Influence Functions", 2023. Eschenhagen et al., "Kronecker-Factored Approximate Curvature
        for Modern Neural Network Architectures", NeurIPS 2023.
    """
    one_of("sharing", sharing, ("expand", "reduce"))
    check_chunk_size(chunk_size)
    check_model_fn(model_fn)
    check_flags(progress=progress)
    check_count("draws", draws)
    if checkpoint is not None:
        check_path("checkpoint", checkpoint)
    gradients = Gradients.of(model_fn, likelihood, fisher, draws, seed)
    for name, value in (
        ("max_side", max_side), ("max_dense", max_dense), ("checkpoint_every", checkpoint_every)
    ):  # fmt: skip
        check_count(name, value)
    check_batches(batches)
    _refuse_iterator(batches)
    leaves, spec = flatten_params(params)
    leaves = [x.detach() for x in leaves]
    limits = Limits(
        max_side,
        max_dense,
        patterns("diagonal", diagonal, spec.names),
        patterns("identity", identity, spec.names),
    )
    data = Data(leaves, spec, batches, chunk_size, progress, group)
    reduce = sharing == "reduce"
    blocks = blocks_of(gradients, data, limits)
    keeper = Keeper(checkpoint, checkpoint_every, about_of(gradients, data, limits, reduce))
    state = keeper.load(leaves[0].device)
    if state.phase == "bases":
        find_bases(gradients, data, blocks, reduce, state, keeper)
    bases = find_eigenvalues(gradients, data, blocks, state, keeper)
    return EKFAC(
        blocks,
        bases,
        samples=state.samples,
        fisher=fisher,
        fingerprint=fingerprint(spec.names, leaves),
        frozen=frozen(model_fn, params),
    )


def _refuse_iterator(batches: object) -> None:
    """Raise for what one pass uses up."""
    if isinstance(batches, Iterator):
        raise OptionError(
            f"batches is a {type(batches).__name__}, which can be gone through once; curvature "
            "needs two passes. Pass a list, or the data loader itself."
        )
