"""Write `docs/models.md`: what the three modes make of every model of the zoo.

python tests/write_models.py
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zoo import ZOO, Animal

import ghostfunc as gf
from ghostfunc._base.errors import WAYS_OUT

PAGE = Path(__file__).resolve().parent.parent / "docs/models.md"
HEAD = """# Models

What the three modes make of tiny random configurations of Hugging Face's own classes, unmodified,
with padding, ragged labels and tied weights where the class has them. `tests/write_models.py`
writes this page, and [tests/transforms/test_zoo.py](../tests/transforms/test_zoo.py) holds
every row of it against autograd, one sample at a time: dot products with one and with three
validation samples of another length, parameter by parameter, norms, and per-sample gradients.

- **ghost**, **jvp**: the largest error of `ghost_dot_prod`, of any sample in any parameter, against
  the loop over samples (`mode="materialized", vectorize=False`), relative to the parameter's
  largest value, or to a tenth of the largest of all parameters if that is more: the digits of a
  parameter that hardly matters are rounding noise of the whole.
- **materialized**: "loop" where only `vectorize=False` runs, "loop, vmap" where `vmap(grad)` does
  too.
- **parameters**: how many are scored, each of them compared; what the loss ignores scores zero.
- **float32 parts**: what the class computes in float32 although its parameters are float64. That
  limits the error; where there are none, it is float64's.

| model | ghost | jvp | materialized | parameters | float32 parts | remarks |
| --- | --- | --- | --- | --- | --- | --- |
"""
FOOT = """
Where ghost mode refuses, the message names the op and the ways out. Nothing is approximated and no
parameter is left out.

"""


def dots(x: Any, train: Any, val: Any, **options: Any) -> dict[str, Tensor]:
    return gf.ghost_dot_prod(*x, train, val, per_param=True, **options)


def error(got: dict[str, Tensor], want: dict[str, Tensor]) -> str:
    """The largest error of any parameter, relative to its own size or a tenth of the largest."""
    assert got.keys() == want.keys()
    floor = 0.1 * max(float(x.abs().max()) for x in want.values())
    sizes = {name: max(float(x.abs().max()), floor) for name, x in want.items()}
    return f"{max(float((got[k] - want[k]).abs().max()) / sizes[k] for k in want):.0e}"


def row(name: str, animal: Animal) -> tuple[str, str]:
    """The model's line of the table, and what ghost mode says where it refuses it."""
    _, *x = animal.build()
    train, val = animal.draw(4, 7, 0), animal.draw(3, 9, 1)
    loop = dots(x, train, val, mode="materialized", vectorize=False)
    refused = ""
    try:
        ghost = error(dots(x, train, val), loop)
    except gf.GhostError as raised:
        ghost, refused = (
            f"refused: `{type(raised).__name__}`",
            str(raised).replace(f" {WAYS_OUT}", ""),
        )
    try:
        jvp = error(dots(x, train, val, mode="jvp"), loop)
    except gf.TransformError:
        jvp = "no forward mode"
    try:
        dots(x, train, val, mode="materialized")
        materialized = "loop, vmap"
    except gf.TransformError:
        materialized = "loop"
    unused = sum(not bool(v.any()) for v in loop.values())
    parameters = f"{len(loop)}" + (f", {unused} of them unused" if unused else "")
    cells = [name, ghost, jvp, materialized, parameters, animal.single or "none", animal.remarks]
    return f"| {' | '.join(cells)} |\n", refused


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = {name: row(name, animal) for name, animal in ZOO.items()}
    page = HEAD + "".join(line for line, _ in rows.values())
    refusals = [f"- {name}: *{said}*\n" for name, (_, said) in rows.items() if said]
    PAGE.write_text(page + FOOT + "".join(refusals))


if __name__ == "__main__":
    main()
