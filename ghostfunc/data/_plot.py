"""A picture of a column of scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOUR = "#0072B2"
"""Okabe and Ito's blue: told apart with any colour vision."""


def histogram(values: Float[Tensor, " n"], name: str, axes: Axes | None) -> Axes:
    """How many samples have which score."""
    if axes is None:
        from matplotlib import pyplot

        axes = pyplot.subplots()[1]
    axes.hist(values.double().numpy(), bins="auto", color=COLOUR)
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(name.replace("_", " "))
    axes.set_ylabel("samples")
    positive = float((values > 0).double().mean())
    axes.set_title(f"{len(values):,} samples, {positive:.0%} above zero", loc="left")
    return axes
