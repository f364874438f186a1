"""Proof, on a few samples, that `model_fn` is what it has to be: pure, with one loss per sample
that depends on no other sample. Every mode asks for it once per structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghostfunc._base.company import in_parts
from ghostfunc._base.couplings import cause
from ghostfunc._base.documents import content, packing_of
from ghostfunc._base.dtypes import coarsest_of
from ghostfunc._base.errors import (
    CoupledSamplesError,
    GhostError,
    RandomnessError,
    TransformError,
    UnsupportedAlwaysError,
    UntrackedUseError,
)
from ghostfunc._base.losses import check_losses, check_shape, close
from ghostfunc._base.module import ModuleFn
from ghostfunc._base.processes.dtensors import is_dtensor
from ghostfunc._base.processes.pieces import held_whole, in_step
from ghostfunc._base.program import Program
from ghostfunc._base.refusals import Refusals
from ghostfunc._base.remembered import Structures, layout_key, memory, structure
from ghostfunc._base.side_effects import Footprint, SideEffects
from ghostfunc._base.torch_private import (
    address,
    any_symbolic,
    batched_within,
    dual,
    followed,
    in_transform,
)
from ghostfunc._base.trees import batch_size, map_tensors, take, tensors_of
from ghostfunc._base.types import PyTree


@torch.enable_grad()
def prove_independent(
    program: Program, batch: PyTree, *, anew: bool = False, log: Refusals | None = None
) -> tuple[int, Tensor] | None:
    """Raise unless losses are the same in any company: those of two samples that differ beside each
    other, beside copies of themselves and in the whole batch, and all of them in half of the batch.

    Remembered by structure. Where it is asked `anew`, what is remembered is proved of this batch by
    parts alone. Where all samples are the same, another is made of them, and nothing is
    remembered.

    Whoever traces and proves the model next gives a `log` that watches the run of the two samples.
    What those runs compare themselves is left to them: two samples beside a third one, the whole
    batch and its parts. Returned are, if the two samples were run, the second one and both losses.
    """
    n = batch_size(batch)
    if followed():
        refuse_batched(program.leaves, batch)
    remembered = memory(program.model_fn, Structures).independent
    key = structure(program, batch), layout_key(batch)
    ranks = in_step(program.model_fn)
    if ranks is not None:
        new = anew or not remembered.get(key)
        if ranks.any("asking whether all ranks know this structure", new):
            whole = held_whole(program, batch)
            with ranks.apart("looking whether samples depend on each other"):
                if new:
                    prove_independent(whole, batch, anew=anew)
                    if memory(whole.model_fn, Structures).independent.get(key):
                        remembered.put(key, True)
        return None
    compiling = any_symbolic(tensors_of(batch))
    found = remembered.get(key)
    known = found is not None if log is not None else bool(found)
    if known and (compiling or not anew):
        return None
    if compiling:
        raise not_captured()
    if isinstance(program.model_fn, ModuleFn):
        program.model_fn.refuse_batch_norm()
    other = _other_sample(batch)
    last = min(1, n - 1) if other is None else other
    company = _Company(program, batch, n, (0, last))
    if known:
        every = company.whole()
        if program.randomness == "error" and n > 1:
            company.compare({"in a part of the batch": (company.in_parts(), every)})
        return None
    pair = company.of_two(log)
    if program.randomness == "error" and other is None:
        beside = _beside_another(company.run, batch)
        if beside is not None:
            company.compare({"beside another sample": (beside, pair[:1])}, of_as_many=True)
    if other is not None or n == 1:
        remembered.put(key, log is None)
    return last, pair


@dataclass(frozen=True)
class _Company:
    """Losses of a batch's samples in the company of others.

    Attributes:
        n: samples in the batch; `two` of them are looked at more closely.
        dtypes: of what the runs were made of so far.
    """

    program: Program
    batch: PyTree
    n: int
    two: tuple[int, int]
    dtypes: set[torch.dtype] = field(default_factory=set)

    def losses(self, data: PyTree, mode: Refusals | None = None) -> Tensor:
        """The losses of other samples, `[n]`, in a run that a mode watches."""
        if data is self.batch:
            return self.run(data, mode)
        with taken_in_any_company(self.whole, self.n):
            return self.run(data, mode)

    def run(self, data: PyTree, mode: Refusals | None = None) -> Tensor:
        """`losses`, or what the model raises."""
        out = _run_purely(self.program, data, mode or Refusals(), self.dtypes)
        return check_losses(out, batch_size(data)).detach()

    def whole(self) -> Tensor:
        """All losses, from one run."""
        return self.losses(self.batch)

    def in_parts(self) -> Tensor:
        """All losses, from parts of the batch that are drawn at random."""
        found: list[tuple[int, Tensor]] = []
        order = np.random.default_rng(self.n).permutation(self.n).tolist()
        for part in in_parts(order, packing_of(self.batch)):
            losses = self.losses(take(self.batch, part.rows))
            found += [(i, x) for i, own, x in zip(*part, losses, strict=True) if own]
        return torch.stack([x for _, x in sorted(found, key=lambda pair: pair[0])])

    def compare(
        self, company: dict[str, tuple[Tensor, Tensor]], *, of_as_many: bool = False
    ) -> None:
        """Raise `CoupledSamplesError` where losses found in some company are not the expected. Runs
        of as many samples round alike; others by the digits of what they are made of."""
        dtype = None if of_as_many else coarsest_of(self.dtypes)
        for where, (found, expected) in company.items():
            if not close(found, expected, dtype):
                packed = packing_of(self.batch) is not None  # what a row couples no call tells
                raise coupled_samples(
                    f"some samples have losses {expected[:8].tolist()}; {where}, they have "
                    f"{found[:8].tolist()}",
                    self.batch,
                    "" if packed else cause(self.losses, self.batch, self.two),
                )

    def of_two(self, log: Refusals | None) -> Tensor:
        """The losses of the two, compared with those in other company, as far as nobody with a
        `log` does it later."""
        batch, two, randomness = self.batch, self.two, self.program.randomness
        # One sample by itself comes first: errors count its losses, and not those of copies.
        every = self.whole() if self.n == 1 and randomness == "error" else None
        pair = self.losses(take(batch, list(two)), log)
        if randomness != "error":
            return pair
        alike = torch.stack([self.losses(take(batch, [i, i]))[0] for i in two])
        self.compare({"beside a copy of itself": (alike, pair)}, of_as_many=True)
        company: dict[str, tuple[Tensor, Tensor]] = {}
        if every is None and log is None:
            every = self.whole()
        if every is not None:
            company["in the whole batch"] = every[list(two)], pair
        if log is None:
            three = self.losses(take(batch, [*two, two[0]]))[:2]
            company["with a copy of sample 0 added"] = three, pair
        if every is not None and self.n > 2:
            company["in a part of the batch"] = self.in_parts(), every
        self.compare(company)
        return pair


def pure(
    run: Callable[[], Tensor],
    program: Program,
    batch: PyTree,
    params: Sequence[Tensor],
    mode: Refusals,
    dtypes: set[torch.dtype] | None = None,
) -> Tensor:
    """The losses of a run at `params`, which `mode` watches, too; `dtypes` gets those of its
    tensors. Raise if the function draws random numbers that it should not, writes to what it is
    given, or depends on its parameters by no way or by another one.

    What is found of one way through a program says nothing of the next: whoever runs the program by
    plain autograd because something is new, runs it so.
    """
    effects = SideEffects(program, batch)
    try:
        with effects, mode:
            out = run()
    except NotImplementedError as error:
        if "HigherOrderOperator" not in str(error):
            raise
        raise UnsupportedAlwaysError(
            "model_fn calls torch.cond, while_loop or another operator that takes functions, "
            "which no mode sees into. Write it with if and while, or with torch.where."
        ) from error
    check_shape(out, batch_size(batch))
    if effects.seen and program.randomness == "error":
        raise RandomnessError(
            "model_fn draws random numbers (dropout in training mode?). Call module.eval(), or "
            'pass randomness="different" to give every sample its own draws.'
        )
    refuse_unreached(out)
    _refuse_kept(out, program, params)
    if dtypes is not None:
        dtypes |= {out.dtype, *effects.dtypes}
    return out


def _run_purely(
    program: Program, batch: PyTree, mode: Refusals, dtypes: set[torch.dtype] | None = None
) -> Tensor:
    """What a run at aliases of the parameters returns, which has to be `pure`."""
    params = lend(program.leaves)
    given = program.spec.unflatten(params)
    return pure(lambda: program.model_fn(given, batch), program, batch, params, mode, dtypes)


@contextmanager
def seen_from_outside(program: Program, batch: PyTree) -> Iterator[None]:
    """Around a pass that no mode watches. If it left what side effects leave, the program is run
    once more, `pure`: the pass before may have drawn, or written, where it never did."""
    if any_symbolic((*program.leaves, *tensors_of(batch))):
        yield
        return
    before = Footprint.of(program, batch)
    yield
    if not before.remains(program):
        with torch.enable_grad():
            _run_purely(program, batch, Refusals())


MODEL_FAILED = RuntimeError, ValueError, LookupError, TypeError, ArithmeticError, AssertionError
"""What a model raises on a batch that it does not take."""


@contextmanager
def taken_in_any_company(whole: Callable[[], object], n: int) -> Iterator[None]:
    """Raise `CoupledSamplesError` where a model fails on other samples than its batch of n, though
    it takes that. What it raises there, too, is the caller's own error."""
    try:
        yield
    except GhostError:
        raise
    except MODEL_FAILED as error:
        try:
            whole()
        except MODEL_FAILED:
            raise error from None
        raise CoupledSamplesError(
            f"model_fn takes this batch of {n} samples, but not some of them in other company "
            f"({type(error).__name__}: {error}). The loss of a sample has to be found whatever "
            "samples are beside it. Usual causes: an index in the batch that points at other "
            f"samples, or a batch size that is written down (view({n}, ...), an assertion). Keep "
            "what a sample needs in its own row, and take sizes from the batch."
        ) from error


