"""The commands that look again: select, report, verify, explain, project, query."""

from __future__ import annotations

import torch

from ghostfunc._transforms import explain as plans, verify as verification
from ghostfunc.cli import _data
from ghostfunc.cli._errors import UNVERIFIED, CommandError
from ghostfunc.cli._model import load
from ghostfunc.cli._options import Explain, Project, Query, Report, Select, Verify
from ghostfunc.cli._run_folder import TABLE, read_timeline
from ghostfunc.cli._scores_file import read_scores
from ghostfunc.data import Rows, Scores, write_rows
from ghostfunc.projection import kronecker_projection
from ghostfunc.report import write_report

JSON_LINES = (".jsonl", ".ndjson")


def _check_at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise CommandError(f"--{option} {value}: expected at least {least}.")


def select(options: Select) -> int:
    """Run the command."""
    _data.check_out(options.out, JSON_LINES, options.scores, options.pool)
    rows, scores = read_scores(options.scores, options.pool)
    if not 1 <= options.top <= len(scores):
        raise CommandError(f"--top {options.top}: expected between 1 and all {len(scores):,} rows.")
    best = (scores.bottom if options.lowest else scores.top)(options.top, by=options.by)
    write_rows(options.out, rows, best)
    print(f"{len(best):,} of {len(scores):,} rows written to {options.out}")
    return 0


def report(options: Report) -> int:
    """Run the command."""
    _data.check_out(options.out, (".html",))
    run = options.scores.is_dir()
    table = options.scores / TABLE if run else options.scores
    rows, scores = read_scores(table, options.pool)
    timeline = read_timeline(options.scores, rows, options.group) if run else None
    write_report(
        options.out, scores, rows, group=options.group, image=options.image, timeline=timeline
    )
    print(f"page to look at: {options.out}")
    return 0


def verify(options: Verify) -> int:
    """Run the command."""
    _check_at_least("count", options.count, 1)
    model = load(options.model, options.loading)
    _, samples = _data.read(options.pool, model, options.loading, None, quiet=True)
    batch = _data.batch_of(model, samples, options.count)
    found = verification.verify(model.model_fn, model.params, batch, batch)
    print(found)
    return 0 if found.ok else UNVERIFIED


def explain(options: Explain) -> int:
    """Run the command."""
    _check_at_least("count", options.count, 1)
    model = load(options.model, options.loading)
    _, samples = _data.read(options.pool, model, options.loading, None, quiet=True)
    batch = _data.batch_of(model, samples, options.count)
    print(plans.explain(model.model_fn, model.params, batch, batch))
    return 0


def project(options: Project) -> int:
    """Run the command."""
    from ghostfunc.store import Store, project_dataset

    _check_at_least("columns", options.columns, LEAST_RANK**2)
    _check_at_least("batch-size", options.batch_size, 1)
    model = load(options.model, options.loading)
    most = max(sum(x.numel() for x in model.params.values()), Project.columns)
    if options.columns > most:
        raise CommandError(
            f"--columns {options.columns:,}: expected at most {most:,}; there is nothing to gain "
            "above as many numbers as a row's gradient has."
        )
    _, samples = _data.read(options.pool, model, options.loading, None, quiet=options.quiet)
    projection = kronecker_projection(
        model.params,
        rank_total=options.columns,
        rank_min=LEAST_RANK,
        kind="orthonormal",
        seed=options.seed,
        compress=options.columns,
    )
    notes = {"pool": _data.content_of(options.pool), "max_length": model.max_length}
    if options.store.exists():
        store = Store.open(options.store, projection=projection, writable=True)
        if store.notes != notes:
            raise CommandError(
                f"{options.store} was made of other rows, or with another --max-length. Give "
                "those, or choose another folder."
            )
        store.check_model(CHECKPOINT, model.params)
    else:
        store = Store.create(
            options.store,
            projection=projection,
            n_samples=len(samples),
            dtype="float32",
            notes=notes,
        )
        store.add_checkpoint(CHECKPOINT, model.params)
    written = project_dataset(
        model.model_fn,
        model.params,
        samples,
        projection,
        store,
        checkpoint=CHECKPOINT,
        collate=model.collate,
        batch_size=options.batch_size,
        length=samples.length,
        progress=not options.quiet,
    )
    print(f"{written:,} rows projected to {projection.k:,} numbers each; {options.store} is whole")
    return 0


LEAST_RANK = 4
"""Numbers that are kept of either side of a matrix, at least."""

CHECKPOINT = "model"
"""The name of the only checkpoint in a store."""


def query(options: Query) -> int:
    """Run the command."""
    from ghostfunc.projection import ghost_project
    from ghostfunc.store import Store

    read = options.pool, options.target
    _data.check_out(options.out, JSON_LINES, *read)
    if options.report is not None:
        _data.check_out(options.report, (".html",), *read)
    if not options.store.exists():
        raise CommandError(f"{options.store}: there is no such store; ghostfunc project makes one.")
    store = Store.open(options.store)
    rows = Rows.open(options.pool)
    every = range(len(rows))
    _data.check_columns(rows, every, options.pool, group=options.group, image=options.image)
    _data.check_new(rows, every, None if options.report is None else options.image)
    if store.notes.get("pool") != _data.content_of(options.pool):
        raise CommandError(f"{options.store} was not made of the rows of {options.pool}.")
    if not 1 <= options.top <= store.n_samples:
        raise CommandError(f"--top {options.top}: expected between 1 and all {store.n_samples:,}.")
    model = load(options.model, options.loading)
    store.check_model(CHECKPOINT, model.params)
    _, target = _data.read(options.target, model, options.loading, None, quiet=True)
    parts = [
        ghost_project(model.model_fn, model.params, batch, store.projection)
        for batch in _data.target_batches(model, target)
    ]
    asked = torch.cat(parts).mean(0, keepdim=True)
    normalize = "cosine" if options.score == "cosine" else "none"
    found = store.topk(asked, options.top, normalize=normalize)
    columns = {f"{options.score}_higher_helps": found.scores[0]}
    facts = {"store": str(options.store), "target": str(options.target)}
    scores = Scores(found.ids[0].tolist(), columns, facts)
    write_rows(options.out, rows, scores)
    if options.report is not None:
        title = "Which samples are most like the target?"
        write_report(
            options.report, scores, rows, title=title, group=options.group, image=options.image
        )
        print(f"page to look at: {options.report}")
    print(f"{options.top:,} of {store.n_samples:,} rows written to {options.out}, best first")
    return 0
