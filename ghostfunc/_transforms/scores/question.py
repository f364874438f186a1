"""Scores of train samples in every mode: dot products with one or several validation gradients,
or their cosines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base import batches, definition
from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import OptionError
from ghostfunc._base.losses import FiniteLosses, check_finite, refuse_not_finite
from ghostfunc._base.options import (
    CHECKS,
    check_chunk_size,
    check_contract_dtype,
    check_flags,
    check_vectorize,
    one_of,
)
from ghostfunc._base.processes.pieces import (
    chunks_of_all,
    in_step,
    lengths_of_whole,
    samples_of_all,
)
from ghostfunc._base.program import Program
from ghostfunc._base.purity import prove_independent
from ghostfunc._base.trees import batch_size
from ghostfunc._base.types import Check, ContractDtype, Mode, ModelFn, PyTree, Randomness, Reduction
from ghostfunc._factors import extreme_norms
from ghostfunc._factors.contract import add_up
from ghostfunc._factors.cost import UseShape
from ghostfunc._factors.factor import Dense
from ghostfunc._factors.matmul import inner_products
from ghostfunc._quantities.quantity import Prepared, Quantity, SqNorm
from ghostfunc._quantities.readers import DeferredReader, DotReader, PairReader
from ghostfunc._taps.run import run
from ghostfunc._taps.sinks import Ready
from ghostfunc._taps.use_shapes import use_shapes
from ghostfunc._transforms.factored import FactoredGrads
from ghostfunc._transforms.scores import lengths
from ghostfunc._transforms.scores.by_position import position_dots
from ghostfunc._transforms.scores.on_pieces import in_one_run_of_all
from ghostfunc._transforms.scores.one_run import Sharing, in_one_run
from ghostfunc._transforms.scores.targets import Targets, make_targets
from ghostfunc._transforms.scores.validation import (
    dense_direction,
    kept_readers,
    validation_readers,
)

_MODES = ("ghost", "jvp", "materialized")
_Readers: TypeAlias = Sequence[DotReader | PairReader | DeferredReader]


class _Step(NamedTuple):
    """Losses and gradient of the mean loss, and the scores: for every target a list of tensors,
    one per parameter or one in all."""

    losses: Tensor
    grads: list[Tensor]
    table: list[list[Tensor]]


class _Piece(NamedTuple):
    """As much of one target as is dotted with at one time: a batch, a direction, or gradients that
    were kept."""

    target: int
    val: PyTree | None = None
    u: list[Tensor] | None = None
    kept: FactoredGrads | None = None


@dataclass(frozen=True)
class Question:
    """A validated question: which scores of which data. Made by `ask`."""

    program: Program
    train: PyTree
    targets: Targets
    mode: Mode
    reduction: Reduction
    per_param: bool
    normalize: bool
    vectorize: bool | None
    contract_dtype: ContractDtype
    chunk_size: int | None
    check: Check
    check_finite: bool

    def scores(self) -> PyTree:
        """`[n]` (`[n, m]`), in a dict of several targets, in a pytree for `per_param`."""
        if self.mode == "ghost":
            return self._joined([(p, self._ghost(p, grads=False).table) for p in self._rounds()])
        return self._joined([(p, self._other(p)) for p in self._rounds()])

    def step(self, ready: Ready | None = None) -> tuple[Tensor, list[Tensor], PyTree]:
        """Losses, the gradient of the mean loss, and the scores. `ready` gets most gradients of a
        batch that is run at one time while the backward pass goes on."""
        if self.mode != "ghost":
            scores = self.scores()
            return *self._plain_gradient(), scores
        first, *others = self._rounds()
        losses, grads, table = self._ghost(first, grads=True, ready=ready)
        tables = [(p, self._ghost(p, grads=False).table) for p in others]
        return losses, grads, self._joined([(first, table), *tables])

    def positions(self) -> PyTree:
        """`[n, T]`: the scores, split up by positions."""
        for option, given, needed in (
            ("mode", self.mode, "ghost"),
            ("normalize", self.normalize, False),
            ("contract_dtype", self.contract_dtype, None),
        ):
            if given != needed:
                raise OptionError(f"per_position=True needs {option}={needed!r}; got {given!r}.")
        if in_step(self.program.model_fn) is not None:
            raise OptionError(
                "per_position=True is not for sharded modules. Ask for scores "
                "of whole samples, or on one process with the whole model."
            )
        several = self.targets.vals or any(
            isinstance(u, FactoredGrads) for u in self.targets.directions
        )
        if several and self.reduction == "none":
            raise OptionError(
                'per_position=True needs reduction="mean" or "sum": ask for several validation '
                "batches, a dict of them, to tell validation samples apart."
            )
        finite = FiniteLosses(self.check_finite)
        vals = [self.direction_of(val, finite) for val in self.targets.vals]
        us = [*vals, *map(self._dense, self.targets.directions)]

        def of_chunk(train: PyTree) -> list[Tensor]:
            parts = position_dots(
                self.program, train, us, per_param=self.per_param, check=self.check, look=finite.add
            )
            for k, (u, columns) in enumerate(zip(us, parts, strict=True)):
                self._doubt(finite, _Piece(k, u=u), columns)
            finite.look()
            return _flat(parts)

        flat = batches.joined(batches.each(of_chunk, self.train, self.chunk_size, "train"))
        pieces = [_Piece(k, None, u) for k, u in enumerate(us)]
        return self._joined([(pieces, self._unflat(flat, len(us)))])

    # --- what is run at one time -----------------------------------------------------------------

    def _rounds(self) -> list[list[_Piece]]:
        """Pieces of all targets, to be taken in one run of `train`; what the pieces of one target
        give lies side by side."""
        columns = [
            [_Piece(k, *piece) for piece in self._pieces(val)]
            for k, val in enumerate(self.targets.vals)
        ]
        columns += [
            [_Piece(k, kept=u) if isinstance(u, FactoredGrads) else _Piece(k, u=u)]
            for k, u in enumerate(self.targets.directions)
        ]
        return [[p for p in row if p is not None] for row in zip_longest(*columns)]

    def _pieces(self, val: PyTree) -> list[tuple[PyTree | None, list[Tensor] | None]]:
        if self.chunk_size is None or in_step(self.program.model_fn) is not None:
            return [(val, None)]
        if self.reduction == "none":
            return [(chunk, None) for _, chunk in batches.chunks(val, self.chunk_size, "val")]
        if batch_size(val) <= self.chunk_size and self.mode == "ghost":
            return [(val, None)]
        return [(None, self.direction_of(val))]

    def _dense(self, direction: list[Tensor] | FactoredGrads) -> list[Tensor]:
        if not isinstance(direction, FactoredGrads):
            return direction
        c = 1 / len(direction.losses) if self.reduction == "mean" else 1.0
        return [direction.total(i, c) for i in range(len(self.program.leaves))]

    def direction_of(
        self, val: PyTree, finite: FiniteLosses | None = None, ready: Ready | None = None
    ) -> list[Tensor]:
        """The validation gradient of a batch."""
        return dense_direction(
            self.program,
            val,
            mean=self.reduction == "mean",
            chunk_size=self.chunk_size,
            look=check_finite if finite is None else finite.add,
            ready=ready,
            check=self.check,
        )

    # --- ghost -----------------------------------------------------------------------------------

    def _ghost(self, pieces: Sequence[_Piece], *, grads: bool, ready: Ready | None = None) -> _Step:
        at_once = self._at_once(pieces, grads=grads)
        if at_once is not None:
            return at_once
        if in_step(self.program.model_fn) is not None:  # of all ranks' samples, and in pieces
            pieces = [
                p if p.val is None else _Piece(p.target, u=self.direction_of(p.val)) for p in pieces
            ]
        finite = FiniteLosses(self.check_finite)
        n = samples_of_all(self.program.model_fn, batch_size(self.train)) if grads else 0
        program: Program = self.program
        ours: list[list[UseShape]] = []
        if any(piece.u is None for piece in pieces):
            program, ours = use_shapes(program, self.train, exact=False)
        readers = [self._readers(piece, ours, finite, grads=grads) for piece in pieces]
        quantities: list[Quantity] = [Prepared(r, degree=1) for r in readers]
        if self.normalize:
            quantities.append(SqNorm().contracting(self.contract_dtype))

        def of_chunk(train: PyTree) -> _Step:
            taken = run(
                program,
                train,
                quantities,
                grads=range(len(self.program.leaves)) if grads else (),
                scale=1 / n if grads else 1.0,
                check=self.check,
                summed=() if self.per_param else range(len(readers)),
                finite=finite,
                ready=ready if train is self.train else None,
            )
            dots = taken.values[: len(readers)]
            for piece, columns in zip(pieces, dots, strict=True):
                self._doubt(finite, piece, columns)
            if not self.normalize:
                finite.look()
                return _Step(taken.losses, taken.grads, [self._summed(x) for x in dots])
            sides = [self._lengths(r, dots[0][0]) for r in readers]
            values = taken.values[-1]
            rows = lengths.sample_norms(self.program, train, values, taken.losses, finite)
            table = [self._cosines(x, rows, y) for x, y in zip(dots, sides, strict=True)]
            return _Step(taken.losses, taken.grads, table)

        parts, sums = [], batches.Sums()
        least = chunks_of_all(self.program.model_fn, self.train, self.chunk_size)
        for part in batches.each(of_chunk, self.train, self.chunk_size, "train", least=least):
            parts.append([part.losses, *_flat(part.table)])
            sums.add(part.grads if grads else ())
            del part
        losses, *flat = batches.joined(parts)
        return _Step(losses, sums.result(), self._unflat(flat, len(pieces)))

    def _lengths(self, readers: _Readers, rows: Tensor) -> Tensor:
        """`||u||`, one row per parameter; of a direction's pieces, that of the whole."""
        found = torch.stack([lengths.length(r, rows) for r in readers])
        return lengths_of_whole(self.program.model_fn, self.program.spec.names, found)

    def _doubt(self, finite: FiniteLosses, piece: _Piece, columns: Sequence[Tensor]) -> None:
        """Have a direction that was given looked at if what is made of it is not finite."""
        if piece.u is not None and self.targets.directions:
            title = self.targets.title(piece.target)
            blame = partial(refuse_not_finite, piece.u, self.program.spec, title)
            for values in columns:
                finite.doubt(values, blame)

    def _at_once(self, pieces: Sequence[_Piece], *, grads: bool) -> _Step | None:
        """`_ghost` in one run of both batches, where that can be."""
        piece, *others = pieces
        plain = not others and piece.val is not None and not self.normalize
        if not plain or self.reduction == "none" or self.chunk_size is not None:
            return None
        if self.program.randomness != "error":
            return None
        alone = in_step(self.program.model_fn) is None
        asked = Sharing(
            self.program,
            self.train,
            piece.val,
            mean=self.reduction == "mean",
            grads=grads,
            per_param=self.per_param,
            contract_dtype=self.contract_dtype,
            check=self.check,
            check_finite=self.check_finite,
        )
        found = in_one_run(asked) if alone else in_one_run_of_all(asked)
        if found is None:
            return None
        return _Step(found.losses, found.grads, [self._summed(found.dots)])

    def _readers(
        self, piece: _Piece, ours: list[list[UseShape]], finite: FiniteLosses, *, grads: bool
    ) -> _Readers:
        """What reads the scores of one piece; `ours` are the uses in the run of `train`."""
        if piece.u is not None:
            return [DotReader(u, self.contract_dtype) for u in piece.u]
        if piece.kept is not None:
            return kept_readers(
                self.program,
                ours,
                piece.kept,
                reduction=self.reduction,
                grads=grads,
                contract_dtype=self.contract_dtype,
            )
        return validation_readers(
            self.program,
            ours,
            piece.val,
            finite=finite,
            reduction=self.reduction,
            grads=grads,
            contract_dtype=self.contract_dtype,
            check=self.check,
        )

    # --- the other modes -------------------------------------------------------------------------

    def _other(self, pieces: Sequence[_Piece]) -> list[list[Tensor]]:
        for piece in pieces:
            if piece.val is not None:
                self._prove(piece.val)

        def of_chunk(train: PyTree) -> list[Tensor]:
            self._prove(train)
            if self.mode == "jvp":
                if self.program.randomness == "error":
                    definition.prove_independent_tangents(self.program, train)
                return _flat([self._jvp(train, piece) for piece in pieces])
            formed = self._formed(train)
            return _flat([self._materialized(formed, piece) for piece in pieces])

        flat = batches.joined(batches.each(of_chunk, self.train, self.chunk_size, "train"))
        return self._unflat(flat, len(pieces))

    def _prove(self, batch: PyTree) -> None:
        prove_independent(self.program, batch, anew=self.mode == "jvp" and self.check != "never")

    def _jvp(self, train: PyTree, piece: _Piece) -> list[Tensor]:
        columns = [
            definition.jvp_dots(self.program, train, u, per_param=self.per_param)
            for u in self._directions(piece)
        ]
        if piece.val is not None and self.reduction == "none":
            return [torch.stack(column, dim=1) for column in zip(*columns, strict=True)]
        return columns[0]

    def _directions(self, piece: _Piece) -> Iterator[list[Tensor]]:
        """The directions of one piece, one at a time."""
        args = self.program, piece.val
        if piece.u is not None:
            return iter([piece.u])
        if self.reduction == "none":
            return definition.val_gradients(*args)
        scale = 1 / batch_size(piece.val) if self.reduction == "mean" else 1.0
        return iter([definition.val_gradient(*args, scale)])

    def _materialized(self, train: list[Tensor], piece: _Piece) -> list[Tensor]:
        if piece.u is not None:
            theirs = [wide(x).reshape(1, -1) for x in piece.u]
        else:
            theirs = self._formed(piece.val)
            if self.reduction != "none":
                theirs = [v.sum(0, keepdim=True) for v in theirs]
            if self.reduction == "mean":
                theirs = [v / batch_size(piece.val) for v in theirs]
        dots = [inner_products(g, v) for g, v in zip(train, theirs, strict=True)]
        if piece.u is not None or self.reduction != "none":
            dots = [x[:, 0] for x in dots]
        if not self.normalize:
            return self._summed(dots)
        return self._cosines(dots, _rows_of(train), _rows_of(theirs))

    def _formed(self, batch: PyTree) -> list[Float[Tensor, "n elements"]]:
        grads = definition.materialize(self.program, batch, vectorize=self.vectorize)
        return [wide(g)[:, None].flatten(1) for g in grads]

    def _plain_gradient(self) -> tuple[Tensor, list[Tensor]]:
        n = batch_size(self.train)

        def of_chunk(train: PyTree) -> tuple[list[Tensor], Tensor]:
            weights = torch.full((batch_size(train),), 1 / n, dtype=torch.float64, device="cpu")
            losses, grads = definition.weighted_gradient(self.program, train, weights)
            return grads, losses

        rows, sums = [], batches.Sums()
        for grads, losses in batches.each(of_chunk, self.train, self.chunk_size, "train"):
            rows.append([losses])
            sums.add(grads)
            del grads
        return batches.joined(rows)[0], sums.result()

    # --- tables ----------------------------------------------------------------------------------

    def _summed(self, dots: Sequence[Tensor]) -> list[Tensor]:
        return list(dots) if self.per_param else [add_up(dots)]

    def _cosines(self, dots: Sequence[Tensor], rows: Tensor, lengths: Tensor) -> list[Tensor]:
        if self.per_param:
            return list(map(extreme_norms.cosine, dots, rows, lengths))
        return [
            extreme_norms.cosine(
                add_up(dots), extreme_norms.joint(rows), extreme_norms.joint(lengths)
            )
        ]

    def _unflat(self, flat: Sequence[Tensor], count: int) -> list[list[Tensor]]:
        width = len(flat) // count
        return [list(flat[i : i + width]) for i in range(0, len(flat), width)]

    def _joined(self, rounds: Sequence[tuple[Sequence[_Piece], list[list[Tensor]]]]) -> PyTree:
        """What the caller gets, from the pieces and the tables of all rounds."""
        rows: list[list[list[Tensor]]] = [[] for _ in range(len(self.targets))]
        for pieces, table in rounds:
            for piece, row in zip(pieces, table, strict=True):
                rows[piece.target].append(row)
        found = [x[0] if len(x) == 1 else batches.joined(x, axis=1) for x in rows]
        return self.targets.named(
            [self.program.spec.unflatten(x) if self.per_param else x[0] for x in found]
        )


