"""What is not right yet: tests that are expected to fail, listed in `not_yet.txt`.

A line is the name of a test below this folder, as pytest prints it; a line that begins with `#` is
the reason of those below it. A test that passes and is still listed fails: take its line out.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def listed() -> dict[str, str]:
    """The reason of every test that is expected to fail."""
    reasons: dict[str, str] = {}
    reason = ""
    for line in (HERE / "not_yet.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            reason = line[1:].strip()
        elif line.strip():
            reasons[line.strip()] = reason
    return reasons


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = listed()
    for item in items:
        if HERE in item.path.parents:
            name = f"{item.path.name}::{item.nodeid.split('::', 1)[1]}"
            if name in reasons:
                item.add_marker(pytest.mark.xfail(strict=True, reason=reasons[name]))
