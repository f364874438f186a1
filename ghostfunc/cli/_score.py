"""`ghostfunc score`: the rows of a pool that lower the loss of a target."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ghostfunc._base.errors import PositionAxisError
from ghostfunc._base.types import PyTree
from ghostfunc._base.whole_files import half_written, write_whole
from ghostfunc._transforms.grads import direction
from ghostfunc._transforms.verify import verify
from ghostfunc.cli import _data
from ghostfunc.cli._curvature import DONE, STATE, influence_direction
from ghostfunc.cli._errors import UNVERIFIED, CommandError
from ghostfunc.cli._inputs import Inputs
from ghostfunc.cli._model import load
from ghostfunc.cli._options import Curvature, Score
from ghostfunc.cli._plan import plan, shares
from ghostfunc.cli._say import say
from ghostfunc.cli._scores_file import POOL_CONTENT
from ghostfunc.cli._torchrun import group_of_torchrun
from ghostfunc.curvature._errors import check_count, check_damping
from ghostfunc.data import Encoded, Scores, find_token_budget, score_dataset, write_rows
from ghostfunc.data._parts import read_recipe
from ghostfunc.data._processes import Processes
from ghostfunc.data._progress import progress_bar
from ghostfunc.report import Heat, write_report

JSON_LINES = (".jsonl", ".ndjson")
KEPT = ("config.json", "run.json", "part-??????.npz", DONE, STATE)
"""Names of the files that a run has in its folder."""

HEAT = 10
"""How many best and how many worst samples the page shows with their tokens' shares, by default."""

ASIDE, TARGET_ASIDE = ".set-aside.jsonl", ".target-set-aside.jsonl"


def score(options: Score) -> int:
    """Run the command. Processes of torchrun score the pool together, and rank 0 writes."""
    folder = options.out.with_suffix(".run")
    processes = Processes(group_of_torchrun(), "ghostfunc score")
    with processes.phase("reading the model and the rows"):
        _check(options, folder)
        inputs = _read(options, folder, writes=processes.first)
    budget = processes.of_first(inputs.token_budget, "agreeing on the token budget")
    inputs = replace(inputs, token_budget=budget)
    if options.verify and not _verified(inputs, options.verify):
        return UNVERIFIED
    if options.dry_run:
        print(plan(inputs, options))
        return 0
    config = _as_json(options)
    with processes.phase("computing the gradient of the target"):
        if processes.first:
            _write_text(folder / "config.json", config)
        u = _direction(inputs, options, folder)
    scores = _score(inputs, options, u, folder)
    if not processes.first:
        return 0
    best = scores.top(options.top, by=f"{options.score}_higher_helps")
    write_rows(options.out, inputs.rows, best)
    if options.scores is not None:
        scores.to_parquet(options.scores)
    if options.report is not None:
        _report(inputs, scores, options, u)
    _write_text(options.out.with_suffix(".config.json"), config)
    _remove(folder)
    print(_summary(scores, best, options))
    return 0


def _remove(folder: Path) -> None:
    """Remove what a run has left in its folder, half-written files of deaths included, and the
    folder if nothing else is there."""
    for place in (folder / "curvature", folder):
        for pattern in (*KEPT, *map(half_written, KEPT)):
            for path in place.glob(pattern):
                path.unlink()
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def _check(options: Score, folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"{folder}: it is no folder, where the parts of the run go.")
    config = options.out.with_suffix(".config.json")
    if config.is_dir():
        raise CommandError(f"{config} is a folder; expected a file to write.")
    read = options.pool, options.target
    _data.check_out(options.out, JSON_LINES, *read)
    if options.scores is not None:
        _data.check_out(options.scores, (".parquet",), *read)
    if options.report is not None:
        _data.check_out(options.report, (".html",), *read)
    for ending in (ASIDE, TARGET_ASIDE):
        _data.check_kept(options.out.with_suffix(ending), *read)
    if options.top < 1:
        raise CommandError(f"--top {options.top}: expected at least 1.")
    _check_page(options)
    if options.verify < 0:
        raise CommandError(f"--verify {options.verify}: expected a number of rows, 0 for none.")
    if options.score == "influence":
        check_damping(options.curvature.damping)
        check_count("curvature_rows", options.curvature.curvature_rows)
    else:
        _check_unused(options)
    started = _stopped(folder) is not None
    if started and not (options.resume or options.dry_run):
        raise CommandError(
            f"{folder} holds a run that was stopped. Add --resume to go on with it, or remove the "
            "folder to start anew."
        )
    if options.resume and not started:
        raise CommandError(
            f"--resume: there is no stopped run in {folder}. Leave --resume out to start one."
        )


def _check_page(options: Score) -> None:
    """Raise where an option of the page is wrong, or there is no page."""
    if options.heat is not None and options.heat < 0:
        raise CommandError(f"--heat {options.heat}: expected a number of samples, 0 for none.")
    if options.heat and options.score == "cosine":
        raise CommandError(
            f"--heat {options.heat} with --score cosine: a cosine is no sum over tokens, which "
            "have no share in it. Leave --heat out."
        )
    for name in ("heat", "group", "image"):
        given = getattr(options, name)
        if given is not None and options.report is None:
            raise CommandError(
                f"--{name} {given} says what the page shows, and there is none: add --report "
                f"page.html, or leave --{name} out."
            )


def _check_unused(options: Score) -> None:
    """Raise where an option is given that this score has no use for."""
    for field in fields(Curvature):
        given = getattr(options.curvature, field.name)
        if given != field.default:
            raise CommandError(
                f"--{field.name.replace('_', '-')} {given}: it belongs to --score influence; this "
                f"is --score {options.score}."
            )


