"""What the demo shows: progress bars, tables and the figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from demo_corpus import DOMAINS
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from sklearn.metrics import roc_auc_score
from torch import Tensor

import ghostfunc as gf

SHOWN = 6
"""Chunks shown from either end of the ranking."""

TARGET, OTHER = "#0072B2", "#8C8C8C"
"""Okabe and Ito's blue beside grey: told apart with any colour vision."""

console = Console()


@dataclass(frozen=True)
class Pool:
    """Training chunks of every domain, to be scored.

    Attributes:
        chunks: `[n, t]`.
        domains: the domain of every chunk.
        size: chunks in each domain.
    """

    chunks: Int[Tensor, "n t"]
    domains: tuple[str, ...]
    size: int

    @classmethod
    def of(cls, chunks: dict[str, Int[Tensor, "k t"]]) -> Pool:
        """The same number of chunks of every domain, one domain after the other."""
        size = len(next(iter(chunks.values())))
        domains = tuple(domain for domain in chunks for _ in range(size))
        return cls(torch.cat(list(chunks.values())), domains, size)

    def members(self, domain: str) -> Bool[Tensor, " n"]:
        """Which chunks are of the domain."""
        return torch.tensor([d == domain for d in self.domains])


@dataclass(frozen=True)
class Results:
    """All that the demo found out.

    Attributes:
        target: domain of the validation batch.
        pool: the chunks that were scored.
        losses: of every training step.
        n_params: size of the model.
        scores: `<g_i, g_val>` for the target.
        dots: the same for every domain in its turn.
        norms: `||g_i||`.
        val_norms: `||g_val||` of every domain.
        verification: of `gf.verify`.
        seconds: of every method, on `n_timed` training and `n_val` validation chunks.
    """

    target: str
    pool: Pool
    losses: list[float]
    n_params: int
    scores: Float[Tensor, " n"]
    dots: dict[str, Float[Tensor, " n"]]
    norms: Float[Tensor, " n"]
    val_norms: dict[str, float]
    verification: gf.Report
    seconds: dict[str, float]
    n_timed: int
    n_val: int

    def cosines(self, domain: str) -> Float[Tensor, " n"]:
        """`<g_i, g_val> / (||g_i|| ||g_val||)` of every chunk, with a domain as the target."""
        return self.dots[domain] / (self.norms * self.val_norms[domain])

    def order(self) -> list[str]:
        """The domains, the one whose chunks have the highest median score first."""
        medians = {d: self.scores[self.pool.members(d)].quantile(0.5) for d in self.dots}
        return sorted(self.dots, key=lambda d: -float(medians[d]))

    def mean_cosines(self) -> Float[Tensor, "targets domains"]:
        """The mean cosine of every domain's chunks, with every domain as the target, in order."""
        members = [self.pool.members(domain) for domain in self.order()]
        cosines = [self.cosines(target) for target in self.order()]
        return torch.stack([torch.stack([c[m].mean() for m in members]) for c in cosines])


@dataclass(frozen=True)
class Grade:
    """How well scores find a domain.

    Attributes:
        precision: share of the domain among the k best chunks, k being its size.
        auroc: how often a chunk of the domain scores higher than a chunk of another.
    """

    precision: float
    auroc: float

    @classmethod
    def of(cls, scores: Float[Tensor, " n"], pool: Pool, domain: str) -> Grade:
        members = pool.members(domain)
        best = scores.topk(pool.size).indices
        return cls(
            precision=float(members[best].float().mean()),
            auroc=float(roc_auc_score(members.numpy(), scores.numpy())),
        )


def progress_bars() -> Progress:
    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


# --- tables -------------------------------------------------------------------------------------


def print_results(results: Results) -> None:
    """Everything in the order of the argument: is it exact, what does it cost, what is it for."""
    last = results.losses[-20:]
    console.rule("Ghost against materialized dot products")
    console.print(str(results.verification), soft_wrap=True, highlight=False)
    console.rule("Time")
    console.print(timing_table(results))
    console.print(
        f"{results.n_timed} training and {results.n_val} validation chunks, median. Plain: one "
        "backward pass over all of them. Materialized holds "
        f"{materialized_bytes(results) / 2**20:.0f} MiB of per-sample gradients; ghost holds none."
    )
    console.rule(f"{results.n_val} held-out chunks of {results.target!r} score training chunks")
    console.print(
        f"The model: GPT-2 with {results.n_params:,} parameters, {len(results.losses)} steps on "
        f"{len(DOMAINS)} domains, from {results.losses[0]:.2f} to {sum(last) / len(last):.2f} nats "
        "per byte."
    )
    console.print()
    console.print(ranking_table(results))
    console.rule(f"Do the scores find {results.target!r}?")
    console.print(grades_table(results))
    console.rule("AUROC with every domain as the target")
    console.print(every_domain_table(results))


def materialized_bytes(results: Results) -> int:
    """Size of one float32 gradient for each chunk that was timed."""
    return (results.n_timed + results.n_val) * results.n_params * 4


