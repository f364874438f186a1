"""How time grows with n, T, m and d: four sizes each, and the slope of the log-log fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from contestants import plain
from measure import Contestant, measure
from shapes import Shape, gpt2, gpt2_loss

import ghostfunc as gf

BASE = Shape(2, 256, 2000, 128, 8, 2)
SIZES = {
    "n": (4, 8, 16, 32),
    "length": (64, 128, 256, 512),
    "m": (2, 4, 8, 16),
    "width": (128, 256, 384, 512),
}
TOLERANCE = 0.05
"""What a slope of a fit to noisy times may be off."""


def grow(size: str, seconds: float, *, quick: bool) -> dict[str, Any]:
    """Times of the plain step and the step with scores, for every value of one size."""
    found: dict[str, Any] = {"sizes": [], "plain": [], "step": []}
    for value in SIZES[size]:
        value = value // 4 if quick and size != "width" else value
        shape = replace(BASE, **{size: value})
        module, ids = gpt2(shape), shape.ids()
        model_fn, params = gf.from_module(module, gpt2_loss)
        train, val = ids[: shape.n], ids[shape.n :]
        times = measure(
            {
                "plain": Contestant(plain(module, gpt2_loss, ids)),
                "step": Contestant(
                    lambda f=model_fn, p=params, t=train, v=val: gf.ghost_value_and_grad(
                        f, p, t, v
                    ),
                ),
            },
            seconds / len(SIZES[size]),
        )
        found["sizes"].append(value)
        for name in ("plain", "step"):
            found[name].append(float(np.median(times[name]["times"])))
    return found


def slope(sizes: list[int], times: list[float]) -> float:
    """The exponent of `time ~ size^slope`."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
