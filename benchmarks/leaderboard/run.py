"""Run the leaderboard: every method on every model, against models trained on parts of the data.

python benchmarks/leaderboard/run.py                    # three seeds: 60 minutes on two cores
python benchmarks/leaderboard/run.py --quick            # one seed, fewer models: 5 minutes
python benchmarks/leaderboard/run.py --tasks mlp gpt2

What was measured is kept in outputs/leaderboard: the same command goes on where it was cut, and
--kept makes the tables of what there is. --add leaves in recorded.json what is not measured anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import warnings
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

HERE = Path(__file__).resolve().parent
# A peer may bring a package called `examples`, so ours are imported by file.
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "examples")]

import torch
from keep import Keep
from measure import Measured, measured, rank_agreement
from methods import LEFT_OUT, METHODS, Method
from peers import MODULES, PEERS
from retrain import datamodeling_scores, query_losses, retrained, subsets
from tasks import TASKS, Task

import ghostfunc as gf
from ghostfunc.unrolled import Trained

KEPT = HERE.parents[1] / "outputs" / "leaderboard"

LIMIT = 3600.0
"""Seconds after which a method is stopped."""


def evaluate(
    task: Task, seed: int, only: list[str], keep: Keep, *, measuring: bool
) -> dict[str, Any]:
    """All methods on one trained model; those that were measured before, if not `measuring`."""
    trained = gf.unrolled.train(task.training(), keep_every=12)
    truth = {}
    for share in LEFT_OUT:
        start = perf_counter()
        truth[f"{share:g}"] = keep.truth(f"{share:g}", lambda s=share: retraining(task, s, seed))
        say(task, seed, f"without {share:g}", perf_counter() - start)
    rows: dict[str, Any] = {}
    found: dict[str, torch.Tensor] = {}
    for name, method in {**METHODS, **PEERS}.items():
        if only and name not in only:
            continue
        source = "peers.py" if name in PEERS else "methods.py"
        make = partial(measure, task, trained, name, method) if measuring else None
        got = keep.method(name, source, make)
        if got is None:
            continue
        say(task, seed, name, got.seconds, got.error)
        if got.scores is None:
            rows[name] = {"error": got.error}
            continue
        found[name] = got.scores
        scores = got.scores.expand(len(LEFT_OUT), -1, -1)
        lds = {
            share: datamodeling_scores(of_share, kept, losses)
            for of_share, (share, (kept, losses)) in zip(scores, truth.items(), strict=True)
        }
        rows[name] = {"lds": lds, "seconds": got.seconds, "peak": got.peak, "load": got.load}
    out = {"seed": seed, "rows": rows, "n": task.n, "m": len(task.queries["y"])}
    out["parameters"] = sum(x.numel() for x in task.params.values())
    reference = found.get("EK-FAC, 16 draws")
    if reference is not None:  # one draw of labels is noisy: both are held against sixteen
        for name in ("EK-FAC", "kronfluence EK-FAC"):
            if name in found:
                rows[name]["agreement"] = rank_agreement(found[name], reference)
    return out


def retraining(task: Task, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which samples each model keeps, and its losses of the queries."""
    kept = subsets(task, share, seed)
    return kept, query_losses(task, retrained(task, kept.float()))


def measure(task: Task, trained: Trained, name: str, method: Method) -> Measured:
    """A method's scores and costs, and how busy the machine was."""
    got = measured(method, task, trained, limit=LIMIT, modules=MODULES.get(name, ()))
    return replace(got, load=os.getloadavg()[0])


def say(task: Task, seed: int, what: str, seconds: float, error: str = "") -> None:
    print(f"{task.name:20} seed {seed}  {what:20} {seconds:7.1f} s  {error}", flush=True)


def versions() -> dict[str, str]:
    out = {"python": platform.python_version()}
    for package in ("torch", "ghostfunc", "kronfluence", "traker", "dattri", "bergson"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "not installed"
    return out


def added(before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """`now`, with the rows of methods that it lacks from `before`; methods that are no more fall
    away."""
    if before is None:
        return now
    if before["quick"] != now["quick"]:
        raise ValueError("--add: --quick and full results have no table in common")
    out = {**now, "versions": {**now["versions"]}, "tasks": {}}
    for package, found in now["versions"].items():
        if found == "not installed":
            out["versions"][package] = before["versions"][package]
    for key in TASKS:
        task = {**before["tasks"].get(key, {}), **now["tasks"].get(key, {})}
        if task:
            by_seed: dict[int, dict[str, Any]] = {}
            for run in (*before["tasks"].get(key, {}).get("runs", []), *task["runs"]):
                rows = by_seed.get(run["seed"], {}).get("rows", {}) | run["rows"]
                kept = {name: rows[name] for name in {**METHODS, **PEERS} if name in rows}
                by_seed[run["seed"]] = {**run, "rows": kept}
            out["tasks"][key] = {**task, "runs": list(by_seed.values())}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer models and queries")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=[], help="only these, by name")
    parser.add_argument("--seeds", nargs="+", type=int, default=None)
    parser.add_argument("--keep", type=Path, default=KEPT, help="where results are kept")
    parser.add_argument("--kept", action="store_true", help="tables of what is kept, no more")
    parser.add_argument("--add", action="store_true", help="to what --out has, which stays")
    parser.add_argument("--out", type=Path, default=HERE / "recorded.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    start = perf_counter()
    before = json.loads(options.out.read_text()) if options.add else None
    results: dict[str, Any] = {
        "quick": options.quick,
        "versions": versions(),
        "processors": os.cpu_count(),
        "tasks": {},
    }
    for key in options.tasks:
        runs: list[dict[str, Any]] = []
        for seed in seeds:
            task = TASKS[key](seed, quick=options.quick)
            keep = Keep(options.keep, f"{key} {seed}{' quick' if options.quick else ''}")
            runs.append(evaluate(task, seed, options.methods, keep, measuring=not options.kept))
            results["tasks"][key] = {"name": task.name, "subsets": task.subsets, "runs": runs}
            options.out.write_text(json.dumps(added(before, results), indent=1) + "\n")
    print(f"{perf_counter() - start:.0f} s; written to {options.out}")
    from report import write

    write(added(before, results))


if __name__ == "__main__":
    main()
