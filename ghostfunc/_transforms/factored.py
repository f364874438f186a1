"""Per-sample gradients kept as factors: one backward pass, many quantities afterwards.

What a use reads must be known before the backward pass. Where it is not (clip by norms, then sum;
choose samples by their scores, then sum), the factors of every use are kept instead and contracted
when the question is asked: the book-keeping of Bu et al., for any contraction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base import definition
from ghostfunc._base.compilable import compilable
from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import OptionError
from ghostfunc._base.losses import FiniteLosses, check_losses, refuse_not_finite
from ghostfunc._base.options import CHECKS, check_flags, check_model_fn, one_of
from ghostfunc._base.processes.pieces import (
    gathered,
    in_step,
    of_all_ranks,
    refuse_other_weights,
    summed_and_cut,
    together,
    whole_likes,
)
from ghostfunc._base.program import Program
from ghostfunc._base.purity import prove_independent
from ghostfunc._base.remembered import memory
from ghostfunc._base.reprs import brief
from ghostfunc._base.torch_private import symbolic
from ghostfunc._base.trees import ParamSpec, batch_size, flatten_like, tensors_of
from ghostfunc._base.types import Check, Mode, ModelFn, PyTree, Randomness
from ghostfunc._factors import bundles, cost, extreme_norms, pairs
from ghostfunc._factors.contract import add_up
from ghostfunc._factors.factor import Dense, Factor, Grouped, OneHot, Outer, times
from ghostfunc._factors.matmul import dots, inner_products
from ghostfunc._factors.parts import in_order
from ghostfunc._taps.run import RunResult, run
from ghostfunc._trace.fitting import Proofs
from ghostfunc._transforms.kept_proof import KeptProof

T = TypeVar("T")


@of_all_ranks("gf.factored_grads")
def factored_grads(
    model_fn: ModelFn,
    params: PyTree,
    batch: PyTree,
    *,
    check: Check = "new",
    randomness: Randomness = "error",
) -> FactoredGrads:
    """Every sample's gradient `g_i`, kept as factors, from one backward pass.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses [n]`.
        params: pytree of floating-point tensors.
        batch: pytree of tensors `[n, ...]`.
        check: when numbers are held against plain autograd, in two more passes: "new", where the
            way through the program or the shapes are new; "always"; or "never".
        randomness: "error" or "different".

    Returns:
        A `FactoredGrads`, to be asked for norms, dot products, Gram matrices and weighted sums in
        any order, without another pass through the model. It holds the input and the output's
        cotangent of every op with a parameter: about as much memory as the activations of a
        training step, and nothing of the size of n models. Its memory is its own: the batch and
        the parameters may be written to afterwards.

    Raises:
        GhostError: one of its children, as for `ghost_vjp`.

    Reference:
        Bu et al., "Differentially Private Optimization on Large Model at Small Cost", ICML 2023.
    """
    one_of("randomness", randomness, ("error", "different"))
    check_model_fn(model_fn)
    one_of("check", check, CHECKS)
    program = Program.of(model_fn, params, randomness)
    return collect(program, batch, outlives=True, check=check)


def collect_by_length(
    program: Program,
    batch: PyTree,
    *,
    mode: Mode,
    vectorize: bool | None,
    check: Check,
    finite: FiniteLosses,
) -> FactoredGrads | KeptByLength:
    """`collect`, documents of packed rows by their lengths."""
    if mode == "materialized" or in_step(program.model_fn) is not None:
        return collect(program, batch, mode=mode, vectorize=vectorize, check=check, finite=finite)
    taken, proof = _run_and_proof(program, batch, check, finite=finite, by_length=True)
    if not taken.parts:
        return FactoredGrads.of(taken, program, proof)
    parts = []
    for samples, factors in taken.parts:
        assert samples is not None
        own = replace(taken, losses=taken.losses[samples], factors=factors)
        parts.append((samples, FactoredGrads.of(own, program, proof)))
    return KeptByLength(taken.losses, parts)


def collect(
    program: Program,
    batch: PyTree,
    *,
    mode: Mode = "ghost",
    vectorize: bool | None = None,
    outlives: bool = False,
    check: Check = "new",
    finite: FiniteLosses | None = None,
) -> FactoredGrads:
    """`factored_grads` of flat parameters; for `mode="materialized"` there are no factors in it."""
    return _collected(program, batch, mode, vectorize, check, outlives=outlives, finite=finite)[0]


Parts: TypeAlias = list[list[dict[str, tuple[Tensor, ...]]]]
"""By parameter and use, the tensors of a factor under its name and whatever else it holds."""


@compilable()
def kept_and_gradient(
    model_fn: ModelFn, params: PyTree, batch: PyTree
) -> tuple[Tensor, Parts, PyTree]:
    """Losses, factors and the gradient of the summed losses, which autograd forms in the same
    backward pass: the parts of a `FactoredGrads`, as a compiled program may return them."""
    program = Program.of(model_fn, params, "different")
    eager = not any(map(symbolic, tensors_of((program.leaves, batch))))
    kept, grads = _collected(program, batch, "ghost", None, "new", outlives=eager, grads=True)
    parts = [[_taken_apart(factor) for factor in bundle] for bundle in kept.bundles]
    return kept.losses, parts, program.spec.unflatten(grads)


def kept_of(program: Program, losses: Tensor, parts: Parts) -> FactoredGrads:
    """The `FactoredGrads` of what `kept_and_gradient` returned."""
    bundles = tuple(tuple(map(_put_together, bundle)) for bundle in parts)
    proof = KeptProof(memory(program.model_fn, Proofs), always=False)
    return FactoredGrads(losses, bundles, tuple(program.leaves), program.spec, None, _proof=proof)


def _taken_apart(factor: Factor) -> dict[str, tuple[Tensor, ...]]:
    if isinstance(factor, OneHot):
        return {f"OneHot {factor.rows}": (factor.ids, factor.b)}
    return {type(factor).__name__: tuple(factor)}


def _put_together(parts: dict[str, tuple[Tensor, ...]]) -> Factor:
    ((name, tensors),) = parts.items()
    kind, _, rows = name.partition(" ")
    if kind == "OneHot":
        ids, b = tensors
        return OneHot(ids, b, int(rows))
    return {"Outer": Outer, "Grouped": Grouped, "Dense": Dense}[kind](*tensors)


def _collected(
    program: Program,
    batch: PyTree,
    mode: Mode,
    vectorize: bool | None,
    check: Check,
    *,
    outlives: bool,
    finite: FiniteLosses | None = None,
    grads: bool = False,
) -> tuple[FactoredGrads, list[Tensor]]:
    if mode == "materialized":
        prove_independent(program, batch)
        with torch.no_grad():
            losses = check_losses(program.losses(list(program.leaves), batch), batch_size(batch))
        formed = definition.materialize(program, batch, vectorize=vectorize)
        bundles = tuple((Dense(g),) for g in formed)
        return FactoredGrads(losses, bundles, tuple(program.leaves), program.spec), []
    taken, proof = _run_and_proof(
        program, batch, check, outlives=outlives, finite=finite, grads=grads
    )
    return FactoredGrads.of(taken, program, proof), taken.grads


def _run_and_proof(
    program: Program,
    batch: PyTree,
    check: Check,
    *,
    outlives: bool = False,
    finite: FiniteLosses | None = None,
    grads: bool = False,
    by_length: bool = False,
) -> tuple[RunResult, KeptProof | None]:
    """A run that keeps all factors, and what holds the numbers that are made of them."""
    everything = range(len(program.leaves))
    taken = run(
        program,
        batch,
        [],
        grads=everything if grads else (),
        collect=everything,
        outlives=outlives,
        check=check,
        finite=finite,
        by_autograd=True,
        by_length=by_length,
    )
    if check == "never" or in_step(program.model_fn) is not None:  # ranks would ask for passes
        return taken, None
    return taken, KeptProof(memory(program.model_fn, Proofs), check == "always")


@dataclass(frozen=True)
class FactoredGrads:
    """The gradients of n samples; made by `gf.factored_grads`.

    Attributes:
        losses: `[n]`.
        bundles: for every parameter the factors of its uses, whose sum is `g_i`.
        leaves: the parameters.
    """

    losses: Float[Tensor, " n"]
    bundles: tuple[tuple[Factor, ...], ...]
    leaves: tuple[Tensor, ...]
    _spec: ParamSpec
    _model_fn: ModelFn | None = None
    _made: dict[tuple[str, int, float], Any] = field(
        default_factory=dict, repr=False, compare=False
    )
    _proof: KeptProof | None = field(default=None, repr=False, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        """What the parameters are called."""
        return self._spec.names

    def __repr__(self) -> str:
        return brief("FactoredGrads", losses=self.losses, params=self.leaves)

    @staticmethod
    def of(
        taken: RunResult,
        program: Program,
        proof: KeptProof | None = None,
    ) -> FactoredGrads:
        """From a run that collected the factors of all parameters."""
        n = len(taken.losses)
        bundles = tuple(
            tuple(bundle) or (Dense(x.new_zeros(()).expand(n, *x.shape)),)  # unused
            for bundle, x in zip(taken.factors, whole_likes(program), strict=True)
        )
        cut = None if in_step(program.model_fn) is None else program.model_fn
        leaves = tuple(program.leaves)
        return FactoredGrads(taken.losses, bundles, leaves, program.spec, cut, _proof=proof)

    def norms(self, *, per_param: bool = False) -> PyTree:
        """`||g_i||`, `[n]`; for `per_param` a pytree like `params` of those.

        Exact as long as the norm itself can be represented: where the square of the whole gradient
        overflows or underflows, norms are taken again at another scale. A gradient with a NaN or
        infinite entry has a NaN or infinite norm.
        """
        check_flags(per_param=per_param)
        rows = self.param_norms()
        return self._spec.unflatten(list(rows)) if per_param else extreme_norms.joint(rows)

    def squares(self) -> Float[Tensor, "params n"]:
        """`||g_i||^2`, one row per parameter, over- and underflows included."""
        rows = [pairs.sqnorms(bundle) for bundle in self.bundles]
        self._hold("squared norms", rows, lambda i, g: _flat(g).square().sum(1), degree=2)
        return torch.stack(rows)

    def param_norms(
        self, squares: Float[Tensor, "params n"] | None = None
    ) -> Float[Tensor, "params n"]:
        """`norms`, one row per parameter."""
        squares = self.squares() if squares is None else squares
        if symbolic(squares):
            return extreme_norms.trusted_roots(squares)
        out = extreme_norms.root(squares)
        extreme = extreme_norms.extremes(squares.sum(0), self.losses)
        if bool(extreme.any()):
            index = extreme.nonzero().flatten()
            for row, bundle in zip(out, self.bundles, strict=True):
                exact = extreme_norms.norms([bundles.take(f, index) for f in bundle])
                row[index] = exact.to(row.dtype)
        return out

    def dot_prods(
        self, direction: PyTree, *, per_param: bool = False, normalize: bool = False
    ) -> PyTree:
        """`<g_i, u>` with a pytree `u` like `params`, `[n]`; per parameter on request. Cosines for
        `normalize`: 0 where `g_i` or `u` is zero, NaN where `||g_i|| ||u||` underflows."""
        with self._together("dotting kept gradients"):
            check_flags(per_param=per_param, normalize=normalize)
            us = flatten_like(direction, self.leaves, self._spec, "direction")
            if self._model_fn is not None:
                us = list(gathered(self._model_fn, us, self._spec))
        dots = self.param_dots(us)
        finite = FiniteLosses()
        for x in dots:
            finite.doubt(x, partial(refuse_not_finite, us, self._spec, "direction"))
        finite.look()
        dots = dots if per_param else [add_up(dots)]
        if normalize:
            lengths = torch.stack([extreme_norms.length(u)[None] for u in us])
            sides = [self.param_norms(), lengths]
            sides = sides if per_param else [extreme_norms.joint(x)[None] for x in sides]
            dots = list(map(extreme_norms.cosine, dots, *sides))
        return self._spec.unflatten(dots) if per_param else dots[0]

    def param_dots(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """`dot_prods`, parameter by parameter."""
        dots = [
            add_up([bundles.dot(f, u) for f in bundle])
            for bundle, u in zip(self.bundles, direction, strict=True)
        ]
        self._hold("dot products", dots, lambda i, g: _product(g, direction[i]), degree=1)
        return dots

    def gram(
        self,
        other: FactoredGrads | None = None,
        *,
        per_param: bool = False,
        normalize: bool = False,
    ) -> PyTree:
        """`<g_i, g_j>`, `[n, n]`, or `[n, m]` with other gradients; per parameter on request.
        Cosines for `normalize`: 0 where a gradient is zero."""
        check_flags(per_param=per_param, normalize=normalize)
        if other is not None and not isinstance(other, FactoredGrads):
            raise OptionError(
                f"other is a {type(other).__name__}; expected gradients of other samples, such as "
                "gf.factored_grads(model_fn, params, other) returns, or None."
            )
        grams = self.param_grams(other)
        grams = grams if per_param else [add_up(grams)]
        if normalize:
            books = [self, self if other is None else other]
            sides = [b.param_norms() if per_param else b.norms()[None] for b in books]
            grams = list(map(extreme_norms.cosine, grams, *sides))
        return self._spec.unflatten(grams) if per_param else grams[0]

    def param_grams(
        self, other: FactoredGrads | None = None, *, workspace: int = cost.BLOCK_ELEMENTS
    ) -> list[Tensor]:
        """`gram`, parameter by parameter."""
        others = [None] * len(self.bundles) if other is None else other.bundles
        grams = [
            pairs.gram(f, g, workspace=workspace) for f, g in zip(self.bundles, others, strict=True)
        ]
        if other is None:
            self._hold("Gram matrices", grams, lambda i, g: _product(g, g), degree=2, pairs=True)
        return grams

    def _hold(
        self,
        what: str,
        values: Sequence[Tensor],
        define: Callable[[int, Tensor], Tensor],
        *,
        degree: int,
        pairs: bool = False,
    ) -> None:
        """Prove numbers that were made of the factors, where their kind is new."""
        if self._proof is not None:
            kept = self.bundles, self.losses, self._spec, self.leaves
            self._proof.numbers(what, *kept, values, define, degree=degree, pairs=pairs)

    def weighted_sum(self, weights: Float[Tensor, " n"]) -> PyTree:
        """`sum_i w_i g_i`, a pytree like `params` and of their dtypes.

        Samples of weight zero are left out: they cost nothing, and a NaN in one spoils nothing.
        """
        with self._together("adding kept gradients up"):
            weights = check_weights(weights, len(self.losses))
            if self._model_fn is not None:
                refuse_other_weights(self._model_fn, weights)
            return self.param_sums([weights] * len(self.bundles))

    def _together(self, place: str) -> AbstractContextManager[None]:
        """What the ranks of a sharded module do together."""
        return nullcontext() if self._model_fn is None else together(self._model_fn, place)

    def scaled(self, i: int, c: float) -> tuple[Factor, ...]:
        """The factors of `c * g_j` of parameter i; made once."""
        if c == 1.0:
            return self.bundles[i]
        return self._once(("factors", i, c), lambda: tuple(times(f, c) for f in self.bundles[i]))

    def total(self, i: int, c: float) -> Tensor:
        """`c * sum_j g_j` of parameter i, like it, float32 or wider; made once."""

        def summed() -> Tensor:
            weights = self.losses.new_full((len(self.losses),), c, dtype=torch.float64)
            return self._at_leaf(i, bundles.weighted_total(self.bundles[i], weights))

        return self._once(("total", i, c), summed)

    def _once(self, key: tuple[str, int, float], make: Callable[[], T]) -> T:
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def param_sums(self, weights: Sequence[Float[Tensor, " n"]], *, finite: bool = False) -> PyTree:
        """`weighted_sum` with weights of its own for every parameter. Where all gradients are
        `finite`, nobody looks for those to leave out."""
        return _param_sums([(self, weights)], finite=finite)

    def _at_leaf(self, i: int, total: Tensor) -> Tensor:
        """A sum of gradients like parameter i; of a sharded one, this rank's piece of the sum over
        all ranks."""
        if self._model_fn is None:
            return total.reshape(self.leaves[i].shape)
        return summed_and_cut(self._model_fn, self._spec.names[i], total)


class KeptByLength(NamedTuple):
    """The gradients of documents of several lengths, which are kept apart: side by side, all would
    be filled up to the longest one.

    Attributes:
        losses: `[n]`.
        parts: which documents, and their gradients.
    """

    losses: Float[Tensor, " n"]
    parts: list[tuple[Tensor, FactoredGrads]]

    def squares(self) -> Float[Tensor, "params n"]:
        """`FactoredGrads.squares`."""
        return self._in_order([own.squares() for _, own in self.parts])

    def param_norms(self, squares: Float[Tensor, "params n"]) -> Float[Tensor, "params n"]:
        """`FactoredGrads.param_norms`."""
        return self._in_order([own.param_norms(squares[:, k]) for k, own in self.parts])

    def param_sums(self, weights: Sequence[Float[Tensor, " n"]], *, finite: bool) -> PyTree:
        """`FactoredGrads.param_sums`."""
        own = [(kept, [w[k] for w in weights]) for k, kept in self.parts]
        return _param_sums(own, finite=finite)

    def _in_order(self, rows: Sequence[Float[Tensor, "params k"]]) -> Float[Tensor, "params n"]:
        return in_order([(k, x.mT) for (k, _), x in zip(self.parts, rows, strict=True)]).mT


def _param_sums(parts: Sequence[tuple[FactoredGrads, Sequence[Tensor]]], *, finite: bool) -> PyTree:
    """`param_sums` of the samples of all parts."""
    first, _ = parts[0]
    sums = []
    for i in range(len(first.leaves)):
        weighted = [bundles.weighted(own.bundles[i], w[i], finite=finite) for own, w in parts]
        sums.append(first._at_leaf(i, bundles.summed(pairs.flat(weighted))))
    if first._proof is not None:
        kept = [(own.bundles, w) for own, w in parts]
        first._proof.sums(kept, first.losses, first._spec, first.leaves, sums)
    return first._spec.unflatten([x.to(y.dtype) for x, y in zip(sums, first.leaves, strict=True)])


def _product(g: Tensor, u: Tensor) -> Tensor:
    """`<g_i, u>`, `[s]`, or `<g_i, u_j>` with a `u` for every sample j."""
    flat = _flat(g)
    other = wide(u).to(flat)
    if u.ndim == g.ndim:
        return inner_products(flat, _flat(other))
    return dots(flat, other.flatten())


def _flat(g: Tensor) -> Tensor:
    return wide(g).reshape(len(g), g[0].numel())


def check_weight_shape(weights: object, n: int) -> Float[Tensor, " n"]:
    """`weights`, if they are n numbers, finite or not."""
    if not isinstance(weights, Tensor) or weights.shape != (n,):
        found = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise OptionError(f"weights must be a tensor of shape [{n}], one per sample; got {found}.")
    return weights


def check_weights(weights: object, n: int) -> Float[Tensor, " n"]:
    """`weights`, if they are n finite numbers."""
    checked = check_weight_shape(weights, n)
    if not symbolic(checked) and not bool(checked.isfinite().all()):
        raise OptionError("weights must be finite; leave a sample out with weight 0.")
    return checked
