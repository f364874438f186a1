"""The figure of a run: scores by domain over time, how they spread, and the validation loss."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from examples.graddotprod_lm.scores import Table

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#7F6000")
"""Okabe and Ito's, told apart with any colour vision; domains beyond these are grey."""
GREY = "#9A9A9A"


def domain_colours(table: Table, domains: list[str]) -> dict[str, str]:
    """Colours for the domains with the largest sums, grey for the others."""
    sums = np.array([abs(table.shapley[table.domain == i].sum()) for i in range(len(domains))])
    shown = {int(i) for i in np.argsort(-sums)[: len(COLOURS)]}
    colours = iter(COLOURS)
    return {d: next(colours) if i in shown else GREY for i, d in enumerate(domains)}


def draw(table: Table, domains: list[str], metrics: list[dict[str, Any]]) -> Figure:
    """Draw all panels.

    Args:
        table: the scores.
        domains: their names.
        metrics: the lines of `metrics.jsonl`.
    """
    colours = domain_colours(table, domains)
    style = {"font.size": 10.5, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure = Figure(
            figsize=(12.5, 7.2), dpi=130, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
        )
        grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
        draw_time(figure.add_subplot(grid[:, 0]), table, colours)
        draw_spread(figure.add_subplot(grid[0, 1]), table, colours)
        draw_loss(figure.add_subplot(grid[1, 1]), metrics, colours)
    return figure


def draw_time(axes: Axes, table: Table, colours: dict[str, str]) -> None:
    """The running sum of every domain."""
    last = int(table.step.max())
    ends = {}
    for i, (domain, colour) in enumerate(colours.items()):
        mine = table.domain == i
        gained = np.bincount(table.step[mine], table.shapley[mine], minlength=last + 1)
        sums = np.cumsum(gained)
        axes.plot(sums, color=colour, linewidth=1.8, zorder=1 if colour == GREY else 2)
        ends[domain] = float(sums[-1])
    axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
    label_ends(axes, ends, colours, last)
    axes.set(xlabel="step", xlim=(0, last))
    axes.set_ylabel(r"running sum of  lr $\cdot\ \langle g_i,\, g_\mathrm{val}\rangle$")
    axes.set_title("Scores by domain over time (rising: the domain helps)", loc="left")


def label_ends(axes: Axes, ends: dict[str, float], colours: dict[str, str], x: float) -> None:
    """Names beside the ends of lines, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) / 30
    at = -np.inf
    for domain in sorted(ends, key=lambda d: ends[d]):
        at = max(at + gap, ends[domain])
        axes.annotate(
            domain,
            (x, ends[domain]),
            (x * 1.03, at),
            color=colours[domain],
            fontweight="bold",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colours[domain], "linewidth": 0.6},
        )


def draw_spread(axes: Axes, table: Table, colours: dict[str, str]) -> None:
    """One row per domain: quartiles, and the middle 90 %, of single scores."""
    values = {d: table.shapley[table.domain == i] for i, d in enumerate(colours)}
    values = {d: x for d, x in values.items() if len(x)}
    order = sorted(values, key=lambda d: float(np.median(values[d])))
    for row, domain in enumerate(order):
        p5, p25, p50, p75, p95 = np.percentile(values[domain], [5, 25, 50, 75, 95])
        colour = colours[domain]
        axes.plot([p5, p95], [row, row], color=colour, linewidth=1.2)
        axes.plot([p25, p75], [row, row], color=colour, linewidth=6, solid_capstyle="butt")
        axes.plot(p50, row, "o", color="white", markeredgecolor=colour, markersize=6)
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(order)), order)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(r"lr $\cdot\ \langle g_i,\, g_\mathrm{val}\rangle$ of one sample at one step")
    axes.set_title("Spread: median, quartiles, middle 90 %", loc="left")


def draw_loss(axes: Axes, metrics: list[dict[str, Any]], colours: dict[str, str]) -> None:
    """Training loss of every step, smoothed, and validation losses."""
    train = np.array([m["loss"] for m in metrics if "loss" in m])
    width = max(1, len(train) // 40)
    smooth = np.convolve(train, np.ones(width) / width, "valid")
    steps = np.arange(len(smooth)) + (width + 1) / 2
    axes.plot(steps, smooth, color="#CFCFCF", linewidth=3, zorder=1, label="training, all domains")
    readings = [m for m in metrics if "val_loss" in m]
    for domain, colour in colours.items():
        line = [m[f"val_loss/{domain}"] for m in readings]
        axes.plot([m["step"] for m in readings], line, "o-", color=colour, markersize=3)
    axes.set(xlabel="step", xlim=(0, None))
    axes.legend(frameon=False, loc="upper right")
    axes.set_title("Validation loss by domain, nats per token", loc="left")
