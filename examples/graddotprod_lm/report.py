"""Show a run: `report.png`, and `report.html`, one page that needs nothing else.

    python -m examples.graddotprod_lm.report --run_dir results/GradDotProd-... --tokenizer bytes

Scores by domain over time, and the text of the best and the worst samples. `--tokenizer` is
`bytes`, the path of a `tokenizer.json`, or `ids` to show tokens as numbers.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tokenizers import Tokenizer

from examples.graddotprod_lm import atomic, figures, scores
from examples.graddotprod_lm.data import Rows, Split
from examples.graddotprod_lm.log import read_metrics
from examples.graddotprod_lm.models import ARCHITECTURES
from examples.strict_cli import parse

SHOWN = 10
"""Samples from either end."""

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Config:
    """What to show."""

    run_dir: Path
    """Folder of a GradDotProd run."""
    tokenizer: str
    """bytes, the path of a tokenizer.json, or ids."""


@dataclass(frozen=True)
class Sample:
    """A sample over the whole run.

    Attributes:
        score: sum of `lr * <g_i, g_val>` over the steps that saw it.
        seen: how many steps did.
        first, last: its loss at the first and the last of them.
    """

    domain: str
    sample: int
    score: float
    seen: int
    first: float
    last: float
    text: str


@dataclass(frozen=True)
class DomainRow:
    """A domain over the whole run; `before` and `after` are its validation loss."""

    domain: str
    colour: str
    seen: int
    score: float
    per_thousand: float
    negative: float
    before: float
    after: float


def decoder(name: str) -> Decode:
    """The function that turns tokens into text."""
    if name == "ids":
        return lambda ids: " ".join(map(str, ids))
    if name == "bytes":
        return lambda ids: bytes_to_text(ids)
    if not Path(name).is_file():
        raise FileNotFoundError(f"--tokenizer {name}: neither `bytes`, `ids` nor a file.")
    tokenizer = Tokenizer.from_file(name)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


def bytes_to_text(ids: list[int]) -> str:
    """Bytes as text; 256, which ends a document, as the sign for it."""
    documents: list[list[int]] = [[]]
    for token in ids:
        if token == 256:
            documents.append([])
        else:
            documents[-1].append(token)
    return "■".join(bytes(d).decode(errors="replace") for d in documents)


def ranked_samples(
    table: scores.Table, domains: list[str], read: Callable[[int, int], str]
) -> tuple[list[Sample], list[Sample], float]:
    """The best and the worst samples, best and worst first, and the share below zero."""
    key = np.stack([table.domain, table.sample], 1)
    names, which, seen = np.unique(key, axis=0, return_inverse=True, return_counts=True)
    which = which.ravel()
    sums = np.bincount(which, table.shapley)
    first = np.full(len(names), -1)
    first[which[::-1]] = np.arange(len(which))[::-1]
    last = np.full(len(names), -1)
    last[which] = np.arange(len(which))

    def samples(order: np.ndarray) -> Iterator[Sample]:
        for i in order.tolist():
            domain, sample = names[i].tolist()
            yield Sample(
                domain=domains[domain],
                sample=sample,
                score=float(sums[i]),
                seen=int(seen[i]),
                first=float(table.loss[first[i]]),
                last=float(table.loss[last[i]]),
                text=read(domain, sample),
            )

    order = np.argsort(sums, kind="stable")
    n = min(SHOWN, len(order) // 2)
    best, worst = samples(order[::-1][:n]), samples(order[:n])
    return list(best), list(worst), float((sums < 0).mean())


def domain_rows(
    table: scores.Table, domains: list[str], metrics: list[dict[str, Any]]
) -> list[DomainRow]:
    """The table of domains, the most helpful first."""
    readings = [m for m in metrics if "val_loss" in m]
    colours = figures.domain_colours(table, domains)
    rows = []
    for i, domain in enumerate(domains):
        mine = table.shapley[table.domain == i]
        if len(mine):
            rows.append(
                DomainRow(
                    domain=domain,
                    colour=colours[domain],
                    seen=len(mine),
                    score=float(mine.sum()),
                    per_thousand=float(1000 * mine.mean()),
                    negative=float((mine < 0).mean()),
                    before=readings[0][f"val_loss/{domain}"],
                    after=readings[-1][f"val_loss/{domain}"],
                )
            )
    return sorted(rows, key=lambda row: -row.per_thousand)


def write_report(config: Config) -> Path:
    """Write both files into the run's folder.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: the run is not over, has no scores, or its token files are gone.
    """
    path = config.run_dir / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path.absolute()} is not there: the run has to end first.")
    results = json.loads(path.read_text("utf-8"))
    domains, run = results["domains"], results["config"]
    table = scores.load(config.run_dir)
    metrics = read_metrics(config.run_dir / "metrics.jsonl")
    a = ARCHITECTURES[run["architecture"]]
    split = Split(
        Path(run["pile_dir"]), "train", domains, length=a.positions, vocab_size=a.vocab_size
    )
    decode = decoder(config.tokenizer)

    def read(domain: int, sample: int) -> str:
        row = Rows(np.array([domain]), np.array([sample]))
        return decode(split.read(row, torch.device("cpu"))[0].tolist())

    best, worst, negative = ranked_samples(table, domains, read)
    png = io.BytesIO()
    figures.draw(table, domains, metrics).savefig(png, format="png")
    atomic.write(config.run_dir / "report.png", lambda file: file.write(png.getvalue()))

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html").render(
        name=config.run_dir.name,
        run=run,
        steps=results["steps"],
        rows=len(table),
        negative=negative,
        val_loss=float(np.mean(list(results["val_loss"].values()))),
        test_loss=float(np.mean(list(results["test_loss"].values()))),
        domains=domain_rows(table, domains, metrics),
        best=best,
        worst=worst,
        figure=base64.b64encode(png.getvalue()).decode(),
    )
    out = config.run_dir / "report.html"
    atomic.write(out, lambda file: file.write(page.encode()))
    return out


if __name__ == "__main__":
    print(write_report(parse(Config, __doc__)))