def ask(
    model_fn: ModelFn,
    params: PyTree,
    train: PyTree,
    val: PyTree | None,
    direction: PyTree | None,
    *,
    mode: Mode,
    reduction: Reduction,
    per_param: bool,
    normalize: bool,
    vectorize: bool | None,
    contract_dtype: ContractDtype,
    chunk_size: int | None,
    check: Check,
    randomness: Randomness,
    check_finite: bool,
) -> Question:
    """Validate a call of one of the public functions."""
    one_of("mode", mode, _MODES)
    one_of("reduction", reduction, ("mean", "sum", "none"))
    one_of("randomness", randomness, ("error", "different"))
    one_of("check", check, CHECKS)
    check_contract_dtype(contract_dtype, mode)
    check_chunk_size(chunk_size)
    check_flags(per_param=per_param, normalize=normalize, check_finite=check_finite)
    check_vectorize(vectorize)
    _check_mode(mode, normalize, check_finite)
    program = Program.of(model_fn, params, randomness)
    batch_size(train, "train")
    targets = make_targets(val, direction, train, program.leaves, program.spec)
    if mode != "ghost" and any(isinstance(u, FactoredGrads) for u in targets.directions):
        raise OptionError(
            f'Validation gradients kept by gf.factored_grads need mode="ghost"; got mode={mode!r}. '
            "Pass the validation batch itself as val."
        )
    if mode != "ghost":
        for k, u in enumerate(targets.directions):
            if not isinstance(u, FactoredGrads):
                refuse_not_finite(u, program.spec, targets.title(k))
    if in_step(model_fn) is not None:
        _check_in_step(mode, reduction, targets)
    return Question(
        program,
        train,
        targets,
        mode,
        reduction,
        per_param,
        normalize,
        vectorize,
        contract_dtype,
        chunk_size,
        check,
        check_finite,
    )