def timing_table(results: Results) -> Table:
    table = Table(box=None)
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_column("against plain", justify="right")
    plain = next(iter(results.seconds.values()))
    for name, seconds in results.seconds.items():
        table.add_row(name, f"{seconds:.3f}", f"{seconds / plain:.2f}x")
    return table


def ranking_table(results: Results) -> Table:
    """The chunks with the highest and the lowest scores."""
    order = results.scores.argsort(descending=True).tolist()
    ranks = [*range(SHOWN), *range(len(order) - SHOWN, len(order))]
    cosines = results.cosines(results.target)
    table = Table(box=None, expand=True)
    for name in ("rank", "score", "cosine"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("domain", no_wrap=True)
    table.add_column("text", no_wrap=True, overflow="ellipsis", ratio=1)
    for rank in ranks:
        i = order[rank]
        domain = results.pool.domains[i]
        table.add_row(
            str(rank + 1),
            f"{results.scores[i]:+.2f}",
            f"{cosines[i]:+.2f}",
            Text(domain, style="bold blue" if domain == results.target else ""),
            Text(snippet(results.pool.chunks[i])),
        )
        if rank == SHOWN - 1:
            table.add_row("...")
    return table


def grades_table(results: Results) -> Table:
    """How well the scores find the target, beside a score without direction and chance."""
    pool, target = results.pool, results.target
    rows = {
        "dot product": Grade.of(results.scores, pool, target),
        "cosine": Grade.of(results.cosines(target), pool, target),
        "gradient norm alone": Grade.of(results.norms, pool, target),
        "chance": Grade(pool.size / len(pool.domains), 0.5),
    }
    table = Table(box=None)
    table.add_column("")
    table.add_column(f"precision@{pool.size}", justify="right")
    table.add_column("AUROC", justify="right")
    for name, grade in rows.items():
        table.add_row(name, f"{grade.precision:.2f}", f"{grade.auroc:.2f}")
    return table


def every_domain_table(results: Results) -> Table:
    """AUROC with every domain as the target."""
    table = Table(box=None)
    table.add_column("")
    table.add_column("dot product", justify="right")
    table.add_column("cosine", justify="right")
    table.add_column("what it is")
    for domain, dots in results.dots.items():
        dot = Grade.of(dots, results.pool, domain).auroc
        cosine = Grade.of(results.cosines(domain), results.pool, domain).auroc
        table.add_row(domain, f"{dot:.2f}", f"{cosine:.2f}", DOMAINS[domain].about)
    return table


def snippet(chunk: Int[Tensor, " t"]) -> str:
    """A chunk as one printable line."""
    return " ".join(bytes(chunk.tolist()).decode(errors="replace").split())


# --- figure -------------------------------------------------------------------------------------


def plot_scores(results: Results, path: Path) -> None:
    """Write the figure: scores by domain, and mean cosines between all pairs of domains."""
    grade = Grade.of(results.scores, results.pool, results.target)
    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=(12.5, 5.4), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
        draw_distributions(left, results)
        draw_domains(right, results)
        figure.suptitle(
            f"{grade.auroc:.0%} of the time, a training chunk of {results.target!r} outscores one "
            "of another domain",
            x=0.01,
            ha="left",
            fontsize=15,
            fontweight="bold",
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    console.print(f"Figure: {path}")


def draw_distributions(axes: Axes, results: Results) -> None:
    """One row per domain: every chunk, and the quartiles."""
    order = results.order()[::-1]  # from below
    jitter = torch.Generator().manual_seed(0)
    for row, domain in enumerate(order):
        scores = results.scores[results.pool.members(domain)]
        color = TARGET if domain == results.target else OTHER
        heights = row + (torch.rand(len(scores), generator=jitter) - 0.5) * 0.5
        axes.scatter(scores, heights, s=22, color=color, alpha=0.55, linewidths=0)
        low, middle, high = scores.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        axes.plot([low, high], [row, row], color="black", linewidth=1.5, zorder=3)
        axes.plot(middle, row, "o", color="white", markeredgecolor="black", zorder=4)
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(order)), order)
    for label in axes.get_yticklabels():
        if label.get_text() == results.target:
            label.set(color=TARGET, fontweight="bold")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(
        r"score $\langle g_i,\, g_\mathrm{val}\rangle$, loss per unit of learning rate"
        "  (above zero: helps)"
    )
    axes.set_title(
        f"Scored by held-out {results.target!r}: a dot is a training chunk,\n"
        "a circle the median of its domain, a bar the middle half",
        loc="left",
    )


def draw_domains(axes: Axes, results: Results) -> None:
    """Mean cosine of every domain's chunks with every domain's validation gradient."""
    names = results.order()
    means = results.mean_cosines()
    limit = float(means.abs().max())
    axes.imshow(means.numpy(), cmap="PuOr_r", vmin=-limit, vmax=limit)
    for i, row in enumerate(means.tolist()):
        for j, value in enumerate(row):
            color = "white" if abs(value) > 0.65 * limit else "black"
            weight = "bold" if i == j else "normal"
            axes.text(
                j, i, f"{value:+.2f}", ha="center", va="center", color=color, fontweight=weight
            )
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("training chunks of")
    axes.set_ylabel("validation batch of")
    axes.set_title("Mean cosine for every pair of domains", loc="left")
