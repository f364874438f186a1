"""The rows of the table: what is compared with what, and how much it may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import contestants as who
from measure import Contestant
from shapes import SHAPES, Shape

Figure = Literal["time", "peak", "floor", "slope"]

JOBS: dict[str, Callable[[Shape], dict[str, Contestant]]] = {
    "step": who.step,
    "quadratic": who.quadratic,
    "packed": who.packed,
    "compiled": who.compiled,
    "vmap": who.against_vmap,
    "dattri-llm": who.against_dattri_llm,
    "opacus": who.against_opacus,
}
"""A job runs in a process of its own."""


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes:
        work: for the reader.
        job, shape: which process has it, and on which of `SHAPES`.
        mine, base: contestants of that job.
        target: the largest ratio that is good; None where there is none.
        target_onednn: the same where oneDNN multiplies for both sides, if it is another one.
        figure: "time" and "peak" are ratios to the base. "floor" is the time over that of the
            base's time x own operations / base's operations. "slope" is an exponent.
        always: whether the row is run without being asked for.
    """

    work: str
    job: str
    shape: str
    mine: str
    base: str
    target: float | None
    figure: Figure = "time"
    always: bool = True
    target_onednn: float | None = None

    def by(self, onednn: str) -> Row:
        """The row with the target that holds where `onednn` says whose products are oneDNN's."""
        if onednn != "all" or self.target_onednn is None:
            return self
        return replace(self, target=self.target_onednn)

    @property
    def key(self) -> str:
        mine, base = (x.replace(", ", "-").replace(" ", "-") for x in (self.mine, self.base))
        return "/".join((self.job, self.shape, mine, *[base] * ("plain" not in base), self.figure))

    @property
    def process(self) -> str:
        return f"{self.job}/{self.shape}"


_STEPS: dict[str, tuple[float, float | None]] = {
    "calls": (1.50, None),
    "256": (1.05, 1.15),
    "gpt2-small": (1.05, None),
    "512": (1.05, 1.10),
    "1024": (1.15, None),
    "512-m4": (1.20, None),
}
"""Targets of an eager step: where one library multiplies for both sides, and where it is oneDNN."""
assert _STEPS.keys() == SHAPES.keys()


def _rows() -> list[Row]:
    rows = []
    for shape, (target, onednn) in _STEPS.items():
        rows += [
            Row(
                "step with scores and gradient",
                "step",
                shape,
                "step",
                "plain",
                target,
                target_onednn=onednn,
            ),
            Row("the same, own FLOP floor", "step", shape, "step", "plain", 1.05, "floor"),
            Row("the same, peak memory", "step", shape, "step", "plain", 1.0, "peak"),
            Row("the same, bfloat16 contractions", "step", shape, "step, bf16", "plain", 1.10),
            Row("scores only", "step", shape, "scores", "plain", 1.3 if shape == "calls" else 0.92),
            Row("the same, bfloat16 contractions", "step", shape, "scores, bf16", "plain", None),
            *(
                Row(
                    f"scores of a pool, {how}",
                    "step",
                    shape,
                    f"scores, {how}",
                    "plain, n rows",
                    0.95,
                )
                for how in ("direction given", "gradients kept")
            ),
        ]
    for shape in _STEPS:
        rows.append(
            Row(
                "step with scores and gradient, compiled",
                "compiled",
                shape,
                "compiled step",
                "compiled plain",
                1.03,
            )
        )
    rows.append(
        Row(
            "plain step, a mode that does nothing", "step", "calls", "plain, watched", "plain", None
        )
    )
    rows += [
        Row("ghost_project, rank 256", "quadratic", "256", "project", "plain, n rows", 0.85),
        Row("ghost_project, rank 256", "quadratic", "gpt2-small", "project", "plain, n rows", 0.90),
        Row("ghost_norm", "quadratic", "256", "norm", "plain, n rows", 1.30),
        Row("ghost_clipped_grad", "quadratic", "256", "clipped", "plain, n rows", 1.60),
        Row("ghost_health", "quadratic", "256", "health", "plain, n rows", 1.10),
        Row("ghost_norm, untied", "opacus", "gpt2-small", "norm", "plain, n rows", 1.60),
        Row("ghost_clipped_grad, untied", "opacus", "gpt2-small", "clipped", "plain, n rows", 1.60),
        Row("step against vmap(grad)", "vmap", "256", "step", "peer", 1.0),
        Row("step against dattri-llm 0.1", "dattri-llm", "256", "step", "peer", 1.0),
    ]
    rows += [
        Row(f"{what} of {how}", "packed", "256", f"{what}, {how}", f"{what}, rows", 1.10)
        for how in ("uneven documents", "even documents")
        for what in ("norm", "clipped", "gram", "health")
    ]
    for shape, always in (("256", False), ("gpt2-small", True)):
        rows += [
            Row(
                "norm against Opacus 1.6", "opacus", shape, "norm", "peer, norm", 1.0, always=always
            ),
            Row(
                "clipped sum against Opacus 1.6",
                "opacus",
                shape,
                "clipped",
                "peer, clipped",
                1.0,
                always=always,
            ),
            Row(
                "clipped sum against vmap(grad)",
                "opacus",
                shape,
                "clipped",
                "vmap, clipped",
                1.0,
                always=always,
            ),
        ]
    for size in ("n", "length", "m"):
        rows.append(Row(f"growth with {size}", "scaling", size, "step", "plain", 1.0, "slope"))
    rows.append(Row("growth with width", "scaling", "width", "step", "plain", None, "slope"))
    return rows


ROWS = _rows()
