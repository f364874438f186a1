"""A counted table and its place in a page of the documentation."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


@dataclass(frozen=True)
class TableInDocs:
    """A table between two comments of a page.

    Attributes:
        page: name of the file in `docs/`.
        begin, end: the comments, each a line.
    """

    page: str
    begin: str
    end: str

    def recorded(self) -> str:
        """The table as the documentation has it."""
        return (DOCS / self.page).read_text().split(self.begin)[1].split(self.end)[0]

    def main(self, description: str | None, table: Callable[[], str]) -> None:
        """Print the table; `--record` writes it into the page."""
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--record", action="store_true", help=f"write docs/{self.page}")
        args = parser.parse_args()
        found = table()
        print(found)
        if args.record:
            path = DOCS / self.page
            before = self.begin + self.recorded()
            path.write_text(path.read_text().replace(before, self.begin + found))
