"""Where the sample axis of a tensor is found.

A few samples, and then more of them, show which axis holds samples: the one that grows
(`candidates`). An axis may hold positions, too, and then shapes do not tell how the two are folded.
The rows that have a cotangent of one sample's loss do (`allowed`). Where several ways are left, a
use is folded as the others are (`settled`), and every run is proved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ghostfunc._base.errors import WAYS_OUT, CoupledSamplesError, SampleAxisError
from ghostfunc._base.purity import coupled_samples
from ghostfunc._base.refusals import op_name
from ghostfunc._base.types import Randomness
from ghostfunc._trace.layout import Layout
from ghostfunc._trace.trace import CallTrace, RecordedCall, Shape


def candidates(small: Shape, large: Shape, k: int, n: int, what: str) -> tuple[Layout, ...]:
    """Where samples may lie in a tensor: on the axis that grew, folded in one of several ways,
    sample-major first. Its shape is `small` for k samples and `large` for n > k. Errors name `what`
    it is."""
    if len(small) != len(large):
        raise SampleAxisError(f"{what}: shape {small} of {k} samples became {large} of {n}.")
    axes = [i for i, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    if len(axes) != 1:
        raise SampleAxisError(
            f"{what}: shape {small} of {k} samples became {large} of {n}. Samples must lie on "
            "exactly one axis: in a table of sample pairs, compute each sample's own entries "
            f"alone. {WAYS_OUT}"
        )
    (axis,) = axes
    positions = small[axis] // k
    if small[axis] % k or large[axis] != n * positions:
        raise SampleAxisError(
            f"{what}: axis {axis} has {small[axis]} rows for {k} samples and {large[axis]} for "
            f"{n}: not the same number for every sample. In models of "
            "transformers, gf.from_module and gf.hf keep the rows of routed experts in order. "
            + WAYS_OUT
        )
    if positions == 1:
        return (Layout(axis),)
    between = [
        Layout(axis, "between", outer, positions // outer)
        for outer in range(2, positions)
        if positions % outer == 0
    ]
    return Layout(axis, "sample-major"), Layout(axis, "position-major"), *between


def allowed(
    seen: RecordedCall, marks: Sequence[Tensor], k: int, n: int, randomness: Randomness
) -> list[Layout]:
    """Where samples may lie in the output: where its marks and its values allow it. There is one
    mark per loss: it says where the output has a cotangent of that loss. The last n - k samples are
    copies of the first n - k, so their values are equal. Several layouts are left where all values
    are equal, and no gradient tells."""
    trace, y = seen.trace, seen.y
    assert y is not None
    owned = [
        layout
        for layout in seen.candidates
        if all(_only(i, layout.front(mark, n)) for i, mark in enumerate(marks))
    ]
    what = f"{op_name(trace.func)} on {', '.join(repr(t.name) for t in seen.tracked)}"
    if not owned:
        said = coupled_samples(f"at {what}, a sample's loss has a gradient at other samples' rows")
        raise CoupledSamplesError(
            f"{said} If those rows are its own, in an order that model_fn makes (it sorts samples "
            "by length, say), keep the samples in their order where parameters meet them. "
            + WAYS_OUT
        )
    if (
        len(owned) > 1 and randomness == "error"
    ):  # where draws are allowed, copies draw other numbers
        owned = [x for x in owned if _copies_equal(x.front(y, n), k)] or owned
    # Samples seldom lie between positions; the proof would tell.
    return [x for x in owned if x.fold != "between"] or owned


def settled(uses: Sequence[RecordedCall], found: Sequence[list[Layout]]) -> Iterator[CallTrace]:
    """The uses with one layout each. Where a use has several, the folds of the uses with a single
    layout are counted: it takes the layout with the most frequent fold, or its first one if none
    is found there. Every run of a trace with such guesses is proved."""
    known = Counter(own[0].fold for own in found if len(own) == 1)
    for seen, own in zip(uses, found, strict=True):
        out = max(own, key=lambda x: known[x.fold])
        layouts = tuple(
            (i, lay if lay.fold == "none" else lay.folded_like(out))
            for i, lay in seen.trace.layouts
        )
        yield replace(seen.trace, out=out, layouts=layouts)


def _only(i: int, mark: Tensor) -> bool:
    """Whether only sample i has a cotangent."""
    return not bool(mark[:i].any()) and not bool(mark[i + 1 :].any())


def _copies_equal(y: Tensor, k: int) -> bool:
    """Whether copies have equal values, to far fewer digits than any dtype of a model has."""
    return torch.allclose(y[k:], y[: len(y) - k], rtol=1e-3, atol=1e-5)
