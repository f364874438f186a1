"""Programs are played: compiled, run in plain torch, and every quantity judged.

What plain torch cannot run is skipped. Where the losses of a batch are not those of its samples
alone, samples depend on each other, and every number made of that batch is wrong.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from random import Random
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import fuzz_blocks
import fuzz_changes
import fuzz_steps
import numpy as np
import torch
import torch.nn.functional as F
from every_quantity import GHOST, OTHER_MODES, QUANTITIES, Case, Verdict, judge
from fuzz_program import Program, Setting
from fuzz_source import VOCABULARY, WIDTH, source
from torch import Tensor

assert fuzz_blocks.route
assert fuzz_changes.latent
assert fuzz_steps.product  # all three say how steps are written

ALWAYS = ("dots", "norms")
SEEN: ContextVar[list[int] | None] = ContextVar("SEEN", default=None)
"""Gets the number of samples of every run of a model."""
TOLERANCE = 1e-8

NO_WAY_SEEN = ("validation_gradients",)
"""A direction by itself is a plain backward pass, in which no way is known (docs/sharp_edges.md).
It is not asked where samples depend on each other since what is closed over has changed."""


@dataclass(frozen=True)
class Check:
    """One quantity of one program in one setting.

    Attributes:
        coupled: whether samples of a batch that it is about depend on each other there.
    """

    setting: int
    verdict: Verdict
    coupled: bool

    @property
    def status(self) -> Literal["right", "refused", "wrong", "crashed"]:
        if self.coupled and self.verdict.status == "right":
            return "wrong"
        return self.verdict.status

    @property
    def failed(self) -> bool:
        return self.status in ("wrong", "crashed")


class Invalid(Exception):
    """Plain torch cannot run the program, or its numbers tell nothing."""


class Compiled(NamedTuple):
    """A program as a function, its parameters, and what turns what it closes over."""

    model: Callable[[Any, Any], Tensor]
    params: dict[str, Tensor]
    turn: Callable[[bool], None]


def compiled(program: Program) -> Compiled:
    text, shapes = source(program)
    space: dict[str, Any] = {"torch": torch, "F": F, "np": np, "SimpleNamespace": SimpleNamespace}
    space["turn"] = lambda later: None  # of programs that close over nothing
    exec(compile(text, f"<program {program.seed}>", "exec"), space)
    generator = torch.Generator().manual_seed(program.seed)
    params = {
        name: 0.6 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in sorted(shapes.items())
    }
    model = space["model"]

    def noting(params: Any, batch: Any) -> Tensor:
        seen = SEEN.get()
        if seen is not None:
            seen.append(batch["x"].shape[0])
        out: Tensor = model(params, batch)
        return out

    return Compiled(noting, params, space["turn"])


def batch(n: int, t: int, setting: Setting, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, t + 1, (n,), generator=generator)
    if setting.lengths == "full":
        lengths = torch.full((n,), t)
    elif setting.lengths == "sorted":
        lengths = lengths.sort()[0]
    data = {
        "x": torch.randn(n, t, WIDTH, generator=generator, dtype=torch.float64),
        "ids": torch.randint(VOCABULARY, (n, t), generator=generator),
        "lengths": lengths,
    }
    data["order"] = torch.randperm(n, generator=generator)
    data["f"] = setting.later * (0.1 + torch.rand(n, generator=generator, dtype=torch.float64))
    if setting.large:
        data["x"] *= 20
    if setting.alike:
        data = {k: v[:1].repeat(n, *[1] * (v.ndim - 1)) for k, v in data.items()}
    return data


class Watched(Case):
    """A case that notes which of its two batches a quantity is asked about."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("train", "val"):
            self.__dict__.setdefault("asked", set()).add(name)
        return super().__getattribute__(name)


def cases(program: Program, settings: Sequence[int]) -> Iterator[tuple[int, Case, set[str]]]:
    """The settings in turn, with one function; the batches whose samples depend on each other."""
    try:
        model, params, turn = compiled(program)
        for number in settings:
            setting, seed = program.settings[number], 1000 * program.seed + 10 * number
            turn(setting.later)
            train = batch(setting.n, setting.t, setting, seed)
            val = batch(setting.m, setting.s, setting, seed + 1)
            case = Watched(model, params, train, val)
            sides = {"train": (case.train, case.g), "val": (case.val, case.v)}
            yield number, case, {x for x, (b, g) in sides.items() if _coupled(case, b, g)}
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        raise Invalid(f"{type(error).__name__}: {error}") from error


