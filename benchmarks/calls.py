"""Calls of every public function beside those of a plain step: counted, not timed.

python benchmarks/calls.py            # the table
python benchmarks/calls.py --record   # and note it in calls.json, which the tests hold

The counts are the same on every machine. At this shape all that a step costs is what is counted
here: a GPU spends a launch on every call that is not a view, and waits at every wait.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any


def asked() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="write calls.json")
    return parser.parse_args()


if __name__ == "__main__":
    asked()  # before torch is imported: --help and mistakes are answered at once

import torch
from shapes import CALLS_COST, Shape, gpt2, gpt2_loss
from torch.utils._python_dispatch import TorchDispatchMode

import ghostfunc as gf

RECORDED = Path(__file__).resolve().parent / "calls.json"
PACKAGE = str(Path(gf.__file__).resolve().parent)
SHAPE = CALLS_COST
Counts = dict[str, int]

COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>"}
"""What newer releases of Python run without a call."""

WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "histc",
}  # fmt: skip
"""Ops whose result the host has to see before it can go on."""


def waits(op: str, args: tuple[Any, ...]) -> bool:
    """Whether the host waits for a device here: it reads values, finds out how many elements a mask
    chooses, or copies numbers of Python's (`lift_fresh` is the last step of `torch.tensor`)."""
    if op in ("index", "index_put", "index_put_"):
        return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in args[1])
    return op in WAITS or op == "lift_fresh" or (op == "repeat_interleave" and len(args) == 1)


class CountCalls(TorchDispatchMode):
    """Counts the aten calls made inside it.

    Attributes:
        calls: by name, those that compute something.
        views: by name, those that return another view of what they are given.
        waits: by name, those at which the host waits for a device.
        order: the names of `calls` and `waits` as they came.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.order: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        waiting = waits(name, args)
        (self.views if func.is_view else self.calls)[name] += 1
        self.waits[name] += waiting
        if waiting or not func.is_view:
            self.order.append(name)
        return func(*args, **(kwargs or {}))


class CountLines:
    """Counts the lines of ghostfunc's own Python that are executed, and the calls of functions."""

    def __init__(self) -> None:
        self.lines = self.functions = 0

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        own = frame.f_code.co_filename.startswith(PACKAGE)
        self.functions += own and frame.f_code.co_name not in COMPREHENSIONS
        return self._line if own else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        self.lines += event == "line"
        return self._line


@contextmanager
def counting_lines() -> Iterator[CountLines]:
    count, before = CountLines(), sys.gettrace()
    sys.settrace(count._enter)
    try:
        yield count
    finally:
        sys.settrace(before)


def count(run: Callable[[], Any]) -> Counts:
    """The counts of one warm call."""
    run()
    run()
    with CountCalls() as calls:
        run()
    with counting_lines() as lines:
        run()
    return {
        "calls": calls.calls.total(),
        "all": calls.calls.total() + calls.views.total(),
        "waits": calls.waits.total(),
        "functions": lines.functions,
        "lines": lines.lines,
    }


def functions(
    shape: Shape = SHAPE,
    make: Callable[[Shape], torch.nn.Module] = gpt2,
    loss: Callable[[Any, torch.Tensor], torch.Tensor] = gpt2_loss,
    layers: str = "*.c_*.weight",
) -> dict[str, Callable[[], Any]]:
    """The plain step over all rows and over the n, and every public function that runs a model.
    Those of more than one mode are run in ghost mode. `layers` are those that are projected."""
    module, ids = make(shape), shape.ids()
    train, val = ids[: shape.n], ids[shape.n :]
    model_fn, params = gf.from_module(module, loss)
    args = model_fn, params, train
    u, kept = gf.direction(model_fn, params, val), gf.factored_grads(model_fn, params, val)
    projection = gf.kronecker_projection(
        params, rank_total=64, rank_min=4, kind="rademacher", seed=0, layers=[layers]
    )

    def plain(rows: torch.Tensor) -> Callable[[], Any]:
        def step() -> None:
            module.zero_grad(set_to_none=True)
            loss(module, rows).mean().backward()

        return step

    return {
        "plain": plain(ids),
        "plain, n rows": plain(train),
        "ghost_value_and_grad": lambda: gf.ghost_value_and_grad(*args, val),
        "ghost_value_and_grad, direction": lambda: gf.ghost_value_and_grad(*args, direction=u),
        "ghost_value_and_grad, m = n": lambda: gf.ghost_value_and_grad(*args, train),
        "ghost_dot_prod": lambda: gf.ghost_dot_prod(*args, val),
        "ghost_dot_prod, direction": lambda: gf.ghost_dot_prod(*args, direction=u),
        "ghost_dot_prod, kept": lambda: gf.ghost_dot_prod(*args, direction=kept),
        "ghost_dot_prod, per_param": lambda: gf.ghost_dot_prod(*args, val, per_param=True),
        "ghost_dot_prod, per_position": lambda: gf.ghost_dot_prod(*args, val, per_position=True),
        "ghost_dot_prod, none": lambda: gf.ghost_dot_prod(*args, val, reduction="none"),
        "ghost_cosine": lambda: gf.ghost_cosine(*args, val),
        "ghost_norm": lambda: gf.ghost_norm(*args),
        "ghost_clipped_grad": lambda: gf.ghost_clipped_grad(*args, max_norm=1.0),
        "ghost_health": lambda: gf.ghost_health(*args),
        "ghost_gram": lambda: gf.ghost_gram(*args),
        "ghost_project": lambda: gf.ghost_project(*args, projection),
        "ghost_vjp": lambda: gf.ghost_vjp(*args, gf.SqNorm(), grads=True),
        "factored_grads": lambda: gf.factored_grads(*args),
        "direction": lambda: gf.direction(model_fn, params, val),
        **{
            f"{name}, no check": lambda run=run: run(check_finite=False)
            for name, run in {
                "ghost_value_and_grad": partial(gf.ghost_value_and_grad, *args, val),
                "ghost_dot_prod": partial(gf.ghost_dot_prod, *args, val),
                "ghost_dot_prod, direction": partial(gf.ghost_dot_prod, *args, direction=u),
                "ghost_cosine": partial(gf.ghost_cosine, *args, val),
                "ghost_norm": partial(gf.ghost_norm, *args),
                "ghost_clipped_grad": partial(gf.ghost_clipped_grad, *args, max_norm=1.0),
            }.items()
        },
        "per_sample_grads": lambda: gf.per_sample_grads(*args, mode="ghost"),
    }


def table(found: dict[str, Counts]) -> str:
    """All counts, and the ratios to the plain step."""
    plain = found["plain"]
    lines = [
        f"{'':<34}{'calls':>6}{'':>7}{'all':>7}{'':>7}{'waits':>7}{'functions':>11}{'lines':>8}"
    ]
    lines += [
        f"{name:<34}{x['calls']:>6}{x['calls'] / plain['calls']:>7.2f}"
        f"{x['all']:>7}{x['all'] / plain['all']:>7.2f}{x['waits']:>7}"
        f"{x['functions']:>11}{x['lines']:>8}"
        for name, x in found.items()
    ]
    return "\n".join(lines)


def main() -> None:
    args = asked()
    torch.set_num_threads(1)
    found = {name: count(run) for name, run in functions().items()}
    print(table(found))
    if args.record:
        RECORDED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
