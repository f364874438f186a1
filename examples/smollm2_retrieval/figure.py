"""The figure: which domain's chunks each domain's query likes, and how often it finds its own."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C8C8C")
"""Okabe and Ito's: told apart with any colour vision."""


def draw(
    names: list[str],
    cosines: Float[Tensor, "queries domains"],
    recalls: dict[str, list[float]],
    *,
    k: int,
    chance: float,
    path: Path,
) -> None:
    """Write the figure.

    Args:
        names: of the domains.
        cosines: mean over the chunks of each domain, for every query.
        recalls: by method, recall@k of every query.
        k, chance: of the recall, and what random scores reach.
        path: where to.
    """
    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=(13, 5.6), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        draw_cosines(left, names, cosines)
        draw_recalls(right, names, recalls, k=k, chance=chance)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def draw_cosines(axes: Axes, names: list[str], cosines: Tensor) -> None:
    limit = float(cosines.abs().max())
    axes.imshow(cosines.numpy(), cmap="PuOr_r", vmin=-limit, vmax=limit)
    for i, row in enumerate(cosines.tolist()):
        for j, value in enumerate(row):
            color = "white" if abs(value) > 0.65 * limit else "black"
            weight = "bold" if i == j else "normal"
            axes.text(
                j, i, f"{value:+.2f}", ha="center", va="center", color=color, weight=weight, size=9
            )
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="chunks of", ylabel="query of")
    axes.set_title("Mean cosine of chunk and query gradients", loc="left")


def draw_recalls(
    axes: Axes, names: list[str], recalls: dict[str, list[float]], *, k: int, chance: float
) -> None:
    rows = np.arange(len(names))[::-1]
    step = 0.8 / len(recalls)
    for at, ((method, values), color) in enumerate(zip(recalls.items(), COLORS, strict=False)):
        mean = sum(values) / len(values)
        heights = rows + 0.4 - (at + 0.5) * step
        axes.barh(heights, values, height=0.9 * step, color=color, label=f"{method} ({mean:.2f})")
    axes.axvline(chance, color="black", linewidth=0.8, linestyle=":", label=f"chance ({chance})")
    axes.set_yticks(rows, names)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, 1), xlabel=f"recall@{k} of the query's own domain")
    axes.set_title("Found again, by domain (mean)", loc="left")
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=3)
