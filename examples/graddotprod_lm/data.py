"""Files of uint16 tokens, one of every domain and split, and the samples in them.

    <pile_dir>/train-<domain>.bin
    <pile_dir>/val/validation-<domain>.bin
    <pile_dir>/test/test-<domain>.bin
    <pile_dir>/domains.txt              one name a line; without it, the domains are the Pile's

A sample is `length` tokens in a row: sample k of a domain starts at token `k * length`. Which
samples a step sees is a function of seed and step alone: an interrupted run goes on as if nothing
had been.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

PILE_DOMAINS = (
    "Pile-CC",
    "PubMed Central",
    "Books3",
    "OpenWebText2",
    "ArXiv",
    "Github",
    "FreeLaw",
    "StackExchange",
    "USPTO Backgrounds",
    "PubMed Abstracts",
    "Gutenberg (PG-19)",
    "OpenSubtitles",
    "Wikipedia (en)",
    "DM Mathematics",
    "Ubuntu IRC",
    "BookCorpus2",
    "EuroParl",
    "HackerNews",
    "YoutubeSubtitles",
    "PhilPapers",
    "NIH ExPorter",
    "Enron Emails",
)

TOKEN = np.dtype("<u2")

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
PATTERNS = {
    "train": "train-{}.bin",
    "val": "val/validation-{}.bin",
    "test": "test/test-{}.bin",
}


def file_name(domain: str) -> str:
    """The domain as files are named: `/` to `-`, space to `_`, no parentheses."""
    return domain.translate(str.maketrans({"/": "-", " ": "_", "(": None, ")": None}))


def token_path(pile_dir: Path, split: SplitName, domain: str) -> Path:
    return pile_dir / PATTERNS[split].format(file_name(domain))


def domains_of(pile_dir: Path, count: int) -> list[str]:
    """The first `count` domains of `domains.txt`, or of the Pile where there is no such file.

    Raises:
        ValueError: there are not so many.
    """
    listed = pile_dir / "domains.txt"
    known = listed.read_text("utf-8").splitlines() if listed.exists() else list(PILE_DOMAINS)
    if count > len(known):
        raise ValueError(f"--num_domains {count} is more than the {len(known)} there are: {known}.")
    return known[:count]


def check_files(pile_dir: Path, domains: list[str]) -> None:
    """See that all files are there, before anything expensive begins.

    Raises:
        FileNotFoundError: lists every one that is not.
    """
    paths = [token_path(pile_dir, split, d).absolute() for split in SPLITS for d in domains]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} token files are missing:\n  "
            + "\n  ".join(missing)
            + "\nprepare_data.py makes them from text; domains other than the Pile's are listed in "
            f"{(pile_dir / 'domains.txt').absolute()}."
        )


@dataclass(frozen=True)
class Rows:
    """Samples by name.

    Attributes:
        domain: `[n]`, places in the list of domains.
        sample: `[n]`, which sample of the domain's training file.
    """

    domain: np.ndarray
    sample: np.ndarray

    def __len__(self) -> int:
        return len(self.domain)

    def part(self, rank: int, size: int) -> Rows:
        """The rows of one of `size` processes."""
        n = len(self) // size
        return Rows(*(x[rank * n : (rank + 1) * n] for x in (self.domain, self.sample)))


class Split:
    """The samples of all domains in one split."""

    def __init__(
        self, pile_dir: Path, name: SplitName, domains: list[str], *, length: int, vocab_size: int
    ) -> None:
        self.name, self.domains, self.vocab_size = name, domains, vocab_size
        self.paths = [token_path(pile_dir, name, d) for d in domains]
        self.tokens = []
        for path in self.paths:
            n = path.stat().st_size // TOKEN.itemsize // length
            if n == 0:
                raise ValueError(f"{path} is shorter than one sample of {length} tokens.")
            whole = np.memmap(path, TOKEN, mode="r")
            self.tokens.append(whole[: n * length].reshape(n, length))
        self.sizes = np.array([len(x) for x in self.tokens])

    def draw(self, n: int, *, seed: int, step: int) -> Rows:
        """`n` samples, with replacement: a domain, all alike, then a sample of it."""
        rng = np.random.default_rng([seed, SPLITS.index(self.name), step])
        domain = rng.integers(len(self.tokens), size=n)
        return Rows(domain, (rng.random(n) * self.sizes[domain]).astype(np.int64))

    def of_domain(self, domain: int, n: int) -> Rows:
        """Up to `n` samples of a domain, spread evenly over its file."""
        size = int(self.sizes[domain])
        n = min(n, size)
        return Rows(np.full(n, domain), np.arange(n) * size // n)

    def read(self, rows: Rows, device: torch.device) -> Tensor:
        """The tokens of samples, `[n, length]`.

        Raises:
            ValueError: a token is not in the model's vocabulary.
        """
        pairs = zip(rows.domain, rows.sample, strict=True)
        tokens = np.stack([self.tokens[d][k] for d, k in pairs]).astype(np.int64)
        if tokens.max() >= self.vocab_size:
            where = int(rows.domain[tokens.max(1).argmax()])
            raise ValueError(
                f"{self.paths[where]} has token {tokens.max()}, beyond the model's vocabulary of "
                f"{self.vocab_size}. Was it made with another tokenizer than the architecture's?"
            )
        return torch.from_numpy(tokens).to(device)
