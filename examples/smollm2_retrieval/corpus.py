"""Eight kinds of real text that come with Python and the packages this example needs.

Nothing is downloaded and nothing is replaced: a domain that cannot be read is an error, which says
what to install.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

import numpy as np
import torch

from examples.demo_corpus import (
    DOMAINS as DEMO_DOMAINS,
    Corpus,
    TooShortError,
    cut,
    unique_paragraphs,
)

Encode = Callable[[str], list[int]]
"""Text to token ids, without special tokens."""

LICENSED = ("torch", "numpy", "transformers", "matplotlib", "scipy", "pillow")
"""Distributions whose licence texts are read."""

NO_SOURCES = "Use a Python that was installed with the sources of its standard library."


class CorpusError(Exception):
    """A domain cannot be read on this machine, or is too short."""


@dataclass(frozen=True)
class Source:
    """A kind of text.

    Attributes:
        about: what it is.
        read: its documents.
        missing: what to do where it cannot be read.
    """

    about: str
    read: Callable[[], Iterable[str]]
    missing: str


def files(root: Path, pattern: str) -> Iterator[str]:
    """The files below `root` that match, in the order of their names."""
    found = sorted(root.glob(pattern))
    if not found:
        raise FileNotFoundError(f"no {pattern} in {root}")
    for path in found:
        yield path.read_text(encoding="utf-8", errors="replace")


def package(name: str) -> Path:
    """Where an installed package lies."""
    with resources.as_file(resources.files(name)) as path:
        return path


def licences() -> Iterator[str]:
    """The licence texts in the metadata of `LICENSED`."""
    for name in LICENSED:
        kept = [
            file
            for file in metadata.files(name) or ()
            if ".dist-info" in str(file) and file.name.upper().startswith(("LICEN", "NOTICE"))
        ]
        if not kept:
            raise FileNotFoundError(f"no licence text in the metadata of {name}")
        for file in sorted(kept):
            yield file.read_text(encoding="utf-8")


SOURCES: dict[str, Source] = {
    "manual": Source(
        "prose: the language reference", DEMO_DOMAINS["manual"].read, missing=NO_SOURCES
    ),
    "code": Source("Python code: asyncio", DEMO_DOMAINS["asyncio"].read, missing=NO_SOURCES),
    "tables": Source("tables: code pages", DEMO_DOMAINS["charmaps"].read, missing=NO_SOURCES),
    "headers": Source(
        "C headers: numpy",
        lambda: files(Path(np.get_include(), "numpy"), "*.h"),
        missing="Install numpy from a wheel: pip install --force-reinstall numpy",
    ),
    "licences": Source(
        "licence texts: " + ", ".join(LICENSED),
        licences,
        missing="Run: pip install 'ghostfunc[examples,hf]'",
    ),
    "changelog": Source(
        "a changelog: IDLE",
        lambda: files(Path(sysconfig.get_path("stdlib"), "idlelib"), "[NH]*S*.txt"),
        missing="Install IDLE (Debian: apt install idle-python3.X; python.org has it included).",
    ),
    "datasets": Source(
        "descriptions of data sets: scikit-learn",
        lambda: files(package("sklearn.datasets.descr"), "*.rst"),
        missing="Run: pip install scikit-learn",
    ),
    "numbers": Source(
        "comma-separated numbers: scikit-learn",
        lambda: files(package("sklearn.datasets.data"), "*.csv"),
        missing="Run: pip install scikit-learn",
    ),
}


def build(
    sources: dict[str, Source],
    encode: Encode,
    *,
    chunk_tokens: int,
    n_pool: int,
    n_query: int,
    generator: torch.Generator,
) -> Corpus:
    """Chunks to score and held-out chunks to ask with, of every domain.

    Passages are either scored or held out, as in `examples.demo_corpus`.

    Args:
        sources: the domains, by name.
        encode: of the model's tokenizer.
        chunk_tokens: length of a chunk.
        n_pool, n_query: chunks of each kind in every domain.
        generator: shuffles passages and chunks.

    Raises:
        CorpusError: a domain is not on this machine, or too short.
    """
    train, held_out = {}, {}
    for name, source in sources.items():
        try:
            text = "\n\n".join(unique_paragraphs(source.read()))
            tokens = torch.tensor(encode(text))
            train[name], held_out[name] = cut(tokens, chunk_tokens, n_pool, n_query, generator)
        except (OSError, ImportError, TooShortError) as error:
            raise CorpusError(
                f"domain {name!r} ({source.about}): {error}. {source.missing}"
            ) from error
    return Corpus(train, held_out)
