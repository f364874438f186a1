"""Runs of the model in the first call of every public function, by the number of samples: counted,
not timed.

python benchmarks/passes.py            # the table
python benchmarks/passes.py --record   # and put it into docs/speed.md, which the tests hold
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from calls import SHAPE
from in_docs import TableInDocs
from shapes import Shape, gpt2, gpt2_loss

import ghostfunc as gf

IN_DOCS = TableInDocs("speed.md", "<!-- passes of a first call -->\n", "<!-- end of passes -->\n")
FEW = 3
"""Samples of the largest run that is one of few."""


class Passes(NamedTuple):
    """How many samples the runs of a first call had, in their order.

    Attributes:
        few: runs of at most `FEW` samples, before the first of a batch.
        batch: the run that the numbers come from.
        proof: runs that hold it against plain autograd.
        warm: all runs of the same call once more.
    """

    few: tuple[int, ...]
    batch: tuple[int, ...]
    proof: tuple[int, ...]
    warm: tuple[int, ...]


def first_call(ask: Callable[[Any, Any, Any, Any], Any], shape: Shape = SHAPE) -> Passes:
    """The passes of `ask(model_fn, params, train, val)` on a model that was never seen."""
    runs: list[int] = []

    def loss(module: Any, rows: torch.Tensor) -> torch.Tensor:
        runs.append(rows.shape[0])
        return gpt2_loss(module, rows)

    ids = shape.ids()
    model_fn, params = gf.from_module(gpt2(shape), loss)
    ask(model_fn, params, ids[: shape.n], ids[shape.n :])
    cold = tuple(runs)
    runs.clear()
    ask(model_fn, params, ids[: shape.n], ids[shape.n :])
    cut = next(i for i, size in enumerate(cold) if size > FEW)
    return Passes(cold[:cut], cold[cut : cut + 1], cold[cut + 1 :], tuple(runs))


def functions() -> dict[str, Callable[[Any, Any, Any, Any], Any]]:
    """The public functions that take one run when they are warm."""
    return {
        "ghost_value_and_grad": lambda f, p, x, y: gf.ghost_value_and_grad(f, p, x, y),
        "ghost_dot_prod": lambda f, p, x, y: gf.ghost_dot_prod(f, p, x, y),
        "ghost_norm": lambda f, p, x, y: gf.ghost_norm(f, p, x),
        "ghost_clipped_grad": lambda f, p, x, y: gf.ghost_clipped_grad(f, p, x, max_norm=1.0),
        "ghost_gram": lambda f, p, x, y: gf.ghost_gram(f, p, x),
        "ghost_vjp": lambda f, p, x, y: gf.ghost_vjp(f, p, x, gf.SqNorm()),
        "factored_grads": lambda f, p, x, y: gf.factored_grads(f, p, x),
        "per_sample_grads": lambda f, p, x, y: gf.per_sample_grads(f, p, x, mode="ghost"),
    }


def table() -> str:
    """The table, in Markdown."""
    lines = [
        "| first call | runs of few samples | of the batch | proof | every later call |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, ask in functions().items():
        sizes = [", ".join(map(str, row)) for row in first_call(ask)]
        lines.append(f"| `{name}` | {' | '.join(sizes)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    IN_DOCS.main(__doc__, table)
