"""Real text that every CPython carries, as chunks of bytes in six domains."""

from __future__ import annotations

import _pydecimal
import html.entities
import locale
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from inspect import getsource
from pydoc_data import topics
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

VOCAB_SIZE = 256
"""The tokens are bytes."""

PASSAGE = 16
"""Chunks in a passage: neighbours are trained on, or held out, together."""


@dataclass(frozen=True)
class Domain:
    """A kind of text, and where to read it."""

    about: str
    read: Callable[[], Iterable[str]]


def package_sources(package: str, prefix: str = "") -> Iterator[str]:
    """The source of every module of a package whose name starts with `prefix`."""
    for file in sorted(resources.files(package).iterdir(), key=lambda file: file.name):
        if file.name.startswith(prefix) and file.name.endswith(".py"):
            yield file.read_text(encoding="utf-8")


DomainName = Literal["manual", "asyncio", "decimal", "charmaps", "entities", "locales"]

DOMAINS: dict[DomainName, Domain] = {
    "manual": Domain(
        "prose of the language reference (pydoc_data.topics)", lambda: topics.topics.values()
    ),
    "asyncio": Domain("code of the asyncio package", lambda: package_sources("asyncio")),
    "decimal": Domain("code and doctests of the decimal module", lambda: [getsource(_pydecimal)]),
    "charmaps": Domain(
        "tables of code pages (encodings/cp*.py)", lambda: package_sources("encodings", "cp")
    ),
    "entities": Domain("tables of HTML entities", lambda: [getsource(html.entities)]),
    "locales": Domain("code and tables of the locale module", lambda: [getsource(locale)]),
}


@dataclass(frozen=True)
class Corpus:
    """Chunks of every domain: `[chunks, bytes]` each.

    Attributes:
        train: trained on.
        held_out: of passages that are not trained on.
    """

    train: dict[str, Int[Tensor, "n t"]]
    held_out: dict[str, Int[Tensor, "m t"]]


def load_corpus(
    *, chunk_bytes: int, n_train: int, n_held_out: int, generator: torch.Generator
) -> Corpus:
    """Cut every domain into passages, hold some out, and draw chunks of both kinds.

    Args:
        chunk_bytes: length of a chunk.
        n_train, n_held_out: chunks of each kind in every domain.
        generator: shuffles passages and chunks.

    Returns:
        The same number of chunks of every domain.

    Raises:
        ValueError: a domain has too little text, as in a Python installed without its sources.
    """
    train, held_out = {}, {}
    for name, domain in DOMAINS.items():
        text = "\n\n".join(unique_paragraphs(domain.read())).encode()
        used = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        try:
            train[name], held_out[name] = cut(used, chunk_bytes, n_train, n_held_out, generator)
        except TooShortError as error:
            raise ValueError(
                f"domain {name!r} ({domain.about}) has {error}, in bytes. Ask for fewer chunks, or "
                "use a Python that was installed with the sources of its standard library."
            ) from None
    return Corpus(train, held_out)


class TooShortError(ValueError):
    """A text has too few tokens for the chunks that are asked for."""


def cut(
    tokens: Int[Tensor, " t"],
    length: int,
    n_train: int,
    n_held_out: int,
    generator: torch.Generator,
) -> tuple[Int[Tensor, "n t"], Int[Tensor, "m t"]]:
    """Chunks to train on, and held-out ones of other passages, from one text.

    Raises:
        TooShortError: there are too few passages for both.
    """
    n_passages = len(tokens) // (PASSAGE * length)
    n_kept_out = n_passages // 5
    if n_kept_out * PASSAGE < n_held_out or (n_passages - n_kept_out) * PASSAGE < n_train:
        raise TooShortError(
            f"{len(tokens)} tokens here, too few for {n_train} + {n_held_out} chunks of {length}"
        )
    passages = tokens[: n_passages * PASSAGE * length].view(n_passages, PASSAGE, length)
    passages = passages[torch.randperm(n_passages, generator=generator)]
    held_out = draw(passages[:n_kept_out].flatten(0, 1), n_held_out, generator)
    return draw(passages[n_kept_out:].flatten(0, 1), n_train, generator), held_out


def unique_paragraphs(documents: Iterable[str]) -> Iterable[str]:
    """Paragraphs in their order, each once: the manual, for one, repeats whole sections."""
    return dict.fromkeys(
        paragraph for document in documents for paragraph in document.split("\n\n")
    )


def draw(chunks: Int[Tensor, "n t"], count: int, generator: torch.Generator) -> Tensor:
    """`count` chunks without replacement."""
    return chunks[torch.randperm(len(chunks), generator=generator)[:count]]
