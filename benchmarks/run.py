"""Run the bench: one process after the other, then the table and the plots.

make bench                                     # every row, 35 minutes or so
make bench ARGS="--quick --out outputs/bench"  # tiny shapes: does it run?
make bench ARGS="--rows 'step/256/*' '*opacus*' --out outputs/bench"
make bench ARGS="--onednn all --out outputs/all"  # all float32 products by oneDNN
make bench ARGS="--onednn ours"                # AMD: ours by oneDNN; docs/benchmarks/amd
make bench ARGS="--record"                     # and note this processor's ratios in recorded.json
make bench-check                               # fails if one is 10 % above that of this processor
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import recorded
import report
from rows import ROWS, Row
from verdict import Found, judge, regressions

HERE = Path(__file__).resolve().parent
RECORDED = {
    "none": HERE / "recorded.json",
    "all": HERE / "recorded-onednn.json",
    "ours": HERE / "recorded-amd.json",
}
"""Ratios that are held, by whose products are oneDNN's."""
OUT = HERE.parent / "docs" / "benchmarks"
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""Has glibc keep what is freed for the next step. Otherwise memory of large tensors goes back to
the system at every step and comes back as pages to be cleared, which takes up to a third of the
time of a step, plain or not, and depends on what ran before."""
TIMEOUT = 600
"""Seconds until a process is given up."""


def run_process(process: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What one process found; `{"fails": ...}` if it found nothing."""
    out = folder / f"{process.replace('/', '-')}.json"
    command = [sys.executable, str(HERE / "job.py"), process, "--out", str(out)]
    command += ["--seconds", str(args.seconds), "--threads", str(args.threads)]
    command += ["--onednn", args.onednn, *["--quick"] * args.quick]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
            env=os.environ if args.free_memory else {**os.environ, **KEEP_MEMORY},
        )
    except subprocess.TimeoutExpired:
        return {"fails": f"not done after {TIMEOUT} seconds"}
    if done.returncode:
        last = done.stderr.strip().splitlines() or ["without a word"]
        return {"fails": last[-1][:200]}
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", help="patterns of row names, such as 'step/512*'")
    parser.add_argument("--list", action="store_true", help="the names of all rows")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, whose ratios say nothing"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="timed, per process")
    parser.add_argument("--minutes", type=float, default=45.0, help="no process starts later")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--onednn",
        choices=report.ONEDNN,
        default="none",
        help="whose float32 products are oneDNN's: nobody's or everybody's, which is even, or "
        "ghostfunc's alone, which is what happens on processors of AMD's",
    )
    parser.add_argument(
        "--free-memory", action="store_true", help="leave glibc's handling of memory as it is"
    )
    parser.add_argument("--out", type=Path, help="folder of the page; docs/benchmarks")
    parser.add_argument("--record", action="store_true", help="write recorded.json")
    parser.add_argument("--check", action="store_true", help="compare with recorded.json")
    args = parser.parse_args()
    if args.list:
        print("\n".join(row.key for row in ROWS))
        return
    chosen = [row for row in ROWS if _is_chosen(row, args.rows)]
    if not chosen:
        parser.error(f"no row is called {args.rows}; --list prints all names")
    held, processor = RECORDED[args.onednn], recorded.processor()
    before = recorded.ratios(held, processor)
    if args.check and not before:
        known = ", ".join(recorded.read(held)) or "none"
        parser.error(
            f"{held.name} has no ratios of this processor ({processor}), only of these: {known}. "
            "Run with --record first."
        )
    found: Found = {}
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for process in dict.fromkeys(row.process for row in chosen):
            started = time.perf_counter()
            if started - begun > 60 * args.minutes:
                found[process] = {"fails": f"not started within {args.minutes:g} minutes"}
                continue
            found[process] = run_process(process, args, Path(folder))
            print(f"{process}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    keys = {row.key for row in chosen}
    lines = [judge(row.by(args.onednn), found if row in chosen else {}) for row in ROWS]
    for line in lines:
        if line.row.key in keys:
            print(report.text(line))
    if args.check:
        worse = regressions(lines, before)
        print("\n".join(worse) or "Nothing is 10 % above what is recorded.")
        sys.exit(bool(worse))
    out = args.out or (OUT / "amd" if args.onednn == "ours" else OUT)
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(
        report.markdown(lines, args.threads, onednn=args.onednn, memory_kept=not args.free_memory)
    )
    report.plot_ratios(lines, out / "ratios.png")
    report.plot_scaling(found, out / "scaling.png")
    if args.record:
        values = {x.row.key: round(x.value, 3) for x in lines if x.value is not None}
        recorded.record(held, processor, values)


def _is_chosen(row: Row, patterns: list[str] | None) -> bool:
    if patterns is None:
        return row.always
    return any(fnmatch(row.key, pattern) for pattern in patterns)


if __name__ == "__main__":
    main()
