"""A progress bar: what is under way, tokens per second, and about how long it takes yet."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

EVERY, EVERY_IN_LOGS = 1.0, 30.0
"""Seconds after which the bar is drawn anew, though nothing was done: to a terminal, and to a file,
where each time is a line."""

PROVED = 5
"""How many times as long the first batch of a shape takes, about: it is proved."""


class Progress:
    """What a bar is told; without a bar, nothing happens."""

    def __init__(self, bar: Any = None) -> None:
        self._bar = bar
        self._begun, self._new = time.perf_counter(), False
        self._seen: set[Hashable] = set()
        self._tokens = {False: 0, True: 0}
        self._seconds = {False: 0.0, True: 0.0}

    def begin(self, what: str, shape: Hashable = None) -> None:
        """A batch begins. The first of its `shape` is proved, if shapes matter."""
        self._begun = time.perf_counter()
        self._new = shape is not None and shape not in self._seen
        self._seen.add(shape)
        if self._bar is not None:
            told = f"now {what}" + (", the first of this shape: proved" if self._new else "")
            self._bar.set_postfix_str(", ".join(x for x in (self._rate(), told) if x))

    def advance(self, samples: int, tokens: int) -> None:
        """So many samples are done; `tokens` is 0 where nothing was computed."""
        if tokens:
            self._tokens[self._new] += tokens
            self._seconds[self._new] += time.perf_counter() - self._begun
        if self._bar is not None:
            self._bar.set_postfix_str(self._rate(samples), refresh=False)
            self._bar.update(samples)

    def _rate(self, samples: int = 0) -> str:
        done, tokens = self._bar.n + samples, sum(self._tokens.values())
        seconds = sum(self._seconds.values())
        if not (done and tokens and seconds):
            return ""
        left = (self._bar.total - done) * tokens / done / self._usual()
        return f"{tokens / seconds:,.0f} tokens/s, about {duration(left)} left"

    def _usual(self) -> float:
        """Tokens per second of a batch that is not proved."""
        if self._seconds[False]:
            return self._tokens[False] / self._seconds[False]
        return PROVED * self._tokens[True] / self._seconds[True]


@contextmanager
def progress_bar(total: int, what: str, *, shown: bool) -> Iterator[Progress]:
    """A bar over samples, whose clock runs from the first moment on."""
    if not shown:
        yield Progress()
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    shape = "{l_bar}{bar}| {n_fmt}/{total_fmt} samples [{elapsed}{postfix}]"
    over = threading.Event()
    with tqdm(total=total, desc=what, bar_format=shape) as bar:

        def keep_drawing() -> None:
            while not over.wait(EVERY if sys.stderr.isatty() else EVERY_IN_LOGS):
                bar.refresh()

        drawing = threading.Thread(target=keep_drawing, daemon=True)
        drawing.start()
        try:
            yield Progress(bar)
        finally:
            over.set()
            drawing.join()


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
