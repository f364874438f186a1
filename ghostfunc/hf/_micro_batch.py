"""Scores of one micro-batch: what is run, how it is weighed, what it is scored against."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ghostfunc._base.documents import Documents
from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import (
    BatchError,
    OptionError,
    TransformError,
    UnsupportedOpError,
    UntrackedUseError,
)
from ghostfunc._base.evaluating import evaluating as evaluation_mode
from ghostfunc._base.module import accumulate_grads, from_module
from ghostfunc._base.processes.dtensors import local
from ghostfunc._base.processes.pieces import in_step
from ghostfunc._base.processes.sharding import reshard
from ghostfunc._base.program import Program
from ghostfunc._base.types import ModelFn
from ghostfunc._factors.spread import spread
from ghostfunc._quantities.quantity import Dot, Quantity, Spread, SqNorm
from ghostfunc._transforms.factored import FactoredGrads, kept_of
from ghostfunc._transforms.health import underflows
from ghostfunc.hf._divisor import Divisor, compare
from ghostfunc.hf._flattened import apart_from_weight, weighted
from ghostfunc.hf._trained_loss import AskedLoss, OtherOutputs, SampleLoss
from ghostfunc.hf._warm import keep_pass, look_first, one_pass
from ghostfunc.shapley import Optimizer, directions

Form: TypeAlias = Literal["sgd", "previous_state", "exact"]
Pieces: TypeAlias = Mapping[str, Sequence[tuple[dict[str, Tensor], int]]]
"""By score set: batches as the trainer collates them, and how many samples each has."""


class Known(NamedTuple):
    """What the samples of a micro-batch are known by.

    Attributes:
        ids: of each sample; where samples own several documents, of each document.
        places: whose sample of the micro-batch each document is, `[documents]`; None where samples
            and documents are the same.
    """

    ids: Tensor
    places: Tensor | None = None


Book: TypeAlias = tuple[Known, FactoredGrads]
"""The samples of a micro-batch, and its kept factors."""

NORMS, SPREAD = "norms of samples", "spread of samples"
"""Quantities beside the dot products; no score set can have these names in a table."""


@dataclass
class Values:
    """Of the samples of a micro-batch: their ids, values and, where read, norms and spread."""

    ids: Tensor
    columns: Tensor
    norms: Tensor | None = None
    spread: Tensor | None = None
    """`||g_i||^2` and `<g_i, sum_j g_j>`, `[n, params, 2]`."""

    places: Tensor | None = None
    """As those of `Known`."""

    def of_samples(self) -> Values:
        """The same with the values of a sample's documents added up; norms are of documents."""
        if self.places is None:
            return self
        places = self.places.to(self.columns.device)
        n = int(places[-1]) + 1
        columns = self.columns.new_zeros(n, self.columns.shape[1]).index_add(
            0, places, self.columns
        )
        ids = torch.zeros(n, dtype=self.ids.dtype, device=self.ids.device)
        return Values(ids.index_copy(0, self.places, self.ids), columns, self.norms)


