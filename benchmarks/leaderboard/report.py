"""The leaderboard as Markdown tables and a figure, written into docs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from measure import interval

ROOT = Path(__file__).resolve().parents[2]
SHARES = {"0.05": "a twentieth", "0.1": "a tenth", "0.5": "half"}
"""What share of the samples retrained models do without, in words."""

BLUES = ("#c6dbef", "#6baed6", "#2171b5")
"""Colours of the shares, the darker the more is left out: told apart by lightness alone."""

PAGE = ROOT / "docs" / "leaderboard.md"
FIGURE = ROOT / "docs" / "images" / "leaderboard.png"


def write(results: dict[str, Any]) -> None:
    """Put the tables between the page's markers, and draw the figure."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.subn(
        r"(<!-- tables -->\n).*?(<!-- end of tables -->)",
        lambda m: m[1] + tables(results) + "\n" + m[2],
        text,
        flags=re.S,
    )
    if found[1] != 1:
        raise ValueError(f"{PAGE} has no place for the tables")
    PAGE.write_text(found[0], encoding="utf-8")
    draw(results)


def tables(results: dict[str, Any]) -> str:
    """One table per task, what was measured, and which figures are met."""
    parts = [_about(results)]
    for task in results["tasks"].values():
        parts.append(_table(task))
    parts.append(_verdicts(results))
    return "\n\n".join(parts)


def _about(results: dict[str, Any]) -> str:
    of_versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    runs = [run for task in results["tasks"].values() for run in task["runs"]]
    loads = [row["load"] for run in runs for row in run["rows"].values() if "load" in row]
    quick = "The quick part. " if results["quick"] else ""
    if not loads:
        return f"{quick}{of_versions}."
    return (
        f"{quick}Seconds and peaks were measured while {min(loads):.0f} to {max(loads):.0f} "
        f"processes (mean {sum(loads) / len(loads):.1f}) shared {results['processors']} "
        f"processors: compare them with each other, not with other machines. {of_versions}."
    )


def _table(task: dict[str, Any]) -> str:
    runs = task["runs"]
    first = runs[0]
    shares = " | ".join(f"{words} left out" for words in SHARES.values())
    lines = [
        f"**{task['name']}**: {first['parameters']:,} parameters, {first['n']} samples, "
        f"{first['m']} queries, {len(runs)} seed{'s' if len(runs) > 1 else ''}, "
        f"{task['subsets']} retrained models of each kind and seed.",
        "",
        f"| method | {shares} | seconds | peak | agreement |",
        f"| --- |{' ---: |' * (len(SHARES) + 3)}",
    ]
    for name, rows in by_name(task).items():
        errors = [row["error"] for row in rows if "error" in row]
        if errors:
            lines.append(f"| {name} | not run: {errors[0]} |{' |' * (len(SHARES) + 2)}")
            continue
        cells = [_lds(rows, share) for share in SHARES]
        cells.append(f"{sum(r['seconds'] for r in rows) / len(rows):.1f}")
        cells.append(f"{max(r['peak'] for r in rows) / 2**20:.0f} MB")
        agreements = [r["agreement"] for r in rows if "agreement" in r]
        mean = sum(agreements) / len(agreements) if agreements else None
        cells.append("" if mean is None else f"{mean:.2f}")
        seeds = "" if len(rows) == len(runs) else f" ({len(rows)} of {len(runs)} seeds)"
        lines.append(f"| {name}{seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _lds(rows: list[dict[str, Any]], share: str) -> str:
    mean, low, high = interval([row["lds"][share] for row in rows])
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _verdicts(results: dict[str, Any]) -> str:
    """The figures that are asked for, each met or not."""
    lines = ["| asked | found | |", "| --- | --- | --- |"]

    def judge(asked: str, found: str, met: bool) -> None:
        lines.append(f"| {asked} | {found} | {'met' if met else 'NOT met'} |")

    for key, task in results["tasks"].items():
        ran = {k: r for k, r in by_name(task).items() if not any("error" in x for x in r)}
        for share, words in SHARES.items():
            at = {name: interval([x["lds"][share] for x in r]) for name, r in ran.items()}
            if {"EK-FAC", "kronfluence EK-FAC"} <= at.keys():
                ours, theirs = at["EK-FAC"], at["kronfluence EK-FAC"]
                judge(
                    f"{task['name']}: EK-FAC at least kronfluence's, within its interval ({words})",
                    f"{ours[0]:.2f} against [{theirs[1]:.2f}, {theirs[2]:.2f}]",
                    ours[0] >= theirs[1],
                )
            if key == "gpt2" and {"EK-FAC", "dot product", "cosine"} <= at.keys():
                best = max(at["dot product"][0], at["cosine"][0])
                judge(
                    f"{task['name']}: EK-FAC above dot and cosine ({words})",
                    f"{at['EK-FAC'][0]:.2f} against {best:.2f}",
                    at["EK-FAC"][0] > best,
                )
            for name in (name for name in ran if name.startswith("metagradients")):
                if key == "mlp":
                    value = at[name][0]
                    asked = f"{task['name']}: {name} at least 0.9 ({words})"
                    judge(asked, f"{value:.2f}", value >= 0.9)
        if {"EK-FAC", "kronfluence EK-FAC"} <= ran.keys():
            times = [
                sum(x["seconds"] for x in ran[name]) / len(ran[name])
                for name in ("EK-FAC", "kronfluence EK-FAC")
            ]
            judge(
                f"{task['name']}: EK-FAC never slower than kronfluence",
                f"{times[0]:.1f} s against {times[1]:.1f} s",
                times[0] <= times[1],
            )
    return "\n".join(lines)


def by_name(task: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What there is of every method, seed by seed."""
    names = dict.fromkeys(name for run in task["runs"] for name in run["rows"])
    return {name: [r["rows"][name] for r in task["runs"] if name in r["rows"]] for name in names}


def draw(results: dict[str, Any], path: Path = FIGURE) -> None:
    """LDS of every method, a panel per task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(results["tasks"])
    figure, axes = plt.subplots(1, count, figsize=(4.2 * count, 4.2), squeeze=False)
    for axis, task in zip(axes[0], results["tasks"].values(), strict=True):
        ran = {k: r for k, r in by_name(task).items() if not any("error" in x for x in r)}
        for offset, (share, words) in enumerate(SHARES.items()):
            found = [interval([x["lds"][share] for x in r]) for r in ran.values()]
            places = [-i + 0.27 * (1 - offset) for i in range(len(found))]
            means = [m for m, _, _ in found]
            spread = [[m - low for m, low, _ in found], [high - m for m, _, high in found]]
            style: dict[str, Any] = {"color": BLUES[offset], "error_kw": {"lw": 0.8}}
            axis.barh(places, means, 0.25, xerr=spread, label=f"{words} left out", **style)
        axis.set_yticks([-i for i in range(len(ran))], list(ran), fontsize=8)
        axis.set_title(task["name"], fontsize=10)
        axis.set_xlabel("linear datamodeling score")
        axis.axvline(0, color="black", lw=0.6)
    figure.tight_layout(rect=(0, 0.06, 1, 1))  # the legend lies below: no bar is hidden
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(SHARES), fontsize=9, frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
