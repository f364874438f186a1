"""Programs as Python source: what runs, and what is printed of those that fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

from fuzz_program import Program, Step
from fuzz_weights import vector, weight

WIDTH = 4
"""Features of the batch."""

VOCABULARY = 7

RARE_WORDS = ("input=", "tensors=", "condition=", "query=", "sparse=")
"""What spellings of rare programs are known by."""

_TO: dict[str, tuple[str, ...]] = {
    "t n d": (
        "h.transpose(0, 1)", "h.permute(1, 0, 2)", "h.movedim(0, 1)", "h.swapaxes(0, 1)",
        "torch.einsum('ntd->tnd', h)", "torch.stack(h.unbind(1))",
        "torch.transpose(input=h, dim0=0, dim1=1)",
    ),
    "nt d": (
        "h.flatten(0, 1)", "h.reshape(n * t, -1)", "h.contiguous().view(-1, h.shape[-1])",
        "torch.cat(list(h))", "torch.flatten(input=h, start_dim=0, end_dim=1)",
        "torch.ravel(h).view(n * t, -1)",
    ),
    "tn d": (
        "h.transpose(0, 1).flatten(0, 1)", "h.permute(1, 0, 2).reshape(t * n, -1)",
        "torch.cat(h.unbind(1))", "torch.cat(tensors=list(h.swapaxes(0, 1)))",
    ),
    "n a b d": ("h.unflatten(1, (a, b))", "h.reshape(n, a, b, -1)"),
    "an b d": ("h.unflatten(1, (a, b)).transpose(0, 1).flatten(0, 1)",),
    "a nb d": ("h.unflatten(1, (a, b)).transpose(0, 1).flatten(1, 2)",),
    "anb d": (
        "h.unflatten(1, (a, b)).transpose(0, 1).flatten(0, 2)",
        "h.reshape(n, a, b, -1).permute(1, 0, 2, 3).reshape(n * t, -1)",
    ),
    "ban d": ("h.unflatten(1, (a, b)).permute(2, 1, 0, 3).flatten(0, 2)",),
}  # fmt: skip
"""From `n t d`."""

_FROM: dict[str, tuple[str, ...]] = {
    "t n d": (
        "h.transpose(0, 1)", "h.permute(1, 0, 2)", "h.movedim(1, 0)", "h.swapaxes(1, 0)",
        "torch.einsum('tnd->ntd', h)", "torch.stack(h.unbind(0), 1)",
    ),
    "nt d": ("h.unflatten(0, (n, t))", "h.view(n, t, -1)", "h.reshape(n, t, h.shape[-1])"),
    "tn d": (
        "h.unflatten(0, (t, n)).transpose(0, 1)", "h.view(t, n, -1).permute(1, 0, 2)",
        "torch.stack(h.split(n), 1)",
    ),
    "n a b d": ("h.flatten(1, 2)", "h.reshape(n, t, -1)"),
    "an b d": ("h.unflatten(0, (a, n)).transpose(0, 1).flatten(1, 2)",),
    "a nb d": ("h.unflatten(1, (n, b)).transpose(0, 1).flatten(1, 2)",),
    "anb d": ("h.unflatten(0, (a, n, b)).transpose(0, 1).flatten(1, 2)",),
    "ban d": ("h.unflatten(0, (b, a, n)).permute(2, 1, 0, 3).flatten(1, 2)",),
}  # fmt: skip
"""Back to `n t d`."""


class Writer:
    """Writes the steps of one program.

    Attributes:
        axes: of `h`, one of `LAYOUTS`; "rows d" and "? ? d" where nothing is known but the last.
        width: features of `h`.
        shapes: the parameters that were used.
        rare: whether spellings of rare programs may be used.
        reordered: whether samples are in another order than in the batch.
        made: lines that make what the program closes over.
        turns: lines that set it, by whether the setting is `later`.
    """

    def __init__(self, *, rare: bool) -> None:
        self.rare = rare
        self.reordered = False
        self.lines: list[str] = []
        self.made: list[str] = []
        self.turns: list[str] = []
        self.axes = "n t d"
        self.width = WIDTH
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._indent = 1
        self._names = 0

    def line(self, text: str) -> None:
        self.lines.append("    " * self._indent + text)

    def name(self, stem: str) -> str:
        self._names += 1
        return f"{stem}{self._names}"

    def let(self, name: str, expression: str) -> str:
        new = self.name(name)
        self.line(f"{new} = {expression}")
        return new

    def param(self, slot: int, *shape: int) -> str:
        name = f"p{slot}_" + "x".join(map(str, shape))
        self.shapes[name] = shape
        return f'p["{name}"]'

    def closed(self, first: str, later: str, *, in_place: bool = False) -> str:
        """The name of a value that the program closes over, and that is another one later."""
        name = self.name("box.c")
        self.made.append(f"{name} = {first}")
        value = f"{later} if later else {first}"
        self.turns.append(f"{name}.copy_({value})" if in_place else f"{name} = {value}")
        return name

    def h(self, expression: str) -> None:
        self.line(f"h = {expression}")

    @contextmanager
    def indented(self, head: str) -> Any:
        self.line(head)
        self._indent += 1
        before = len(self.lines)
        yield
        if len(self.lines) == before:
            self.line("pass")
        self._indent -= 1

    def to(self, axes: str, spelling: int) -> None:
        """Bring `h` to other axes."""
        if axes == self.axes or self.axes not in ("n t d", *_FROM):
            return
        for table, key in ((_FROM, self.axes), (_TO, axes)):
            if key in table:
                self.h(self.spelt(table[key], spelling))
        self.axes = axes

    def steps(self, steps: Sequence[Step]) -> None:
        for step in steps:
            WRITE[step.kind](self, step)

    def chosen(self, step: Step, *spellings: str) -> None:
        self.h(self.spelt(spellings, step.args["spelling"]))

    def spelt(self, spellings: Sequence[str], number: int) -> str:
        """One of the spellings."""
        if not self.rare:
            spellings = [x for x in spellings if not any(y in x for y in RARE_WORDS)]
        return spellings[number % len(spellings)]


WRITE: dict[str, Callable[[Writer, Step], None]] = {}


def writes(kind: str) -> Callable[[Callable[[Writer, Step], None]], Callable[[Writer, Step], None]]:
    def decorate(write: Callable[[Writer, Step], None]) -> Callable[[Writer, Step], None]:
        WRITE[kind] = write
        return write

    return decorate


_LOSSES = {
    "all": "(h - 1).square().flatten(1).mean(1)",
    "masked": "((h - 1).square().mean(-1) * mask).sum(1)",
    "first": "(h[:, 0] - 1).square().mean(1)",
    "last": "(h[:, -1] - 1).square().mean(1)",
    "mean first": "((h.sum(1) - 1) / t).square().mean(1)",
    "classes": "F.cross_entropy(h.transpose(1, 2), ids % h.shape[-1], reduction='none').mean(1)",
}

_PENALTIES = {
    "squares": "0.1 * {w}.square().sum()",
    "norm of a transpose": "0.1 * ({w}.t() * 0.5).norm()",
    "entropy": "0.1 * {w}.softmax(-1).square().sum()",
    "difference": "0.1 * ({w}[:1] - {w}[1:]).abs().sum()",
}


def source(program: Program) -> tuple[str, dict[str, tuple[int, ...]]]:
    """The program as a function `model(p, batch)`, and the shapes of its parameters.

    Where it closes over what changes, that lies in `box`, and a function `turn(later)` sets it.
    """
    to = Writer(rare=program.rare)
    to.steps(program.steps)
    to.to("n t d", 0)
    if not to.shapes:
        to.h(f"h * {to.param(0, to.width)}")
    matrices = sorted(name for name, shape in to.shapes.items() if len(shape) == 2)
    to.line(f"losses = {_LOSSES[program.loss]}")
    for i, penalty in enumerate(program.penalties):
        if matrices:
            w = f'p["{matrices[i % len(matrices)]}"]'
            to.line("losses = losses + " + _PENALTIES[penalty].format(w=w))
    turn: list[str] = []
    if to.turns:
        turn = ["box = SimpleNamespace()", *to.made, "def turn(later):"]
        turn += [f"    {x}" for x in to.turns]
    head = [
        *turn,
        "def model(p, batch):",
        '    x, ids, lengths = batch["x"], batch["ids"], batch["lengths"]',
        "    n, t = x.shape[:2]",
        "    a = 2 if t % 2 == 0 else 1",
        "    b = t // a",
        "    mask = torch.arange(t) < lengths[:, None]",
        "    h = x",
    ]
    return "\n".join([*head, *to.lines, "    return losses"]), to.shapes


def weight_of(to: Writer, step: Step, *shape: int) -> str:
    return weight(to, step.args["slot"], step.args.get("chain", ()), shape)


def vector_of(to: Writer, step: Step) -> str:
    return vector(to, step.args["slot"], step.args.get("vector", "plain"), to.width)
