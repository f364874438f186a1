"""Write the demo's six domains, text that every Python carries, as folders to prepare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from examples.demo_corpus import DOMAINS, unique_paragraphs
from examples.strict_cli import parse


@dataclass(frozen=True)
class Config:
    """Where to."""

    output_dir: Path
    """Gets one folder for each domain."""


def write(config: Config) -> None:
    for name, domain in DOMAINS.items():
        folder = config.output_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        text = "\n\n".join(unique_paragraphs(domain.read()))
        (folder / "text.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(parse(Config, __doc__))