def _stopped(folder: Path) -> Path | None:
    """Where a run that was stopped says what it is; None if there is none."""
    found = (place for place in (folder, folder / "curvature") if (place / "run.json").exists())
    return next(found, None)


def _read(options: Score, folder: Path, *, writes: bool) -> Inputs:
    model = load(options.model, options.loading)
    how: dict[str, Any] = {"quiet": options.quiet, "writes": writes}
    aside = options.out.with_suffix(ASIDE)
    rows, pool = _data.read(options.pool, model, options.loading, aside, **how)
    aside = options.out.with_suffix(TARGET_ASIDE)
    _, target = _data.read(options.target, model, options.loading, aside, **how)
    _tell_shared(pool, target, options)
    if options.top > len(pool):
        raise CommandError(
            f"--top {options.top}: {options.pool} has {len(pool):,} rows to choose from."
        )
    _data.check_columns(rows, pool.rows, options.pool, group=options.group, image=options.image)
    _data.check_new(rows, pool.rows, None if options.report is None else options.image)
    budget = options.token_budget
    if budget is None and (stopped := _stopped(folder)) is not None:
        budget = int(read_recipe(stopped)["token_budget"])  # memory may be another now
    if budget is None:
        few = _data.batch_of(model, pool, 2)
        tokens = few["input_ids"].numel()
        budget = find_token_budget(model.model_fn, model.params, few, tokens=tokens)
        say(f"batches of up to {budget:,} tokens (--token-budget {budget})")
    return Inputs(model, rows, pool, target, budget)


def _tell_shared(pool: Encoded, target: Encoded, options: Score) -> None:
    """Rows of the target in the pool are found for a reason that teaches nothing."""
    asked = {x.tobytes() for x in target.tokens}
    shared = sum(x.tobytes() in asked for x in pool.tokens)
    if shared:
        say(
            f"note: {shared:,} rows of {options.pool} are rows of {options.target} too; they tend "
            "to come first."
        )


def _verified(inputs: Inputs, count: int) -> bool:
    model = inputs.model
    train, val = (_data.batch_of(model, x, count) for x in (inputs.pool, inputs.target))
    report = verify(model.model_fn, model.params, train, val)
    say(str(report))
    return report.ok


def _direction(inputs: Inputs, options: Score, folder: Path) -> PyTree:
    """What gradients are multiplied with."""
    model, target = inputs.model, inputs.target
    with progress_bar(len(target), "gradient of the target", shown=not options.quiet) as bar:
        u = direction(model.model_fn, model.params, _data.target_batches(model, target, bar))
    return influence_direction(inputs, options, u, folder) if options.score == "influence" else u


def _score(inputs: Inputs, options: Score, u: PyTree, folder: Path) -> Scores:
    model, influence = inputs.model, options.score == "influence"
    recipe = {
        "pool": _data.content_of(options.pool),
        "target": _data.content_of(options.target),
        "max_length": model.max_length,
        "rows": len(inputs.pool),
    }
    scores = score_dataset(
        model.model_fn,
        model.params,
        inputs.pool,
        direction=u,
        quantities=("dot" if influence else options.score, "loss"),
        collate=model.collate,
        length=inputs.pool.length,
        token_budget=inputs.token_budget,
        ids=inputs.pool.rows,
        resume=folder,
        recipe=recipe,
        progress=not options.quiet,
        group=group_of_torchrun(),
    )
    facts: dict[str, Any] = {
        name: str(getattr(options, name)) for name in ("model", "pool", "target")
    }
    facts[POOL_CONTENT] = recipe["pool"]
    facts = {**facts, "target_rows": len(inputs.target), **scores.facts}
    columns = scores.columns
    if influence:  # a dot product along another direction
        facts |= {"score": "influence", **asdict(options.curvature)}
        columns = {name.replace("dot", "influence"): x for name, x in columns.items()}
    return Scores(scores.ids, columns, facts)


def _report(inputs: Inputs, scores: Scores, options: Score, u: PyTree) -> None:
    """The page, with the shares of tokens for a few samples of either end."""
    assert options.report is not None
    most = min(HEAT if options.heat is None else options.heat, len(scores))
    ends = [*scores.top(most).ids, *scores.bottom(most).ids] if most else []
    heat: dict[int, Heat] = {}
    if options.score != "cosine" and ends:
        try:
            rows = [int(str(row)) for row in dict.fromkeys(ends)]
            heat = shares(inputs, u, rows, shown=not options.quiet)
        except PositionAxisError as error:
            say(f"the page shows no shares of tokens: {error}")
    write_report(
        options.report, scores, inputs.rows, heat=heat, group=options.group, image=options.image
    )


def _summary(scores: Scores, best: Scores, options: Score) -> str:
    column = scores.columns[best.ranking]
    lines = [
        f"{len(best):,} of {len(scores):,} rows written to {options.out}, best first",
        f"{best.ranking}: {float(column.min()):.4g} to {float(column.max()):.4g}; of those chosen "
        f"{float(best[best.ranking].min()):.4g} and above; "
        f"{float((column > 0).double().mean()):.0%} of the pool above zero",
    ]
    if options.scores is not None:
        lines.append(f"scores of all rows: {options.scores}")
    if options.report is not None:
        lines.append(f"page to look at: {options.report}")
    lines.append(
        f"to run this again: ghostfunc score --config {options.out.with_suffix('.config.json')}"
    )
    return "\n".join(lines)


def _as_json(options: Score) -> str:
    """The options as `--config` reads them, without those that are about one run only."""
    found: dict[str, Any] = asdict(options)
    for name in ("resume", "dry_run", "verify"):
        del found[name]
    return json.dumps(found, indent=1, default=str) + "\n"


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
