"""A progress bar with tokens per second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, what: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A function that is told of samples and tokens that are done."""
    if not shown:
        yield lambda samples, tokens: None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, unit=" samples", desc=what) as bar:
        seen = 0

        def advance(samples: int, tokens: int) -> None:
            nonlocal seen
            seen += tokens
            elapsed = bar.format_dict["elapsed"]
            if elapsed and seen:
                bar.set_postfix_str(f"{seen / elapsed:,.0f} tokens/s", refresh=False)
            bar.update(samples)

        yield advance
