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
    """The values of several parts' samples, `(samples, values)` each, in the order of samples."""
    index, values = order(pieces), [x for _, x in pieces]
    return values[0] if index is None else torch.cat(values)[index]


def order(parts: Sequence[tuple[Tensor | None, object]]) -> Tensor | None:
    """The place of every sample among those of all parts, one after the other; None where they are
    in order."""
    found = [samples for samples, _ in parts if samples is not None]
    return torch.cat(found).argsort() if found else None