def _check_mode(mode: Mode, normalize: bool, check_finite: bool) -> None:
    """Raise for what a mode does not have."""
    if not check_finite and mode != "ghost":
        raise OptionError(f'check_finite=False needs mode="ghost"; got mode={mode!r}.')
    if normalize and mode == "jvp":
        raise OptionError(
            'Cosines need norms of gradients, which mode="jvp" does not have. Use mode="ghost" or '
            'mode="materialized".'
        )


def _check_in_step(mode: Mode, reduction: Reduction, targets: Targets) -> None:
    """Raise for what is not for sharded modules."""
    if mode != "ghost":
        raise OptionError(
            f'mode={mode!r} is not for sharded modules: use mode="ghost", '
            "or one process with the whole model."
        )
    if reduction == "none":
        raise OptionError(
            'reduction="none" is not for sharded modules, whose validation '
            "gradient is one of all ranks' samples. gf.ghost_gram(model_fn, params, train, val) "
            "has the products of a rank's own samples."
        )
    if any(isinstance(u, FactoredGrads) for u in targets.directions):
        raise OptionError(
            "Validation gradients kept by gf.factored_grads are those of one rank's samples. Pass "
            "the validation batches as val, or gf.direction(...), which is of all ranks' samples."
        )


def _rows_of(grads: Sequence[Float[Tensor, "n elements"]]) -> Float[Tensor, "params n"]:
    return torch.stack([extreme_norms.norms((Dense(g),)) for g in grads])


def _flat(table: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [x for row in table for x in row]
