"""Random programs, as data.

A program is a list of steps on one tensor `h`, which begins as the batch's `x`, `[n, t, d]`; a loss
of what `h` is in the end; penalties on parameters; and the settings that it is asked in, one after
the other: other numbers of samples, lengths and kinds of batches. `fuzz_source` writes it as a
Python function. A step that does not fit where it stands writes nothing, so any may be left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal

LAYOUTS = ("n t d", "t n d", "nt d", "tn d", "n a b d", "an b d", "a nb d", "anb d", "ban d")
"""Axes of `h`: samples, positions (`t`, or `a` times `b`), features; letters together are one."""

DERIVATIONS = (
    "transposed", "transposed", "transposed", "scaled", "squashed", "summed", "product", "joined",
    "joined by keyword", "stacked", "chunk", "indexed", "flipped", "normalised", "weight norm",
    "low rank", "cubed", "residual", "reflected", "bits", "detached", "constant norm",
    "in place", "written into", "where", "softmax", "looked up", "sparse", "rearranged",
    "viewed anew", "expanded", "padded", "sorted", "cumulated", "masked", "rolled", "outer",
    "detached in place", "flat and back", "complex", "cloned", "contiguous", "einsum",
)  # fmt: skip

VECTORS = ("plain", "plain", "squashed", "column sums", "first row", "detached", "scalar")

RARE = ("joined by keyword", "bits", "sparse", "detached in place")
"""Derivations of rare programs alone."""

ORDERS = (
    "argsort", "sort", "numpy", "comparisons", "matrix", "flip", "roll", "halves", "scatter",
    "argsort", "numpy", "comparisons", "flip", "roll", "python", "stack of slices", "kthvalue",
)  # fmt: skip

ROWWISE = ("product", "scale", "act", "norm", "slots", "bilinear", "heads")
"""Steps that treat every row alike, whatever the axes."""

MOVES = (
    "flip", "roll", "join", "index", "order of the batch", "gather", "scatter", "matrix", "sort",
)  # fmt: skip
"""Ways of rows from sample to sample that weigh nothing at first."""

CHANGES = (
    "float", "factor", "int", "bool", "index", "index of samples", "mask", "mask of samples",
    "mixing", "dropout", "no_grad", "default dtype",
)  # fmt: skip
"""What a program closes over, and is another thing later."""

CONDITIONS = ("n > 3", "n % 2 == 0", "t > 3", "t > 3", "mask.all()", "bool(lengths.max() > 3)")

SPELLINGS = 12
"""Spellings of a step are counted modulo however many it has."""


@dataclass(frozen=True)
class Step:
    """One step; `body` and `other` are the steps inside it."""

    kind: str
    args: dict[str, Any] = field(default_factory=dict)
    body: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Setting:
    """Batches of n samples of length t, and of m of length s.

    Attributes:
        lengths: "full", "ragged", or "sorted".
        alike: all samples are copies of one.
        large: values are large.
        threads: quantities are asked from several threads at once.
        later: weights of the batch are not zero, and what the program closes over has changed.
    """

    n: int
    t: int
    m: int
    s: int
    lengths: Literal["full", "ragged", "sorted"] = "ragged"
    alike: bool = False
    large: bool = False
    threads: bool = False
    later: bool = False


@dataclass(frozen=True)
class Program:
    """Attributes:
    rare: whether it may have what one program in five has: tensors by keyword, sparse gradients,
        bits of weights, writes to constants. Such things fail alone, and would hide the rest.
    """

    seed: int
    steps: tuple[Step, ...]
    loss: str
    penalties: tuple[str, ...]
    settings: tuple[Setting, ...]
    rare: bool = False


LOSSES = ("all", "all", "masked", "first", "last", "mean first", "classes")
PENALTIES = ("squares", "norm of a transpose", "entropy", "difference")

LEAVES = {
    "product": 9, "scale": 4, "act": 4, "norm": 2, "layout": 6, "table": 2, "look up": 3, "conv": 2,
    "attend": 1, "slots": 2, "token": 2, "bilinear": 1, "heads": 1, "couple": 0.3,
    "latent": 0.8, "ambient": 0.7,
}  # fmt: skip
NESTED = {
    "by length": 3, "route": 3, "reorder": 3, "unpad": 2, "residual": 1, "twice": 1, "by place": 1,
}  # fmt: skip


def random_program(seed: int) -> Program:
    """The program of a seed."""
    rng = Random(seed)
    steps = tuple(_step(rng, depth=0) for _ in range(rng.randint(2, 5)))
    if not any(map(uses, steps)):
        steps = (*steps, _leaf(rng, "product"))
    penalties = tuple(rng.sample(PENALTIES, rng.choice([0, 0, 0, 1, 2])))
    settings = _settings(rng)
    if any(map(changes, steps)):
        settings = _with_later_ones(rng, settings)
    return Program(seed, steps, rng.choice(LOSSES), penalties, settings, rng.random() < 0.2)


def rowwise(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps that treat every row alike, those inside of others included."""
    flat = (x for step in steps for x in (rowwise(step.body) if step.body else (step,)))
    return tuple(step for step in flat if step.kind in ROWWISE)