@dataclass
class Scoring:
    """A module as a function of its parameters, and the loss it is trained with.

    Attributes:
        module: without a compiler's wrapper.
        loss: sums and counts per sample.
        divisor: what the trainer divides by, for training.
        order: of the values.
        mixed: whether autocast rounds: half precision is left to autograd, whose sums it rounds.
        compiled: whether the pass of the one-pass forms is compiled.
        norms: whether norms of samples are read too.
        spread: whether it is read how their gradients lie to their sum, too.
        processes: that gradients are averaged over.
    """

    module: nn.Module
    loss: SampleLoss
    divisor: Divisor | None
    order: Literal[1, 2]
    mixed: bool
    compiled: bool
    norms: bool
    spread: bool
    processes: int = 1
    model_fn: ModelFn = field(init=False)
    params: dict[str, Tensor] = field(init=False)
    looked_at: set[Hashable] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.model_fn, self.params = from_module(self.module, self._weighted)
        self._run: Callable[..., Any] = one_pass
        self._run_and_keep: Callable[..., Any] = keep_pass
        if self.compiled:
            self._run, self._run_and_keep = _compiled(one_pass), _compiled(keep_pass)

    def _weighted(self, module: nn.Module, batch: Any) -> Tensor:
        samples, weight = apart_from_weight(batch)
        sums = self.loss.sums(module, samples)
        if isinstance(self.loss, AskedLoss) and self.divisor is not None:
            sums = sums if self.divisor.counted else sums * self.loss.counts(samples)
        return sums * weight

    # --- one description, two uses: training and score sets are weighed here ---

    def training_batch(
        self, inputs: Mapping[str, Tensor], n: int, counted: Any, micro_batches: int, scale: float
    ) -> Any:
        """A micro-batch whose losses add up to what Trainer trains, times a loss scale."""
        assert self.divisor is not None
        by_sample: Any = self.loss.by_sample(inputs, n)
        if self.compiled and isinstance(by_sample, Documents):
            raise OptionError(
                "compile=True (torch_compile=True) cannot record where the samples of a row lie, "
                "which is read from each batch. Leave it out, or let the collator pad in place of "
                "putting all samples into one row."
            )
        own = self.loss.counts(by_sample).sum()
        items = self.divisor.items(own, counted)
        # One after the other, as Trainer divides: every bit is the same.
        weight = scale / self.divisor.shares(micro_batches) / items
        return weighted(by_sample, weight.expand(n))

    def score_batches(self, pieces: Pieces) -> dict[str, list[Any]]:
        """Batches whose mean losses add up to the score set's loss: the mean over its items."""
        out: dict[str, list[Any]] = {}
        for name, parts in pieces.items():
            sampled: list[Any] = [(self.loss.by_sample(inputs, n), n) for inputs, n in parts]
            items = [self.loss.counts(inputs).sum().float() for inputs, _ in sampled]
            total = torch.stack(items).sum()
            out[name] = [weighted(inputs, (n / total).expand(n)) for inputs, n in sampled]
        return out

    def sum_of(self, batch: Any, module: nn.Module | None = None) -> float:
        """The sum of a batch's weighted losses, without gradient."""
        with torch.no_grad():
            return float(self._weighted(module or self.module, batch).sum())

    def items_of(self, inputs: Mapping[str, Any], n: int) -> float:
        """How many items the rows of n samples have."""
        samples: Any = self.loss.by_sample(inputs, n)
        return float(self.loss.counts(samples).sum())

    def look_at_rows(self, parts: Sequence[tuple[Mapping[str, Any], int]], where: str) -> None:
        """Raise for rows that are not the samples', and where there is nothing to learn.

        Raises:
            BatchError: another number of rows, or not a single item in all of them.
        """
        if not sum([self.items_of(inputs, n) for inputs, n in parts]):
            raise BatchError(
                f"There is not a single item in {where}: all its labels are -100. Look at the "
                "collator's labels, and at prompts that are cut before their completion."
            )

    def hold(
        self,
        given: Mapping[str, Any],
        n: int,
        pieces: Pieces,
        loss_with: Callable[..., float],
        divisor_at: Callable[[float], Divisor],
        counted: Any,
        micro_batches: int,
        numbered: Callable[[Mapping[str, Any]], Any],
        tolerance: float,
    ) -> Divisor:
        """Hold this description against a trainer's own losses, in training and in score sets.

        Args:
            given, n: the first micro-batch, and how many samples it has.
            pieces: the batches of the score sets.
            loss_with: the trainer's loss, `loss_with(number of items, batch)`.
            divisor_at: asks what the trainer divides by.
            counted: the number of items the trainer counted.
            micro_batches: of the step.
            numbered: the number of items that a score batch is to be asked with.
            tolerance: relative.
        """
        parts = [(name, part, m) for name, row in pieces.items() for part, m in row]
        for name, part, _ in parts:
            missing = [x for x in NEEDED if x in given and x not in part]
            if missing:
                raise BatchError(
                    f"score_dataset {name!r} has no {missing[0]!r}, which train_dataset has. "
                    f"Collated, it has {sorted(part)}."
                )
        for name, row in pieces.items():
            self.look_at_rows(row, f"the samples of score_dataset {name!r}")
        self.divisor = divisor = divisor_at(tolerance)
        batch = self.training_batch(given, n, counted, micro_batches, 1.0)
        theirs = loss_with(counted) / divisor.shares(micro_batches)
        ours = self.sum_of(batch)
        if abs(self.processes * ours - theirs) < abs(ours - theirs):
            self.divisor = divisor = divisor._replace(times=self.processes)
        compare(ours * divisor.times, theirs, tolerance, "the first micro-batch")
        if isinstance(self.loss, AskedLoss):
            other = OtherOutputs(self.module)
            ours = self.sum_of(batch, other) * divisor.times
            theirs = loss_with(counted, module=other) / divisor.shares(micro_batches)
            compare(ours, theirs, tolerance, "random outputs")
        for name, part, m in parts:
            if not self.items_of(part, m):
                continue  # as a sample without labels by itself
            (batch,) = self.score_batches({name: [(part, m)]})[name]
            where = f"a batch of score_dataset {name!r}"
            compare(self.sum_of(batch) / m, loss_with(numbered(part), part), tolerance, where)
        return divisor

    # --- values ---

    def follow(self) -> None:
        """Take the parameters as they are now: a callback may have given them other memory, and a
        forward pass of Trainer's may have left shards whole."""
        reshard(self.module)
        named = dict(self.module.named_parameters())
        self.params = {name: local(named[name]) for name in self.params}

    def look(self, batch: Any) -> None:
        """Trace and prove a batch of new shapes; the generators of training stay where they are.

        Raises:
            UnsupportedOpError, UntrackedUseError: with the way out that a trainer has.
        """
        try:
            look_first(self.model_fn, self.params, batch, self.looked_at)
        except (UnsupportedOpError, UntrackedUseError) as error:
            raise type(error)(
                f'{error} A trainer has mode="ghost" alone: here, register a rule; freeze these '
                "parameters, whose ops may then be any; or train others, such as LoRA's."
            ) from error

    def one_pass(
        self, known: Known, batch: Any, us: Mapping[str, Any], scale: float
    ) -> tuple[Tensor, Values]:
        """Losses; gradients to `.grad`; values against directions that are known."""
        read: dict[str, Quantity] = {name: Dot(u) for name, u in us.items()}
        if self.norms:
            read[NORMS] = SqNorm()
        if self.spread:
            read[SPREAD] = Spread()
        half = self.mixed or any(wide(x) is not x for x in self.params.values())
        out = self._run(self.model_fn, self.params, batch, read, "autograd" if half else True)
        # Over shards it is the sum over processes already, and Trainer's is their mean.
        summed = in_step(self.model_fn) is not None
        accumulate_grads(self.module, out.grads or {}, weight=1 / self.processes if summed else 1.0)
        tables = out.values.pop(SPREAD) if self.spread else None
        share = scale * self.processes
        table = None if tables is None else torch.stack(list(tables.values()), dim=1) / share**2
        sums = {name: torch.stack(list(x.values())).sum(0) for name, x in out.values.items()}
        norms = _roots(sums.pop(NORMS), out.grads or {}) / share if self.norms else None
        columns = torch.stack(list(sums.values()), dim=1) / share
        return out.losses, Values(known.ids, columns, norms, table, known.places)

    def keep(self, known: Known, batch: Any, books: list[Book]) -> Tensor:
        """Losses; gradients to `.grad`; factors are kept until the step's gradient is there."""
        program = Program.of(self.model_fn, self.params, "different")
        losses, parts, grads = self._run_and_keep(self.model_fn, self.params, batch)
        book = kept_of(program, losses, parts)
        accumulate_grads(self.module, grads)
        books.append((known, book))
        return book.losses

    def kept_values(self, books: list[Book], us: Mapping[str, Any], scale: float) -> list[Values]:
        """Values of all that is kept, which then is kept no longer."""
        found, share = [], scale * self.processes
        for known, book in books:
            columns = torch.stack([book.dot_prods(u) for u in us.values()], dim=1) / share
            norms = book.norms() / share if self.norms else None
            rows = [spread(bundle).table for bundle in book.bundles] if self.spread else None
            table = None if rows is None else torch.stack(rows, dim=1) / share**2
            found.append(Values(known.ids, columns, norms, table, known.places))
        books.clear()
        return found

    def squares(self, scale: float) -> dict[str, Tensor]:
        """`||G||^2` of the gradient in `.grad`, by parameter."""
        named = dict(self.module.named_parameters())
        grads = {k: named[k].grad for k in self.params}
        return {
            k: torch.zeros((), device="cpu") if g is None else wide(g).square().sum() / scale**2
            for k, g in grads.items()
        }

    def gradients(self, pieces: Pieces) -> dict[str, Any]:
        """The gradient of every score set's loss."""
        plain = Optimizer(lambda grads, params: grads, linear=True, gain=1.0)
        return self._added_up(pieces, plain, None, 1)

    def directions(
        self, pieces: Pieces, optimizer: Optimizer, grads: dict[str, Tensor] | None
    ) -> dict[str, Any]:
        """What samples' weighted gradients are dotted with, by score set."""
        return self._added_up(pieces, optimizer, grads, self.order)

    def _added_up(
        self,
        pieces: Pieces,
        optimizer: Optimizer,
        grads: dict[str, Tensor] | None,
        order: Literal[1, 2],
    ) -> dict[str, Any]:
        batches = self.score_batches(pieces)
        names = [(name, i) for name, parts in batches.items() for i in range(len(parts))]
        us = directions(
            self.model_fn,
            self.params,
            {f"{name} {i}": batches[name][i] for name, i in names},
            optimizer=optimizer,
            grads=grads,
            order=order,
            hvp="reverse",  # plain autograd runs what transforms do not
        )
        total: dict[str, Any] = {}
        for name, i in names:  # pieces of one set add up
            u = us[f"{name} {i}"]
            before = total.get(name)
            total[name] = u if before is None else {k: before[k] + x for k, x in u.items()}
        return total