def _coupled(case: Case, data: Any, rows: list[Tensor]) -> bool:
    """Whether the batch's losses, or their gradient, are not those of its samples alone."""
    leaves = {k: v.clone().requires_grad_() for k, v in case.params.items()}
    losses = case.model_fn(leaves, data)
    if losses.shape != (len(data["x"]),) or not all(bool(g.isfinite().all()) for g in rows):
        raise Invalid("no finite loss per sample")
    found = torch.autograd.grad(
        losses.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    with torch.no_grad():
        each = [case.model_fn(case.params, _one(data, i)) for i in range(len(losses))]
    pairs = [(losses.detach(), torch.cat(each))]
    pairs += [
        ((x.to_dense() if x.is_sparse else x).reshape(-1), g.sum(0))
        for x, g in zip(found, rows, strict=True)
    ]
    if max(float(g.abs().max()) for _, g in pairs if g.numel()) > 1e8:
        raise Invalid("numbers are too large to be compared")
    if max((float(g.abs().max()) for g in rows if g.numel()), default=0.0) < 1e-12:
        raise Invalid("gradients are rounding noise: the losses do not depend on the parameters")
    return not all(torch.allclose(a, b, rtol=1e-7, atol=1e-8) for a, b in pairs)


def _coupled_in_chunks(case: Case, side: str, most: int) -> bool:
    """Whether that is so of at most `most` samples, where the model never sees more at a time."""
    data, rows = (case.train, case.g) if side == "train" else (case.val, case.v)
    n = len(data["x"])
    count = -(-n // most)  # chunks are as equal as can be
    bounds = [i * n // count for i in range(count + 1)]
    cuts = list(map(slice, bounds, bounds[1:]))
    return any(
        _coupled(case, {k: v[cut] for k, v in data.items()}, [g[cut] for g in rows]) for cut in cuts
    )


def _one(data: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {k: v[i : i + 1] for k, v in data.items()}


def asked(program: Program, number: int, count: int) -> list[str]:
    """The quantities that are asked for in a setting, the first ones always."""
    rng = Random(100 * program.seed + number)
    others = [*GHOST, *GHOST, *OTHER_MODES, "vmap_over_directions"]
    names = [*ALWAYS, *rng.sample(others, min(count, len(others)))] if count else list(QUANTITIES)
    left_out = ["grad_of_scores", "jvp_of_scores"]
    names = [x for x in dict.fromkeys(names) if x not in left_out]
    rng.shuffle(names)
    return names


@contextmanager
def _default_dtype_of_before() -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def play(
    program: Program,
    *,
    count: int = 5,
    settings: Sequence[int] | None = None,
    only: Sequence[str] | None = None,
) -> list[Check]:
    """Every check of a program.

    Args:
        count: quantities that are asked for in a setting, besides those always asked for.
        settings: those to play, by number; all of them by default.
        only: ask for these quantities alone.

    Raises:
        Invalid: plain torch cannot run it.
    """
    checks: list[Check] = []
    with warnings.catch_warnings(), _default_dtype_of_before():
        warnings.simplefilter("ignore")
        chosen = range(len(program.settings)) if settings is None else settings
        for number, case, coupled in cases(program, chosen):
            names = asked(program, number, count) if only is None else only
            setting = program.settings[number]
            if setting.later and coupled:
                names = [x for x in names if x not in NO_WAY_SEEN]
            threads = setting.threads
            for verdict, about, most in _judged(case, names, threads=threads):
                of_them = coupled & about
                of_them = {x for x in of_them if _coupled_in_chunks(case, x, most)}
                checks.append(Check(number, verdict, bool(of_them)))
    return checks


Judged = tuple[Verdict, set[str], int]


def _judged(case: Case, names: Sequence[str], *, threads: bool) -> list[Judged]:
    """What becomes of every quantity, the batches that it was asked about, and how many samples it
    let the model see at a time, at most."""

    def judged(name: str) -> Judged:
        assert len(case.losses)  # what the loop reads is not asked of the library
        one = copy.copy(case)
        vars(one).update(asked=set())
        sizes: list[int] = []
        before = SEEN.set(sizes)
        try:
            verdict = judge(one, name, TOLERANCE)
        finally:
            SEEN.reset(before)
        return verdict, vars(one)["asked"], max(sizes, default=1)

    if not threads:
        return list(map(judged, names))
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(judged, names))