def uses(step: Step) -> bool:
    """Whether a step is sure to use a parameter."""
    return step.kind in ("product", "scale", "norm") or any(map(uses, step.body))


def changes(step: Step) -> bool:
    """Whether a step has what is another thing later."""
    return step.kind in ("latent", "ambient") or any(map(changes, step.body))


def _chosen(rng: Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _step(rng: Random, depth: int) -> Step:
    if depth >= 2 or rng.random() < 0.7:
        return _leaf(rng, _chosen(rng, LEAVES))
    kind = _chosen(rng, NESTED)
    body = tuple(_step(rng, depth + 1) for _ in range(rng.randint(1, 3)))
    if not any(map(uses, body)):
        body = (*body, _leaf(rng, rng.choice(["product", "scale"])))
    args = {"spelling": rng.randrange(SPELLINGS)}
    if kind == "by length":
        args |= {"fold": rng.random() < 0.3}
    elif kind == "route":
        args |= {"condition": rng.choice(CONDITIONS), "layouts": rng.sample(LAYOUTS, 2)}
    elif kind == "reorder":
        args |= {"order": rng.choice(ORDERS), "when": rng.choice(["", "", "n > 3", "n % 2 == 0"])}
    elif kind == "unpad":
        args |= {"unless full": rng.random() < 0.6}
    return Step(kind, args, body)


def _leaf(rng: Random, kind: str) -> Step:
    args: dict[str, Any] = {"spelling": rng.randrange(SPELLINGS), "slot": rng.choice([0, 0, 0, 1])}
    if kind == "product":
        args |= {"chain": _chain(rng), "out": rng.choice([3, 4, 5, 6])}
        args |= {"bias": rng.random() < 0.3, "by linear": rng.random() < 0.3}
    elif kind in ("scale", "norm"):
        args |= {"vector": rng.choice(VECTORS)}
    elif kind == "layout":
        args |= {"axes": rng.choice(LAYOUTS)}
    elif kind == "latent":
        args |= {"move": rng.choice(MOVES), "weighed": rng.randrange(SPELLINGS)}
        args |= {"weighed first": rng.random() < 0.2}
    elif kind == "ambient":
        args |= {"what": rng.choice(CHANGES), "in place": rng.random() < 0.3}
    elif kind in ("look up", "slots", "table", "attend", "heads"):
        args |= {"chain": _chain(rng) if rng.random() < 0.4 else ()}
        args |= {"rows": rng.choice([1, 3])} if kind == "slots" else {}
    return Step(kind, args)


def _chain(rng: Random) -> tuple[tuple[str, int], ...]:
    """Derivations of a weight, each with a spelling."""
    length = rng.choice([0, 0, 1, 1, 2, 3])
    return tuple((rng.choice(DERIVATIONS), rng.randrange(SPELLINGS)) for _ in range(length))


def _settings(rng: Random) -> tuple[Setting, ...]:
    """Shapes and values that are likely to be mistaken for those before them."""
    settings = [_setting(rng, k) for k in range(rng.choice([1, 2, 2, 3]))]
    kind = rng.random()
    if kind < 0.3:  # a way for small batches, then another one, in order at first
        small = replace(settings[0], n=rng.choice([2, 3]), t=rng.choice([2, 3]), lengths="full")
        settings = [small, replace(settings[-1], n=rng.choice([4, 5, 6]), t=rng.choice([3, 5]))]
    if kind < 0.6:
        last = replace(settings[-1], alike=False, lengths="ragged")
        in_order = replace(last, lengths=rng.choice(["sorted", "sorted", "full"]))
        settings = [*settings[:-1], in_order, last]
    return tuple(settings)


def _with_later_ones(rng: Random, settings: tuple[Setting, ...]) -> tuple[Setting, ...]:
    """What is latent comes up in the last of them, most often at the shapes of the first."""
    first, *rest = settings
    turned = [replace(x, later=rng.random() < 0.5) for x in rest]
    last = replace(first if rng.random() < 0.7 else settings[-1], alike=False, later=True)
    return (first, *turned, replace(last, n=max(2, last.n) if rng.random() < 0.8 else last.n))


def _setting(rng: Random, number: int) -> Setting:
    n, t = rng.choice([1, 2, 2, 3, 3, 4, 5, 6]), rng.choice([1, 2, 2, 3, 4, 4, 5, 6, 8])
    if rng.random() < 0.35:
        t = n * rng.choice([1, 1, 2])
    m, s = rng.choice([1, 2, 3]), rng.choice([t, t, 1, 2, 4, 6])
    first = number == 0
    return Setting(
        n,
        t,
        m,
        s,
        rng.choice(["full", "full", "sorted", "ragged"] if first else ["ragged", "ragged", "full"]),
        alike=first and rng.random() < 0.05,
        large=not first and rng.random() < 0.1,
        threads=not first and rng.random() < 0.05,
    )
