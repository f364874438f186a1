"""Ratios that were recorded, by processor: on another one, other things take a step's time."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TypeAlias

Ratios: TypeAlias = dict[str, float]


def processor() -> str:
    """What the system calls this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return names[0] if names else platform.machine()


def read(path: Path) -> dict[str, Ratios]:
    """All that is recorded, by a part of the processor's name."""
    found: dict[str, Ratios] = json.loads(path.read_text()) if path.exists() else {}
    return found


def ratios(path: Path, name: str) -> Ratios:
    """The ratios that are recorded of a processor; none if the processor is unknown."""
    return next((x for known, x in read(path).items() if known in name), {})


def record(path: Path, name: str, values: Ratios) -> None:
    """Add ratios of a processor, or put them in place of earlier ones."""
    found = read(path)
    known = next((x for x in found if x in name), name)
    found[known] = {**found.get(known, {}), **values}
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
