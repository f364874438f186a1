"""From what the processes found to one line per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from exact import WRONG
from measure import ratio
from rows import Row
from scaling import TOLERANCE, slope

Found = dict[str, dict[str, Any]]
"""By process: what `job.py` wrote, or `{"fails": ...}`."""


@dataclass(frozen=True)
class Line:
    """A row with its figure.

    Attributes:
        value: None if it could not be had; then `note` says why.
        spread: quartiles, for times.
        error, base_error: relative errors against float64.
    """

    row: Row
    value: float | None = None
    spread: tuple[float, float] | None = None
    error: float | None = None
    base_error: float | None = None
    note: str = ""

    @property
    def met(self) -> str:
        if self.value is None:
            return "-"
        if self.error is not None and self.error > WRONG and "bf16" not in self.row.mine:
            return "wrong"
        if self.row.target is None:
            return "-"
        slack = TOLERANCE if self.row.figure == "slope" else 0.0
        return "met" if round(self.value, 2) <= self.row.target + slack else "not met"


def judge(row: Row, found: Found) -> Line:
    """The figure of one row."""
    process = found.get(row.process)
    if process is None:
        return Line(row, note="not run")
    if "fails" in process:
        return Line(row, note=f"fails: {process['fails']}")
    if row.figure == "slope":
        mine, base = (slope(process["sizes"], process[k]) for k in ("step", "plain"))
        return Line(row, mine, note=f"plain step {base:.2f}")
    mine, base = process[row.mine], process[row.base]
    errors = {"error": mine.get("error"), "base_error": base.get("error")}
    for name, one in ((row.mine, mine), (row.base, base)):
        if "fails" in one:
            return Line(row, note=f"{name} fails: {one['fails']}", **errors)
    note = ""
    if errors["base_error"] is not None and errors["base_error"] > WRONG:
        note = "the peer's numbers are wrong"
    if row.figure == "peak":
        megabytes = f"{mine['peak'] / 1e6:.0f} MB against {base['peak'] / 1e6:.0f} MB"
        return Line(row, mine["peak"] / base["peak"], note=megabytes, **errors)
    value, low, high = ratio(mine["times"], base["times"])
    if row.figure == "floor":
        work = mine["flops"] / base["flops"]
        note = f"needs {work:.2f} of the plain step's operations"
        value, low, high = value / work, low / work, high / work
    return Line(row, value, (low, high), note=note, **errors)


def regressions(lines: list[Line], recorded: dict[str, float]) -> list[str]:
    """What became more than 10 % worse than recorded, or cannot be had any more."""
    worse = []
    for line in lines:
        before = recorded.get(line.row.key)
        if before is None or line.note == "not run":
            continue
        if line.value is None:
            worse.append(f"{line.row.key}: {before:.2f} recorded, now {line.note}")
        elif line.value > 1.1 * before:
            worse.append(f"{line.row.key}: {before:.2f} recorded, now {line.value:.2f}")
    return worse
