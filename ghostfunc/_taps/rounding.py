"""How far rounding may move gradients: what is guessed from losses, and what is seen.

Derivatives of a loss are rounded by units in its last place, and by more where it is a difference
of larger numbers. A loss near zero among others is one of those, so it is compared to them. Where
all losses of a batch are small nobody knows: they may have a small scale, and then an error as
large as units in the last place of one is a wrong number. There rounding is looked at: plain
autograd takes gradients again, with parameters moved by units in their last place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ghostfunc._base.company import Part
from ghostfunc._base.dtypes import wide
from ghostfunc._taps.claim import Alone, Coupling, coarsest

NOISE = 16
"""Units in the last place of a loss that a derivative of it may be rounded by."""

MARGIN = 100.0
"""How much larger than the noise that was seen a difference may be."""

MOVES = 2
"""How often parameters are moved: one move may leave what is rounded as it was."""


def loss_sizes(losses: Tensor, *, at_most: bool = False) -> Tensor:
    """What the derivatives of losses, `[n]`, are rounded by is in proportion to these; to no more
    than these where they are asked for what it is `at_most`."""
    sizes = losses.detach().abs().double().cpu()
    largest = float(sizes.nan_to_num(0, 0).max()) if len(sizes) else 0.0
    return sizes.clamp_min(1.0 if at_most else min(1.0, largest))


def seen(alone: Alone, part: Part, weights: Tensor) -> Tensor | Coupling:
    """By how much rounding moves the gradient of a part's weighted losses, `[P]`."""
    model = alone.model
    eps = 2 * torch.finfo(coarsest(model)).eps
    first = alone.gradient(part, weights)
    if isinstance(first, Coupling):
        return first
    others = Part(part.rows, [False] * len(part.rows))  # their losses are not quite the run's
    noise = torch.zeros(len(model.leaves), dtype=torch.float64, device="cpu")
    for k in range(MOVES):
        other = replace(model, leaves=moved(model.leaves, eps, k))
        grads = replace(alone, model=other).gradient(others, weights)
        if isinstance(grads, Coupling):
            return grads
        off = [float((wide(x) - wide(y)).norm()) for x, y in zip(first, grads, strict=True)]
        noise = torch.maximum(noise, torch.tensor(off, dtype=torch.float64, device="cpu"))
    return MARGIN * noise


def moved(leaves: Sequence[Tensor], eps: float, k: int) -> list[Tensor]:
    """Parameters, every number of them moved by a share `eps` of itself, up or down."""
    return [x * (1 + eps * _signs(x, k)) for x in leaves]


def _signs(x: Tensor, k: int) -> Tensor:
    """1 and -1, as good as random."""
    turns = torch.arange(x.numel(), dtype=torch.float64, device=x.device) + 1
    return torch.sin(turns * turns * (0.7548776662 + 0.1 * k)).sign().to(x.dtype).view(x.shape)
