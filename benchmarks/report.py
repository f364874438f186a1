"""The table and the plots."""

from __future__ import annotations

import platform
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from exact import WRONG
from scaling import slope
from shapes import SHAPES
from verdict import Found, Line

HEAD = """# Benchmarks

Written by `make bench` on {where}, torch {torch}, {threads} threads, float32, eager unless a row
says otherwise. The contestants of a row run in turns in one process; every peer has a process of
its own. A ratio is the median over rounds, with the quartiles in brackets.

- The plain step is forward and backward of the mean loss over the n + m rows (n rows where a row
  has no validation samples), without an optimizer.
- {memory}
- {onednn}
- Memory is bytes of tensors alive at one time, counted by a dispatch mode, parameters excluded.
  What kernels allocate inside is not seen.
- The FLOP floor of a step is the plain step's time x the step's own operations / the plain step's.
  Operations are those of products, by the formulas of `torch.utils.flop_counter`.
- Errors are relative, against per-sample gradients in float64. Above {wrong:g} a number is called
  wrong.
- GhostSuite, the other hook-based tool, is not on PyPI and so not in the table.

{shapes}

All have a tied head but for those of Opacus' rows and the rows called untied: Opacus takes no tied
weights.

"""


KEPT = (
    "glibc keeps what is freed for the next step (`MALLOC_MMAP_MAX_=0`, a high\n"
    "  `MALLOC_TRIM_THRESHOLD_`), as [speed.md]({speed}) advises;\n"
    "  `--free-memory` leaves it alone."
)
FREED = "glibc gives freed memory back to the system, as it does by default."


ONEDNN = {
    "ours": (
        "Uneven: ghostfunc hands its products to oneDNN where that is faster than MKL, on\n"
        "  processors of AMD's; the model's own stay with MKL, in all contestants.\n"
        "  `--onednn none` and `all` have all products done by one library:\n"
        "  [speed.md](../../speed.md)."
    ),
    "all": "One library on both sides: all float32 products go to oneDNN, plain steps' as well.",
    "none": "One library on both sides: all float32 products go to MKL.",
}


def markdown(lines: list[Line], threads: int, *, onednn: str, memory_kept: bool) -> str:
    """The page."""
    shapes = "\n".join(
        ["| shape | |", "| --- | --- |", *(f"| `{k}` | {v} |" for k, v in SHAPES.items())]
    )
    speed = "../../speed.md" if onednn == "ours" else "../speed.md"
    where = f"{platform.system()} {platform.machine()}"
    head = HEAD.format(
        where=where,
        torch=torch.__version__,
        threads=threads,
        wrong=WRONG,
        shapes=shapes,
        onednn=ONEDNN[onednn],
        memory=KEPT.format(speed=speed) if memory_kept else FREED,
    )
    table = [
        "| work | shape | against | figure | at most | | error | the other's error | |",
        "| --- | --- | --- | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    table += [
        f"| {x.row.work} | {x.row.shape} | {x.row.base} | {_figure(x)} | {_number(x.row.target)} | "
        f"{x.met} | {_error(x.error)} | {_error(x.base_error)} | {x.note.replace('|', '/')} |"
        for x in lines
    ]
    plots = "\n![Ratios and targets](ratios.png)\n\n![Growth](scaling.png)\n"
    return head + "\n".join(table) + "\n" + plots


def text(line: Line) -> str:
    """A row for the terminal."""
    spread = "" if line.spread is None else f" ({line.spread[0]:.2f}-{line.spread[1]:.2f})"
    errors = " ".join(f"error {e:.0e}" for e in (line.error, line.base_error) if e is not None)
    return (
        f"{line.row.key:<52} {_number(line.value):>6}{spread:<13} "
        f"at most {_number(line.row.target):>4}  {line.met:<8} {errors} {line.note}"
    )


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}"


def _error(x: float | None) -> str:
    return "" if x is None else f"{x:.0e}"


def _figure(line: Line) -> str:
    spread = "" if line.spread is None else f" ({line.spread[0]:.2f}, {line.spread[1]:.2f})"
    return "-" if line.value is None else f"{line.value:.2f}{spread}"


def plot_ratios(lines: list[Line], path: Path) -> None:
    """Every ratio with its quartiles, and its target as a tick."""
    drawn = [x for x in lines if x.value is not None and x.row.figure != "slope"][::-1]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.25 * len(drawn)))
    for y, x in enumerate(drawn):
        colours = {"met": "tab:green", "not met": "tab:orange", "-": "tab:gray"}
        colour = colours.get(x.met, "tab:red")
        axes.barh(y, x.value, color=colour, height=0.6)
        if x.spread is not None:
            axes.plot(x.spread, [y, y], color="black", linewidth=1)
        if x.row.target is not None:
            axes.plot([x.row.target] * 2, [y - 0.4, y + 0.4], color="black", linewidth=2)
    axes.set_yticks(range(len(drawn)), [x.row.key for x in drawn], fontsize=7)
    axes.set_xlabel("ratio to what the row is compared with; thick ticks are targets (gray: none)")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def plot_scaling(found: Found, path: Path) -> None:
    """Time against each size, both logarithmic."""
    runs = {k.split("/")[1]: v for k, v in found.items() if k.startswith("scaling/")}
    runs = {k: v for k, v in runs.items() if "fails" not in v}
    if not runs:
        return
    figure, panels = plt.subplots(1, len(runs), figsize=(3.2 * len(runs), 3), squeeze=False)
    for axes, (size, run) in zip(panels[0], runs.items(), strict=True):
        for name in ("plain", "step"):
            fit = slope(run["sizes"], run[name])
            axes.loglog(run["sizes"], run[name], "o-", label=f"{name}, slope {fit:.2f}")
        axes.set_xticks(run["sizes"], map(str, run["sizes"]), minor=False)
        axes.minorticks_off()
        axes.set_xlabel(size)
        axes.set_ylabel("seconds")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
