"""A package whose public names are imported when the first of them is asked for (PEP 562)."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def names_of(
    package: str, file: str
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` of a package, from the imports in its stub.

    The stub is the only list of names: type checkers, documentation and this function read it.
    All names are imported together, so a package is empty or whole and nothing is half registered.

    Args:
        package: its `__name__`.
        file: its `__file__`; the stub is the `.pyi` beside it, with a line `from home import name
            as name` for every name.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    homes = {
        alias.name: node.module or package
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        namespace = vars(sys.modules[package])
        for each, home in homes.items():
            if home == package:
                importlib.import_module(f"{package}.{each}")  # sets the attribute
            else:
                namespace[each] = getattr(importlib.import_module(home), each)
        return namespace[name]

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return list(homes), find, list_names
