"""What couples the samples of a batch, as far as its calls tell: for the error that refuses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ghostfunc._base.modes import DispatchMode
from ghostfunc._base.trees import take, tensors_of
from ghostfunc._base.types import PyTree

PAIRS = (
    "{op} makes a table of all pairs of samples, shape {shape}: in-batch contrast (CLIP, SimCLR, "
    "in-batch negatives). Give every sample its own negatives, [n, k, ...] in the batch, or pass "
    "what it is compared with as a constant that is not made of the batch."
)
MIXED = (
    "{op} puts rows of some samples in the place of others, shape {shape}: mixup, CutMix or "
    "shuffled negatives. Mix before the call: a mixed row in the batch is a sample."
)


class _Call(NamedTuple):
    """One call: its op, the shapes of its first input and of its output, and whether it takes rows
    of its first axis."""

    op: str
    given: tuple[int, ...]
    made: tuple[int, ...]
    takes_rows: bool


class _Calls(DispatchMode):
    """Notes the calls of a run that make a tensor of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        given = tensors_of(args[:1])
        if isinstance(out, Tensor) and given:
            name = func.overloadpacket.__name__
            rows = _takes_rows(name, args)
            self.calls.append(_Call(name, tuple(given[0].shape), tuple(out.shape), rows))
        return out


def _takes_rows(op: str, args: tuple[Any, ...]) -> bool:
    """Whether a call puts rows of its first axis in another order."""
    match op, args[1:]:
        case "index", ([Tensor() as rows],):
            return rows.ndim == 1 and not rows.dtype.is_floating_point
        case "index_select", (0, *_):
            return True
        case "flip", (dims, *_):
            return 0 in dims
        case "roll", (_, dims, *_):
            return 0 in dims
        case _:
            return False


def cause(losses: Callable[[PyTree], Tensor], batch: PyTree, pair: Sequence[int]) -> str:
    """Which call couples the samples, and what to do; nothing where no call tells.

    Args:
        losses: runs the model on a batch. It is run on two samples and on three.
        batch: with the samples `pair`.
    """
    with _Calls() as two:
        losses(take(batch, list(pair)))
    with _Calls() as three:
        losses(take(batch, [*pair, pair[0]]))
    for a, b in zip(two.calls, three.calls, strict=False):
        if a.op != b.op or len(a.made) != len(b.made):
            break
        shape = ", ".join("n" if x != y else str(x) for x, y in zip(a.made, b.made, strict=True))
        grown = sum(x != y for x, y in zip(a.made, b.made, strict=True))
        if grown > 1:
            return PAIRS.format(op=a.op, shape=f"[{shape}]")
        whole = a.given[:1] == a.made[:1] == (2,) and b.given[:1] == b.made[:1] == (3,)
        if a.takes_rows and b.takes_rows and whole:
            return MIXED.format(op=a.op, shape=f"[{shape}]")
    return ""
