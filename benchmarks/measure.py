"""Time, memory and operations of contestants, run in turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from exact import error
from flops import CountFlops
from live_bytes import LiveBytes
from torch import Tensor

Answer = Tensor | dict[str, Tensor]
LEAST, MOST = 3, 11
"""Rounds of a measurement."""


@dataclass(frozen=True)
class Contestant:
    """One way to do some work.

    Attributes:
        run: does it once.
        answer: from what `run` returns to what is held against `expected`, in float64.
        counted: whether memory and operations are counted too, in two more runs.
    """

    run: Callable[[], Any]
    expected: Answer | None = None
    answer: Callable[[Any], Answer] = lambda result: result
    counted: bool = False


def measure(contestants: dict[str, Contestant], seconds: float) -> dict[str, dict[str, Any]]:
    """Everything about every contestant, for JSON.

    `times` are seconds of the same rounds for all. Rounds go on for about `seconds`, at least
    `LEAST` and at most `MOST` of them. A contestant that raises has `fails` instead.

    `peak` are bytes of tensors alive at one time, parameters excluded: a dispatch mode counts every
    tensor that is made. What kernels allocate inside is not seen.
    """
    found: dict[str, dict[str, Any]] = {}
    running: dict[str, Contestant] = {}
    for name, contestant in contestants.items():
        try:
            result = contestant.run()  # traces, compiles, warms up
            found[name] = {"times": []}
            if contestant.expected is not None:
                found[name]["error"] = error(contestant.answer(result), contestant.expected)
            running[name] = contestant
        except Exception as problem:  # of whatever kind: it is what is reported
            text = " ".join(str(problem).split())
            found[name] = {"fails": f"{type(problem).__name__}: {text}"[:200]}
        result = None
    for name, contestant in running.items():
        if contestant.counted:
            found[name].update(_counts(contestant))
    started = time.perf_counter()
    for turn in range(MOST):
        if turn >= LEAST and time.perf_counter() - started > seconds:
            break
        for name, contestant in running.items():
            start = time.perf_counter()
            contestant.run()
            found[name]["times"].append(time.perf_counter() - start)
    return found


def _counts(contestant: Contestant) -> dict[str, int]:
    with LiveBytes() as live:
        contestant.run()
    with CountFlops() as flops:
        contestant.run()
    return {"peak": live.peak, "flops": flops.total}


def ratio(times: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """The median and the quartiles of the ratios of single rounds: what slows a machine down for
    longer than a round slows down both sides."""
    low, middle, high = statistics.quantiles(
        (t / b for t, b in zip(times, base, strict=True)), n=4, method="inclusive"
    )
    return middle, low, high
