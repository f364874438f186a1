"""Whose row is whose, checked anew in every run of a model that may reorder its samples.

What a tap reads for sample i is linear in the cotangents of the rows ascribed to it. Weigh the
samples' losses with `c_i`: if all those rows are its own, `<g_i, u>` becomes `c_i` times as much,
and if one is another sample's, it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import WAYS_OUT, SampleAxisError
from ghostfunc._base.types import ModelFn, PyTree


def check_owners(
    dots: Callable[[ModelFn, Sequence[Tensor]], Sequence[Tensor]],
    model_fn: ModelFn,
    leaves: Sequence[Tensor],
    names: Sequence[str],
    n: int,
) -> None:
    """Raise `SampleAxisError` unless the rows ascribed to every sample are its own.

    Args:
        dots: `dots(model_fn, directions)`, as ghost mode computes them: `[n]` per parameter.
        model_fn, leaves, names, n: the model, its parameters, and the number of samples.
    """
    # Parameters at right angles to a random direction are so by their nature, not by accident.
    # torch draws no numbers inside vmap.
    generator = np.random.default_rng(0)
    u = [torch.from_numpy(generator.standard_normal(x.shape)).to(x) for x in leaves]
    c = torch.from_numpy((generator.permutation(n) + 0.5) / n + 0.5).to(leaves[0].device)

    def weighted(params: PyTree, batch: PyTree) -> Tensor:
        losses = model_fn(params, batch)
        return losses * c.to(losses)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = dots(model_fn, u)
        torch.manual_seed(0)
        heavy = dots(weighted, u)
    for name, x, y in zip(names, plain, heavy, strict=True):
        x, y = wide(x), wide(y)
        tolerance = 64 * torch.finfo(x.dtype).eps ** 0.8
        if not bool(((y - c.to(x) * x).abs() <= tolerance * x.abs().max()).all()):
            raise SampleAxisError(
                f"Parameter {name!r} meets rows that are not those of the samples they are "
                "ascribed to: model_fn reorders samples by their values (it sorts them, packs "
                "sequences, or routes rows to experts). Keep the samples in their order where "
                f"parameters meet them. {WAYS_OUT}"
            )
