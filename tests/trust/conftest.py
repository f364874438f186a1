from __future__ import annotations

from pathlib import Path

import pytest
from not_yet import expect_failures


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    expect_failures(items, Path(__file__).parent)
