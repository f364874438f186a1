"""The third of the runs that tracing makes (`make.py`). One loss is pulled back at a time: rows of
a use's output that have a cotangent then are that sample's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from ghostfunc._base.definition import unwrapped_memory
from ghostfunc._base.errors import WAYS_OUT, ControlFlowError, TransformError
from ghostfunc._base.losses import refuse_unseen, unseen_use
from ghostfunc._base.program import Program
from ghostfunc._base.purity import lend, refuse_checkpoints
from ghostfunc._base.refusals import op_name
from ghostfunc._base.torch_private import HigherOrderOperator, in_transform
from ghostfunc._base.trees import tensors_of
from ghostfunc._base.types import PyTree
from ghostfunc._trace.trace import RecordedCall
from ghostfunc._trace.tracked import CallArgs, Tracked, constants
from ghostfunc._trace.watch import TrackingMode, gradients


class _Probe(torch.autograd.Function):
    """The identity on `y`, whose cotangent is also that of `tap`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, tap: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor, Tensor]:
        return b, b


class _ProbeAtTop(torch.autograd.Function):
    """`_Probe` outside transforms."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, tap: Tensor) -> Tensor:
        return y.detach()  # a view may not be written to

    backward = staticmethod(_Probe.backward)


class Prober(TrackingMode):
    """Runs the recorded calls on constants, with a probe on every use."""

    def __init__(
        self, leaves: Sequence[Tracked], seen: Sequence[RecordedCall], taps: Sequence[Tensor]
    ) -> None:
        super().__init__(leaves)
        self._seen = iter(seen)
        self._taps = iter(taps)
        self._expected = next(self._seen, None)

    def on_tracked(self, func: Callable[..., Any], call: CallArgs) -> Any:
        expected = self._expected
        if expected is None or (func, tuple(call.hits)) != (
            expected.trace.func,
            expected.trace.hits,
        ):
            out = call.run(func, call.consts())
            if isinstance(func, HigherOrderOperator):
                raise unseen_use(sorted({name for t in call.tracked for name in t.leaf_names()}))
            if tensors_of(out):
                raise ControlFlowError(
                    f"model_fn calls other ops when it is run again (at {op_name(func)}): its "
                    f"control flow depends on something besides its arguments. {WAYS_OUT}"
                )
            return out
        self._expected = next(self._seen, None)
        if expected.trace.kind == "derived":
            return self.derive(func, call)
        if expected.trace.kind == "opaque":
            return call.run(func, [t.shown for t in call.tracked])
        out = call.run(func, call.consts())
        if expected.trace.kind != "use":
            return out
        probe = _Probe if in_transform() else _ProbeAtTop
        return probe.apply(out, next(self._taps))


def probe_uses(
    program: Program, large: PyTree, seen: Sequence[RecordedCall], uses: Sequence[RecordedCall]
) -> list[list[Tensor]]:
    """Where every use's output has a cotangent, for every sample's loss in turn: booleans like the
    output, of which several are kept while the model's graph is."""
    taps = [_zero(s.y) for s in uses]

    def run(taps: list[Tensor], primals: list[Tensor]) -> Tensor:
        tracked = constants(program.leaves, program.spec)
        for leaf, primal in zip(tracked, primals, strict=True):
            leaf.primal = leaf.shown = primal
        with Prober(tracked, seen, taps):
            return program.losses(primals, large)

    if in_transform():
        with unwrapped_memory():
            losses, pullback = torch.func.vjp(run, taps, lend(program.leaves))[:2]
        marks = []
        for c in _each(losses):
            cotangents, unseen = pullback(c, create_graph=False)
            refuse_unseen(program.spec, [g if bool((g != 0).any()) else None for g in unseen])
            marks.append([_marked(g) for g in cotangents])
        return marks
    # Plain autograd also runs functions that transforms do not.
    inputs = [x.detach().requires_grad_() for x in (*taps, *program.leaves)]
    losses = run(inputs[: len(taps)], inputs[len(taps) :])
    refuse_checkpoints(losses)

    def marked(c: Tensor, *, again: bool) -> list[Tensor]:
        """The marks of one loss; its cotangents are gone when those of the next one are made."""
        with checkpoints_refused():
            flat = gradients(losses, inputs, c, again=again)
        # A path that is there counts as a use, even if its gradient happens to vanish.
        refuse_unseen(program.spec, flat[len(taps) :])
        return [
            torch.zeros_like(x, dtype=torch.bool) if g is None else _marked(g)
            for x, g in zip(taps, flat, strict=False)
        ]

    return [marked(c, again=i + 1 < len(losses)) for i, c in enumerate(_each(losses))]


@contextmanager
def checkpoints_refused() -> Iterator[None]:
    """Say what a checkpoint of torch cannot do where others look on."""
    try:
        yield
    except CheckpointError as error:
        raise TransformError(
            "model_fn calls torch.utils.checkpoint, which runs parts of it again where nobody sees "
            "it. Use gf.remat instead (gf.hf.enable_remat(model) in transformers), or "
            'mode="materialized" with vectorize=False.'
        ) from error


def _marked(cotangent: Tensor) -> Tensor:
    """Where a cotangent is; NaN is what zero times infinity is."""
    return (cotangent != 0) & ~cotangent.isnan()


def _each(losses: Tensor) -> Tensor:
    """The cotangents that ask for one loss each."""
    return torch.eye(len(losses), dtype=losses.dtype, device=losses.device)


def _zero(y: Tensor | None) -> Tensor:
    assert y is not None
    return y.new_zeros(()).expand(y.shape)
