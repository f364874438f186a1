"""How commands speak: results to standard output, all else to standard error."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """A line of what is going on."""
    print(text, file=sys.stderr, flush=True)


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