def were_compared(program: Program, batch: PyTree) -> None:
    """Note that a proof has compared the losses of a whole batch with those of its parts, which
    `prove_independent` left to it."""
    remembered = memory(program.model_fn, Structures).independent
    key = structure(program, batch), layout_key(batch)
    if remembered.get(key) is not None:
        remembered.put(key, True)


def _beside_another(losses: Callable[[PyTree], Tensor], batch: PyTree) -> Tensor | None:
    """Sample 0's loss beside a sample that is made of it, `[1]`: its values in reverse order. None
    if that is the same sample, or none that the model takes."""
    one = take(batch, [0])
    two = map_tensors(lambda x: torch.cat([x, x.flip(tuple(range(1, x.ndim)))]), one)
    if not distinct(two):
        return None
    try:
        return losses(two)[:1]
    except MODEL_FAILED:
        return None  # lengths that no longer fit, say


def not_captured() -> TransformError:
    """A compiled program is recorded on tensors without values."""
    return TransformError(
        "torch.compile can record this call only with a batch like the one it was looked at with, "
        "where the model goes the same way under the compiler. Masks of transformers may go "
        "another one, which leaves open whose the rows are where a sample owns several. Compile a "
        "function that calls ghostfunc's public functions; do not trace them by other "
        "means (make_fx, FakeTensorMode)."
    )


