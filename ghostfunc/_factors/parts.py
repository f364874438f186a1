"""Parts: the samples of a batch in groups that are alike, each with factors of its own.

Side by side in one factor, all samples are filled up to the positions of the longest one. Documents
of packed rows have any number of positions, so their factors come by length: what relates samples
to each other sees all parts together, everything else one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ghostfunc._factors.bundles import Bundle


class Part(NamedTuple):
    """One parameter's factors of some samples.

    Attributes:
        samples: which they are; None for all.
        bundle: a factor for every use of the parameter.
    """

    samples: Tensor | None
    bundle: Bundle


def in_order(pieces: Sequence[tuple[Tensor | None, Tensor]]) -> Tensor:
    """What was read of the samples of several parts, in the order of samples."""
    if len(pieces) == 1 and pieces[0][0] is None:
        return pieces[0][1]
    samples, values = zip(*pieces, strict=True)
    return torch.cat(values)[torch.cat(samples).argsort()]


def order(parts: Sequence[Part]) -> Tensor | None:
    """The place of every sample among those of all parts, one after the other; None where they are
    in order."""
    samples = [part.samples for part in parts if part.samples is not None]
    return torch.cat(samples).argsort() if samples else None
