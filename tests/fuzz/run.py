"""Random programs beside a loop: `make fuzz ARGS="--count 10000 --seed 0"`.

Prints the programs that fail, made as small as they go, and a table of counts. Exits with 1 where a
number is wrong or a call ends in anything but a number or an error of ghostfunc's own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from fuzz_play import Check, Invalid, play
from fuzz_program import Program, random_program
from fuzz_shrink import kinds, shrunk
from fuzz_source import source

FAILED_PROOF = re.compile(r"not those of (plain autograd|the gradients)")
"""What errors say of numbers that were made, and that are others than plain autograd's: refusals
say beforehand that there are none to be had."""


@dataclass
class Outcome:
    """What became of one program."""

    seed: int
    skipped: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    independent: Counter[str] = field(default_factory=Counter)
    """The errors where samples do not depend on each other: there is a right number."""
    refusals: dict[str, str] = field(default_factory=dict)
    """By error, the first message of those."""
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    """`(kinds, status and quantity, report)` of a program made small, for every status."""


def outcome(task: tuple[int, int, bool]) -> Outcome:
    """Play the program of one seed."""
    torch.set_num_threads(1)
    seed, count, shrink = task
    program = random_program(seed)
    out = Outcome(seed)
    try:
        checks = play(program, count=count)
    except Invalid as error:
        out.skipped = str(error)
        return out
    for check in checks:
        failed_proof = check.status == "refused" and FAILED_PROOF.search(check.verdict.said)
        out.counts["not proved" if failed_proof else check.status] += 1
        if check.status == "refused":
            error = check.verdict.said[1:].split(":")[0]
            error += ", not proved" if failed_proof else ""
            out.errors[error] += 1
            if not check.coupled:
                out.independent[error] += 1
                out.refusals.setdefault(error, f"{check.setting}: {check.verdict}")
    for status in ("wrong", "crashed"):
        failed = [c for c in checks if c.status == status]
        if failed:
            out.failures.append(_reported(program, failed, shrink=shrink))
    return out


def _reported(program: Program, failed: list[Check], *, shrink: bool) -> tuple[str, str, str]:
    small, check = shrunk(program, failed[0]) if shrink else (program, failed[0])
    asked = "\n".join(f"# {setting}" for setting in small.settings)
    head = f"# seed {program.seed}: {check.verdict}{' (coupled)' if check.coupled else ''}"
    others = Counter(c.verdict.quantity for c in failed)
    report = "\n".join([head, f"# also: {', '.join(others)}", asked, source(small)[0]])
    what = f"{check.status}{' (coupled)' if check.coupled else ''}"
    return "; ".join(kinds(small)), f"{what}: {check.verdict.quantity}", report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="programs")
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--quantities", type=int, default=5, help="per setting; 0 for all")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after these")
    parser.add_argument(
        "--refused", action="append", default=[], metavar="ERROR",
        help="print the programs that this error refuses though samples are independent",
    )  # fmt: skip
    parser.add_argument("--shrink", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()

    tasks = [(options.seed + i, options.quantities, options.shrink) for i in range(options.count)]
    outcomes: list[Outcome] = []
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for one in pool.imap_unordered(outcome, tasks, chunksize=4):
            outcomes.append(one)
            for name, what, report in one.failures:
                print(f"--- {what}\n# {name}\n{report}\n", flush=True)
            for error in (x for x in one.refusals if x.split(",")[0] in options.refused):
                program = random_program(one.seed)
                asked = "\n".join(f"# {setting}" for setting in program.settings)
                head = f"--- refused: seed {one.seed}, setting {one.refusals[error]}"
                print(f"{head}\n{asked}\n{source(program)[0]}\n", flush=True)
            if time.monotonic() - began > options.seconds:
                pool.terminate()
                break
    return table(outcomes, time.monotonic() - began)


def table(outcomes: list[Outcome], seconds: float) -> int:
    """Print the counts; 1 if a check failed."""
    counts = sum((o.counts for o in outcomes), Counter())
    errors = sum((o.errors for o in outcomes), Counter())
    independent = sum((o.independent for o in outcomes), Counter())
    skipped = [o for o in outcomes if o.skipped]
    failing = [o for o in outcomes if o.failures]
    print("programs           ", len(outcomes))
    print("  skipped          ", len(skipped), " (plain torch cannot run them)")
    print("  with a failure   ", len(failing))
    print("checks             ", sum(counts.values()))
    for status in ("right", "refused", "not proved", "wrong", "crashed"):
        print(f"  {status:17}", counts[status])
    print(f"  of independent samples: {sum(independent.values())} refused, by")
    for error, count in errors.most_common():
        print(f"    {error:29} {independent[error]:6}  (of {count} in all)")
    print(f"seconds             {seconds:.0f}")
    return int(bool(counts["wrong"] + counts["crashed"]))


if __name__ == "__main__":
    sys.exit(main())