class _Lent(torch.autograd.Function):
    """The identity; what it returns may be written to, as far as autograd is concerned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Tensor:
        return b


def lend(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Aliases of the parameters, one object each, whatever is tied outside. Outside transforms they
    require gradients, as they do in training."""
    if in_transform():
        return [x.view_as(x) for x in leaves]
    return [_Lent.apply(x.detach().requires_grad_()) for x in leaves]


def _nodes(losses: Tensor) -> Iterator[Any]:
    """The nodes of autograd's graph."""
    todo, known = [losses.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in known:
            continue
        known.add(node)
        yield node
        todo += [parent for parent, _ in node.next_functions]


def refuse_unreached(losses: Tensor) -> None:
    """Raise `UntrackedUseError` if no parameter reaches the losses: all scores would be zero. In
    transforms a trace tells."""
    if not in_transform() and not losses.requires_grad:
        raise unreached()


def unreached() -> UntrackedUseError:
    """No gradient of any sample is other than zero."""
    return UntrackedUseError(
        "No parameter reaches the losses, so every gradient would be zero. Usual causes: model_fn "
        "runs under torch.no_grad() or torch.inference_mode(), detaches what it returns, or does "
        "not use the params that it is given."
    )


def _refuse_kept(losses: Tensor, program: Program, params: Sequence[Tensor]) -> None:
    """Raise `UntrackedUseError` if the losses depend on a parameter's memory by another way than
    these `params`."""
    if in_transform():
        return
    named = zip(program.spec.names, program.leaves, strict=True)
    names = {address(x): name for name, x in named if x.numel()}
    own = {x.grad_fn.next_functions[0][0] for x in params if x.grad_fn is not None}
    given = {id(x) for x in params}
    for node in _nodes(losses):
        if node.name() != "torch::autograd::AccumulateGrad" or node in own:
            continue
        if id(node.variable) in given:
            continue
        if is_dtensor(node.variable):
            raise UntrackedUseError(
                "The losses depend on a parameter of a sharded module outside of its unit (a "
                "module that fully_shard was called with, or that holds what a tensor parallel "
                "plan has cut), where it is not whole. Use it in the unit's forward, or shard that "
                "part together with the rest of the module."
            )
        name = names.get(address(node.variable)) if node.variable.numel() else None
        if name is not None:
            raise UntrackedUseError(
                f"The losses depend on parameter {name!r} by another way than the params that "
                "model_fn is given: a closure, or a tensor made from it before and kept (a cache, "
                "an attribute, torch.nn.utils.parametrize.cached() around the call). Use the "
                "argument and make such tensors anew in every call; detach what is to be a "
                "constant."
            )


def refuse_checkpoints(losses: Tensor) -> None:
    """Raise `TransformError` for reentrant checkpoints, through which no gradient can be asked for:
    they add theirs to `.grad` behind autograd's back."""
    if any(node.name() == "CheckpointFunctionBackward" for node in _nodes(losses)):
        raise TransformError(
            "model_fn calls torch.utils.checkpoint with use_reentrant=True, whose backward "
            "pass runs where nobody sees it. Use gf.remat instead "
            "(gf.hf.enable_remat(model) in transformers)."
        )


def coupled_samples(observed: str, batch: PyTree = None, cause: str = "") -> CoupledSamplesError:
    """The error; of a known `cause`, that it is what couples them."""
    if cause:
        return CoupledSamplesError(
            f"The loss of one sample depends on the others: {observed}. Per-sample gradients do "
            f"not exist for such a model. {cause}"
        )
    if packing_of(batch) is not None:
        return CoupledSamplesError(
            f"The loss of one packed document depends on others of its row: {observed}. "
            "Per-document gradients do not exist then. Usual causes: attention that looks across "
            "documents (pass position_ids or a block-diagonal mask: docs.rows() has both), "
            "positions that do not begin anew, convolutions over rows, state carried along a row."
        )
    return CoupledSamplesError(
        f"The loss of one sample depends on the others: {observed}. Per-sample gradients do not "
        "exist for such a model. Usual causes: batch normalisation in training mode, mixup, "
        "in-batch negatives, a loss or an input normalised over the batch, state kept between "
        "calls."
    )


def distinct(batch: PyTree) -> bool:
    """Whether not all samples of a batch are the same."""
    return _other_sample(batch) is not None


def _other_sample(batch: PyTree) -> int | None:
    """The first sample that differs from sample 0."""
    found = []
    for x in tensors_of(content(batch)):
        if len(x) > 1 and x[0].numel():
            differs = (x != x[:1]).reshape(len(x), -1).any(1)
            found += differs.nonzero().flatten()[:1].tolist()
    return min(found, default=None)


def refuse_batched(leaves: Sequence[Tensor], batch: PyTree) -> None:
    """Raise `TransformError` if `torch.vmap` runs over parameters or batches, or if they are dual
    tensors of no transform."""
    given = *leaves, *tensors_of(batch)
    if any(map(dual, given)):
        raise TransformError(
            "params or batch have tangents of torch.autograd.forward_ad, which cannot be followed. "
            "Use torch.func.jvp around the call."
        )
    if any(map(batched_within, given)):
        raise TransformError(
            "torch.vmap over params or batches is not supported: a model has to be looked at with "
            "values. vmap over directions works; loop over an ensemble."
        )
