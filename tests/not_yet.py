"""What is not right yet: tests that are expected to fail, listed in a folder's `not_yet.txt`.

A line is the name of a test, as pytest prints it, without its folder; a line that begins with `#`
is the reason of those below it. A test that passes and is still listed fails: take its line out.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def expect_failures(items: list[pytest.Item], folder: Path) -> None:
    """Mark the tests of a folder that are listed there."""
    reasons = listed(folder)
    for item in items:
        if folder in item.path.parents:
            name = f"{item.path.name}::{item.nodeid.split('::', 1)[1]}"
            if name in reasons:
                item.add_marker(pytest.mark.xfail(strict=True, reason=reasons[name]))


def listed(folder: Path) -> dict[str, str]:
    """The reason of every test that is expected to fail."""
    reasons: dict[str, str] = {}
    reason = ""
    for line in (folder / "not_yet.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            reason = line[1:].strip()
        elif line.strip():
            reasons[line.strip()] = reason
    return reasons
