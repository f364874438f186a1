"""The options of every command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import tyro

Model: TypeAlias = tyro.conf.Positional[Path]


@dataclass(frozen=True)
class Loading:
    """How the model and the rows are read."""

    max_length: int = 2048
    """Tokens of a sample; longer ones are cut at the end."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Of the model's parameters."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto is cuda where there is one."""
    parameters: str = ""
    """Regular expression: only parameters with a matching name count. All by default."""
    bad_rows: Literal["stop", "set-aside"] = "stop"
    """Rows that cannot be used: stop before anything is computed, or write them to a file beside
    the output, with the reasons, and go on without them."""


@dataclass(frozen=True)
class Curvature:
    """Of `--score influence`: the curvature C, and how it is inverted."""

    damping: float = 0.1
    """What is added to C before it is inverted, in units of each parameter's mean eigenvalue."""
    relative_damping: bool = True
    """Otherwise the damping is in units of C itself, loss^2 per parameter^2."""
    curvature_rows: int = 2000
    """How many rows of the pool C is made of, evenly spaced; all where there are no more."""
    fisher: Literal["sampled", "empirical"] = "sampled"
    """Whose gradients C is the second moment of: those for labels drawn from the model, or those
    for the rows' own."""
    draws: int = 1
    """How many times labels are drawn for every row."""
    seed: int = 0
    """Of the draws."""
    max_side: int = 8192
    """The largest side of a matrix with an eigenbasis; larger ones stop the command."""
    diagonal: tuple[str, ...] = ()
    """Patterns of parameters, such as '*.lm_head.weight', whose larger sides keep their own axes
    instead."""


@dataclass(frozen=True)
class Score:
    """Score the rows of a pool by a target, and write the best.

    A row's score is the dot product (or cosine) of its loss's gradient g with the gradient u of the
    target's mean loss: above zero, a training step on it lowers the target's loss. Its influence is
    the product of g with (C + damping)^-1 u, C the curvature of the loss over the pool: above zero,
    training without it raises the target's loss.
    """

    model: Model
    """Folder of a Hugging Face causal language model with its tokenizer, or a .gguf file."""
    pool: Path
    """Rows to choose from: .jsonl, .parquet, or a folder of datasets.save_to_disk. Columns:
    messages, prompt and completion, or text."""
    target: Path
    """A few rows of what you want more of; columns as in the pool."""
    out: Path
    """Where the chosen rows go: .jsonl."""
    top: int = 100
    """How many rows to choose."""
    score: Literal["dot", "cosine", "influence"] = "dot"
    """What rows are ranked by. Dot products favour samples with large gradients, cosines do not;
    influence takes the curvature of the loss into account."""
    scores: Path | None = None
    """Where the scores of all rows go: .parquet."""
    report: Path | None = None
    """Where a page to look at goes: .html."""
    group: str | None = None
    """A column of the pool whose values make groups on the page (source, language, ...)."""
    image: str | None = None
    """A column of the pool with images, to be shown on the page."""
    heat: int | None = None
    """Samples of either end of which the page shows every token's share in the score; 10 unless
    said otherwise, none for cosines."""
    resume: bool = False
    """Go on with a run that was stopped."""
    dry_run: bool = False
    """Read everything, time one batch, print the plan, and stop."""
    verify: int = 0
    """Check that many rows against gradients by definition before anything else."""
    token_budget: int | None = None
    """Tokens of a batch, padding included; found by itself."""
    quiet: bool = False
    """No progress bars."""
    curvature: tyro.conf.OmitArgPrefixes[Curvature] = Curvature()
    loading: tyro.conf.OmitArgPrefixes[Loading] = Loading()


@dataclass(frozen=True)
class Select:
    """Choose rows by scores that were written before."""

    scores: tyro.conf.Positional[Path]
    """A file of --scores: .parquet."""
    pool: Path
    """The rows that were scored."""
    out: Path
    """Where the chosen rows go: .jsonl."""
    top: int = 100
    """How many rows to choose."""
    by: str | None = None
    """The column to rank by; by default the first that ranks."""
    lowest: bool = False
    """Choose the lowest instead, lowest first."""


@dataclass(frozen=True)
class Verify:
    """Check scores of a few rows against gradients by definition, parameter by parameter."""

    model: Model
    """Folder of a Hugging Face causal language model with its tokenizer, or a .gguf file."""
    pool: Path
    """Rows; as many as --count are used, from the first on."""
    count: int = 4
    """How many rows: gradients by definition are as large as that many models."""
    loading: tyro.conf.OmitArgPrefixes[Loading] = Loading()


@dataclass(frozen=True)
class Explain:
    """Print how each parameter's gradients would be contracted, and what it costs."""

    model: Model
    """Folder of a Hugging Face causal language model with its tokenizer, or a .gguf file."""
    pool: Path
    """Rows; as many as --count are used, from the first on."""
    count: int = 4
    """How many rows."""
    loading: tyro.conf.OmitArgPrefixes[Loading] = Loading()


@dataclass(frozen=True)
class Report:
    """Make a page to look at from scores that were written before."""

    scores: tyro.conf.Positional[Path]
    """A file of --scores, or of GhostTrainer: .parquet. The folder of a run of GhostTrainer adds a
    chart over training time, from its checkpoints."""
    pool: Path
    """The rows that were scored."""
    out: Path
    """Where the page goes: .html."""
    group: str | None = None
    """A column of the pool whose values make groups (source, language, ...)."""
    image: str | None = None
    """A column of the pool with images, to be shown on the page."""


@dataclass(frozen=True)
class Project:
    """Write the projected gradient of every row of a pool to a store, to be asked later."""

    model: Model
    """Folder of a Hugging Face causal language model with its tokenizer, or a .gguf file."""
    pool: Path
    """Rows: .jsonl, .parquet, or a folder of datasets.save_to_disk."""
    store: Path
    """Folder of the store; an unfinished one is gone on with."""
    columns: int = 4096
    """Numbers that are kept of every row, over all parameters."""
    seed: int = 0
    """Of the projection."""
    batch_size: int = 8
    """Rows of a backward pass."""
    quiet: bool = False
    """No progress bar."""
    loading: tyro.conf.OmitArgPrefixes[Loading] = Loading()


@dataclass(frozen=True)
class Query:
    """Find the rows of a store whose gradients are most like a target's."""

    model: Model
    """The folder that the store was made with."""
    store: Path
    """Folder of a store that `ghostfunc project` made."""
    pool: Path
    """The rows that were projected."""
    target: Path
    """Rows to ask with; their mean gradient is the query."""
    out: Path
    """Where the rows found go: .jsonl."""
    top: int = 100
    """How many rows to find."""
    score: Literal["dot", "cosine"] = "cosine"
    """What rows are ranked by."""
    report: Path | None = None
    """Where a page to look at goes: .html."""
    group: str | None = None
    """A column of the pool whose values make groups on the page."""
    image: str | None = None
    """A column of the pool with images, to be shown on the page."""
    loading: tyro.conf.OmitArgPrefixes[Loading] = Loading()


Command: TypeAlias = Score | Select | Verify | Explain | Report | Project | Query
