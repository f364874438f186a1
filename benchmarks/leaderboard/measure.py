"""Time and memory of a method, in a process of its own; intervals by bootstrap."""

from __future__ import annotations

import importlib
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """Scores with what they cost, or the error that came instead.

    Attributes:
        seconds: of the processor, by this process: other processes do not count.
        peak: bytes of the process beyond those at its start.
        load: processes that wanted a processor at that time, this one among them.
    """

    scores: Tensor | None
    seconds: float = 0.0
    peak: int = 0
    error: str = ""
    load: float = 0.0


def measured(
    f: Callable[..., Tensor], *args: Any, limit: float, modules: Sequence[str] = ()
) -> Measured:
    """Run a method in a fork of this process, which ends with it. `modules` are imported first, and
    cost nothing."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "result.pt")
        process = multiprocessing.get_context("fork").Process(
            target=_child, args=(path, f, args, modules)
        )
        process.start()
        process.join(limit)
        if process.is_alive():
            process.terminate()
            process.join()
            return Measured(None, error=f"not finished after {limit:.0f} s")
        if not path.exists():
            return Measured(None, error=f"the process ended with code {process.exitcode}")
        return Measured(**torch.load(path))


def _child(
    path: Path, f: Callable[..., Tensor], args: tuple[Any, ...], modules: Sequence[str]
) -> None:
    before, start = 0, process_time()
    result: dict[str, Any]
    try:
        for name in modules:
            importlib.import_module(name)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, start = _status("VmRSS"), process_time()
        scores = f(*args)
        result = {"scores": scores.detach().double().contiguous()}
    except Exception as error:
        last = traceback.format_exception_only(error)[-1].strip()
        result = {"scores": None, "error": last.splitlines()[0][:300]}
    result |= {"seconds": process_time() - start, "peak": max(0, _status("VmHWM") - before)}
    torch.save(result, path)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def interval(values: Sequence[Sequence[float]], *, draws: int = 2000) -> tuple[float, float, float]:
    """Mean, and the bounds of 95 %: seeds are drawn again, and queries within them."""
    g = torch.Generator().manual_seed(0)
    table = [torch.tensor(v, dtype=torch.float64) for v in values]
    means = []
    for _ in range(draws):
        seeds = torch.randint(len(table), (len(table),), generator=g).tolist()
        drawn = [table[s][torch.randint(len(table[s]), table[s].shape, generator=g)] for s in seeds]
        means.append(torch.cat(drawn).mean())
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return float(torch.cat(table).mean()), low, high


def rank_agreement(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation over training samples, mean over the queries."""
    from scipy.stats import spearmanr

    pairs = zip(a.mT, b.mT, strict=True)
    each = [float(spearmanr(x.numpy(), y.numpy()).statistic) for x, y in pairs]
    return sum(each) / len(each)
