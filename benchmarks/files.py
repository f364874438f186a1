"""Files of the package that one warm `ghost_dot_prod` enters, in their order: counted, not timed.

python benchmarks/files.py            # the table
python benchmarks/files.py --record   # and put it into docs/reading_the_code.md (held by tests)
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from in_docs import TableInDocs
from torch import nn

import ghostfunc as gf

PACKAGE = Path(gf.__file__).resolve().parent
IN_DOCS = TableInDocs(
    "reading_the_code.md", "<!-- files of a warm call -->\n", "<!-- end of files -->\n"
)

Calls = dict[str, Counter[str]]
"""By file, in the order that the files are entered: its functions, in theirs."""


@contextmanager
def watching() -> Iterator[Calls]:
    """Counts the functions of the package that are called meanwhile."""
    found: Calls = {}

    def note(frame: FrameType, event: str, arg: Any) -> None:
        path = Path(frame.f_code.co_filename)
        name = frame.f_code.co_name
        if event == "call" and path.is_relative_to(PACKAGE) and not name.startswith("<"):
            found.setdefault(path.relative_to(PACKAGE).as_posix(), Counter())[name] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(before)


def squared_errors(module: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, y = batch
    return (module(x) - y).square().sum((1, 2))


def warm_call(val_size: tuple[int, int] = (1, 5)) -> Calls:
    """What a call enters that was made before: of two linear layers, of 16 sequences of 5 positions
    and one of them, or of other validation samples."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    model_fn, params = gf.from_module(module, squared_errors)
    sizes = (16, 5), val_size
    train, val = ((torch.randn(n, t, 8), torch.randn(n, t, 4)) for n, t in sizes)
    for _ in range(2):
        gf.ghost_dot_prod(model_fn, params, train, val)
    with watching() as found:
        gf.ghost_dot_prod(model_fn, params, train, val)
    return found


def table() -> str:
    """The table, in Markdown: every file with the function that is called first."""
    lines = ["| | file | enters by | what it is |", "| --- | --- | --- | --- |"]
    for number, (file, functions) in enumerate(warm_call().items(), 1):
        doc = ast.get_docstring(ast.parse((PACKAGE / file).read_text())) or ""
        what = " ".join(doc.split("\n\n")[0].split())
        link = f"[`{file.removesuffix('.py')}`](../ghostfunc/{file})"
        lines.append(f"| {number} | {link} | `{next(iter(functions))}` | {what} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    IN_DOCS.main(__doc__, table)
