"""Floating-point operations and calls of torch, counted."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

FLOPS = Path(__file__).resolve().parents[1] / "benchmarks" / "flops.py"
_spec = importlib.util.spec_from_file_location("benchmark_flops", FLOPS)
assert _spec is not None
assert _spec.loader is not None
_flops: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_flops)


class Counted(_flops.CountFlops):  # type: ignore[misc]
    """Operations of products in `total`, calls in `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return super().__torch_dispatch__(func, types, args, kwargs)
