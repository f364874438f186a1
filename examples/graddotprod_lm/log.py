"""What a run says: to people, to a log of JSON lines, and to a table of metrics."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from examples.graddotprod_lm import atomic

logger = logging.getLogger("graddotprod_lm")


class JsonLines(logging.Formatter):
    """One record a line: time, level, rank, message, and the fields given as `extra`."""

    STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"asctime", "message"}

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname,
            "rank": self.rank,
            "message": record.getMessage(),
        }
        line |= {k: v for k, v in vars(record).items() if k not in self.STANDARD}
        return json.dumps(line, default=str)


def set_up(run_dir: Path, rank: int) -> None:
    """Log to the terminal (rank 0 all, others from warnings on) and to `log-rank<r>.jsonl`."""
    screen = logging.StreamHandler()
    screen.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    screen.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s rank {rank}: %(message)s"))
    file = logging.FileHandler(run_dir / f"log-rank{rank}.jsonl", encoding="utf-8")
    file.setFormatter(JsonLines(rank))
    close()
    logger.handlers = [screen, file]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def close() -> None:
    """Let go of the files."""
    for handler in logger.handlers:
        handler.close()
    logger.handlers = []


class Metrics:
    """`metrics.jsonl`: one object a line, each with the step it belongs to."""

    def __init__(self, run_dir: Path, *, after: int) -> None:
        """Go on after step `after`: lines of later steps will be written again."""
        self.path = run_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= after]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        atomic.write(self.path, lambda file: file.write(text.encode()))

    def add(self, step: int, **values: float) -> None:
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps({"step": step, **values}).encode() + b"\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a last one that was cut off."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]