def _roots(squares: Tensor, grads: Mapping[str, Tensor]) -> Tensor:
    """Norms; NaN where squares underflow, as `gf.ghost_health` refuses them."""
    n = len(squares)
    lost = underflows(squares.double() * n**2, squares.dtype)
    if lost and (bool(squares.any()) or any(bool(g.any()) for g in grads.values())):
        return torch.full_like(squares, torch.nan)
    return squares.sqrt()


def _compiled(f: Any) -> Callable[..., Any]:
    """The function, compiled, with code of its own: the compiler counts the programs of each code,
    of all trainers of a process, and gives up at some. It hides what is raised inside behind words
    of its own."""
    own = types.FunctionType(f.__code__.replace(), f.__globals__, f.__name__)
    compiled: Callable[..., Any] = torch.compile(own, fullgraph=True)

    def run(*args: Any) -> Any:
        try:
            return compiled(*args)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, TransformError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise TransformError(
                f"{cause} A trainer without compile=True (torch_compile=True) need not record it."
            ) from error

    return run


def trainable(module: nn.Module) -> tuple[int, ...]:
    """Which parameters are trained, by identity: freezing and unfreezing make another function."""
    return tuple(id(p) for p in module.parameters() if p.requires_grad)


NEEDED = ("input_ids", "pixel_values", "labels")
"""Columns without which a batch has no loss, if the training set's has them."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and the same random numbers afterwards."""
    with evaluation_mode(model), torch.random.fork_rng():
        yield
