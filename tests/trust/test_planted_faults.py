"""Faults that are planted in rules, readers and guards: what runs on them has to raise.

A run whose trace, way or shapes are new is held against an oracle that knows no rule and no layout.
Scores are proved along one random direction. What that cannot see is planted here, too:

- what is read by other readers than scores are (norms, Gram matrices, projections, kept factors),
  and what is made of factors after the run (clipped sums, products of kept gradients);
- what has no effect on the values that were proved: the gradient of a factor beside one that is
  zero at initialisation, samples that are all alike;
- what cancels in the sum over parameters: two of the same shape, one taken for the other;
- what is small beside the sum: a parameter with a ten-thousandth of the gradient, in float32.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every_quantity import (
    Case,
    held_cosines,
    held_norms,
    held_pairs,
    held_projection,
    held_sum,
    leaves_of,
)
from problems import energy, sequences, weights
from torch import Generator, Tensor

import ghostfunc as gf
from ghostfunc._factors import bundles, cost, pairs as pair_products
from ghostfunc._factors.beside_total import RunningTotal
from ghostfunc._factors.factor import Dense, Outer
from ghostfunc._quantities import readers
from ghostfunc._quantities.quantity import Dot
from ghostfunc._rules.registry import RULES
from ghostfunc._taps import few_calls, sinks
from ghostfunc._trace import tracked
from ghostfunc._trace.layout import Layout
from ghostfunc._transforms.scores import by_position
from ghostfunc.projection import _readers

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]

UNPROVED = {"check": "never"} if "check" in inspect.signature(gf.ghost_dot_prod).parameters else {}
"""What asks for a number without a proof."""


# --- models ---------------------------------------------------------------------------------------


def linear(p: Any, x: Tensor) -> Tensor:
    return energy(torch.tanh(F.linear(x, p["w"], p["b"])))


def square_weights(p: Any, x: Tensor) -> Tensor:
    return energy(torch.tanh(x @ p["w"].t()))


def squashed_weights(p: Any, x: Tensor) -> Tensor:
    return energy(x @ p["w"].tanh())


def scaled_weights(p: Any, x: Tensor) -> Tensor:
    return energy(x @ (p["w"] * 2))


def used_twice(p: Any, x: Tensor) -> Tensor:
    return energy(torch.tanh(x @ p["w"]) @ p["w"])


def time_first_when_long(p: Any, x: Tensor) -> Tensor:
    if x.shape[1] <= 2:
        return energy(torch.tanh(x @ p["w"]))
    return energy(torch.tanh(x.transpose(0, 1) @ p["w"]).transpose(0, 1))


def folded_time_first(p: Any, x: Tensor) -> Tensor:
    n, t = x.shape[:2]
    y = torch.tanh(x.transpose(0, 1).flatten(0, 1) @ p["w"])
    return energy(y.unflatten(0, (t, n)).transpose(0, 1))


def attentive(p: Any, x: Tensor) -> Tensor:
    """Two parameters of one shape."""
    return energy(torch.softmax(F.linear(x, p["q"]) @ F.linear(x, p["k"]).mT, -1) @ x)


def adapted(p: Any, x: Tensor) -> Tensor:
    """LoRA: while b is zero, so is the gradient of a."""
    return energy(F.linear(x, p["w"]) + F.linear(F.linear(x, p["a"]), p["b"]))


def case_of(model: Any, n: int = 3, t: int = 3, dtype: torch.dtype = torch.float64) -> Case:
    draw = sequences(4)
    params = weights(w=(4, 4), b=(4,), q=(4, 4), k=(4, 4), a=(2, 4))
    used = {name: x.to(dtype) for name, x in params.items() if f'"{name}"' in source(model)}
    batches = (draw(m, t, Generator().manual_seed(m)).to(dtype) for m in (n, 2))
    return Case(lambda p, x: model(p, x), used, *batches)  # a function nobody has seen


def source(model: Any) -> str:
    return inspect.getsource(model)


# --- faults of rules ------------------------------------------------------------------------------


def in_rule(change: Callable[[Tensor], Tensor]) -> Plant:
    """`F.linear`'s rule gets a cotangent `[n, 1, t, p]` that was changed."""

    def plant(patch: Patch) -> None:
        rule = RULES[F.linear]
        assert isinstance(rule, type(RULES[torch.matmul]))
        fn = rule.fn
        wrong = replace(rule, fn=lambda b, *args, **kwargs: fn(change(b), *args, **kwargs))
        patch.setitem(RULES, F.linear, wrong)

    return plant


def without_the_last(b: Tensor) -> Tensor:
    return torch.cat([b[..., :-1, :], torch.zeros_like(b[..., -1:, :])], -2)


def wrong_when_long(b: Tensor) -> Tensor:
    return b.flip(-2) if b.shape[-2] > 2 else b


def wrong_in_large_batches(b: Tensor) -> Tensor:
    return b.roll(1, 0) if len(b) > 3 else b


def wrong_for_one_sample(b: Tensor) -> Tensor:
    return torch.cat([b[:-1], 1.01 * b[-1:]])


RULE_FAULTS: dict[str, Plant] = {
    "swaps samples": in_rule(lambda b: b.roll(1, 0)),
    "swaps positions": in_rule(lambda b: b.flip(-2)),
    "forgets a factor": in_rule(lambda b: 2 * b),
    "forgets the last position": in_rule(without_the_last),
    "is off by a hundredth for one sample": in_rule(wrong_for_one_sample),
    "is off by a ten-thousandth": in_rule(lambda b: 1.0001 * b),
    "is wrong for long samples": in_rule(wrong_when_long),
    "is wrong in large batches": in_rule(wrong_in_large_batches),
}


def transposing_rule(patch: Patch) -> None:
    rule = RULES[F.linear]
    fn = rule.fn

    def wrong(b: Tensor, *args: Any, **kwargs: Any) -> Any:
        factors = fn(b, *args, **kwargs)
        right = factors["weight"]
        return {**factors, "weight": lambda: Outer(*reversed(tuple(right())))}

    patch.setitem(RULES, F.linear, replace(rule, fn=wrong))


# --- faults of readers and of derivations ---------------------------------------------------------


def forgetful(reader: Any) -> Plant:
    """The reader of a parameter is used for its transpose as it is."""

    def plant(patch: Patch) -> None:
        right = reader.push
        patch.setattr(
            reader,
            "push",
            lambda self, push: self if push.derivation == "transpose" else right(self, push),
        )

    return plant


def tanh_is_linear(patch: Patch) -> None:
    patch.setattr(tracked, "_LINEAR", tracked._LINEAR | {Tensor.tanh})


def products_are_casts(patch: Patch) -> None:
    """Directions are pushed by the derivative, factors are taken for the parameter's own."""
    patch.setattr(tracked, "_CASTS", tracked._CASTS | {Tensor.mul})


def without_cross_terms(patch: Patch) -> None:
    right = pair_products.sqnorms

    def wrong(bundle: Any, **options: Any) -> Tensor:
        return sum(right([factor], **options) for factor in bundle)

    patch.setattr(pair_products, "sqnorms", wrong)


def gram_of_the_first_use(patch: Patch) -> None:
    right = pair_products.gram_of_parts

    def wrong(parts: Any, others: Any = None, **options: Any) -> Tensor:
        first = [[bundle[:1] for bundle in side] for side in (parts, others or ())]
        return right(first[0], None if others is None else first[1], **options)

    patch.setattr(pair_products, "gram_of_parts", wrong)


def sides_swapped(patch: Patch) -> None:
    right = _readers.KroneckerReader.read

    def wrong(self: Any, factor: Any) -> Tensor:
        if isinstance(factor, Dense):
            return right(self, factor)
        return right(self._replace(left=self.right, right=self.left), factor)

    patch.setattr(_readers.KroneckerReader, "read", wrong)


def squares_of_dense_gradients(patch: Patch) -> None:
    """Small gradients are formed; their squares are off by a hundredth."""
    right = pair_products.sqnorms

    def wrong(bundle: Any, **options: Any) -> Tensor:
        off = 1.01 if len(bundle) == 1 and isinstance(bundle[0], Dense) else 1.0
        return off * right(bundle, **options)

    patch.setattr(pair_products, "sqnorms", wrong)


def totals_off_by_a_hundredth(patch: Patch) -> None:
    """Training gradients that are added up use by use."""
    right = RunningTotal.add

    def wrong(self: Any, factor: Any, us: Any, *options: Any) -> Any:
        dots = right(self, factor, us, *options)
        self.value = self.value * 1.01
        return dots

    patch.setattr(RunningTotal, "add", wrong)


def small_gradients_in_another_order(patch: Patch) -> None:
    """Those that wait for the end of the backward pass are read side by side."""
    right = few_calls._read_table

    def wrong(table: Any, add: Any) -> None:
        right(table, lambda key, value: add(key, value.flip(0)))

    patch.setattr(few_calls, "_read_table", wrong)


def validation_of_one_sample(patch: Patch) -> None:
    """In one run of both batches, the validation gradient lacks all samples but one."""
    right = readers.OneRunReader.for_train_rows

    def wrong(self: Any, factors: Any, **options: Any) -> Any:
        return right(self, [bundles.take(f, slice(self.n + 1)) for f in factors], **options)

    patch.setattr(readers.OneRunReader, "for_train_rows", wrong)


def weights_forgotten(patch: Patch) -> None:
    right = bundles.weighted
    patch.setattr(
        bundles, "weighted", lambda f, w, **options: right(f, w.clamp(min=0.9), **options)
    )


def changes_doubled(patch: Patch) -> None:
    right = by_position._PositionMode._changes
    patch.setattr(
        by_position._PositionMode,
        "_changes",
        lambda self, func, call: [(tap, 2 * x) for tap, x in right(self, func, call)],
    )


def products_of_the_first_position(patch: Patch) -> None:
    """Of kept gradients."""
    right = pair_products.pair_dots

    def wrong(factor: Any, other: Any, *options: Any) -> Tensor:
        if isinstance(other, Outer):
            other = Outer(other.left[:, :1], other.right[:, :1])
        return right(factor, other, *options)

    patch.setattr(pair_products, "pair_dots", wrong)
    patch.setattr(cost, "keep_direction_factored", lambda *_, **__: True)


# --- guards that are removed ----------------------------------------------------------------------


def shapes_tell_all(patch: Patch) -> None:
    patch.setattr(Layout, "ambiguous", lambda self, x, n: False)


def folds_are_sample_major(patch: Patch) -> None:
    """What op rules get is put in front as if samples were whole, after the trace knew better."""
    right = Layout.stack

    def wrong(self: Layout, x: Tensor, n: int) -> Tensor:
        return right(replace(self, fold="sample-major") if self.fold != "none" else self, x, n)

    patch.setattr(Layout, "stack", wrong)


def unseen_uses_pass(patch: Patch) -> None:
    """The cotangents of the guards are the last ones before that of the anchor."""
    right = sinks.gradients

    def wrong(losses: Tensor, inputs: Any, *args: Any, **options: Any) -> Any:
        found = right(losses, inputs, *args, **options)
        return [*found[:-2], None, found[-1]]

    patch.setattr(sinks, "gradients", wrong)


class Square(torch.autograd.Function):
    """A use that no torch function shows."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * b

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * tangent


def unseen_when_long(p: Any, x: Tensor) -> Tensor:
    losses = energy(x @ p["w"])
    return losses if x.shape[1] <= 2 else losses + Square.apply(p["w"]).sum()


# --- asking ---------------------------------------------------------------------------------------


def scores(case: Case, **options: Any) -> Any:
    got = case.of(gf.ghost_dot_prod, direction=case.u, per_param=True, **options)
    return held_pairs("scores", got, case.g, case.directions, "sum", per_param=True)


def pairs(case: Case, **options: Any) -> Any:
    got = case.of(gf.ghost_dot_prod, case.val, reduction="none", **options)
    return held_pairs("pairs", got, case.g, case.v, "none", per_param=False)


def norms(case: Case, **options: Any) -> Any:
    got = case.of(gf.ghost_norm, per_param=True, **options)
    return held_norms("norms", got, case.g, per_param=True)


def gram(case: Case, **options: Any) -> Any:
    got = case.of(gf.ghost_gram, **options)
    return held_pairs("gram", got, case.g, case.g, "none", per_param=False)


def projection(case: Case, **options: Any) -> Any:
    made = gf.kronecker_projection(case.params, rank_total=4, rank_min=2, kind="gaussian", seed=5)
    return held_projection(case, "projection", made, **options)


def cosines(case: Case, **options: Any) -> Any:
    got = case.of(gf.ghost_cosine, case.val, **options)
    return held_cosines("cosines", got, case.g, case.v, mean=True)


def in_one_run(case: Case, **options: Any) -> Any:
    got = case.of(gf.ghost_dot_prod, case.val, **options)
    return held_pairs("scores", got, case.g, case.v, "mean", per_param=False)


def steps(case: Case, **options: Any) -> Any:
    step = case.of(gf.ghost_value_and_grad, case.val, **options)
    n = len(case.train)
    yield from held_sum("grads", step.grads, case.g, torch.full((n,), 1 / n).double())
    yield from held_pairs("scores", step.dot_prods, case.g, case.v, "mean", per_param=False)


def clipped(case: Case, **options: Any) -> Any:
    sizes = sum(g.square().sum(1) for g in case.g).sqrt()
    bound = float(sizes.min()) / 2
    got = case.of(gf.ghost_clipped_grad, max_norm=bound, **options)
    yield from held_sum("clipped", got.grads, case.g, bound / sizes)


def of_kept_factors(case: Case, **options: Any) -> Any:
    kept = case.of(gf.factored_grads, **options)
    return held_pairs("gram", kept.gram(), case.g, case.g, "none", per_param=False)


def along_kept_factors(case: Case, **options: Any) -> Any:
    kept = gf.factored_grads(case.model_fn, case.params, case.val, **options)
    got = case.of(gf.ghost_dot_prod, direction=kept, **options)
    return held_pairs("scores", got, case.g, case.v, "mean", per_param=False)


def by_positions(case: Case, **options: Any) -> Any:
    got = case.of(gf.ghost_dot_prod, direction=case.u, per_position=True, **options)
    return held_pairs("shares", got.sum(1), case.g, case.directions, "sum", per_param=False)


def off(case: Case, ask: Callable[..., Any], **options: Any) -> bool:
    """Whether a number is wrong."""
    numbers = list(ask(case, **options))
    tolerance = 1e-9 if leaves_of(case.params)[0].dtype == torch.float64 else 1e-5
    return any(float(((h.got - h.want).abs() / h.scale).max()) > tolerance for h in numbers)


class Fault:
    """A fault, the model and the question that it spoils.

    Attributes:
        first: what is asked before the case, of the same function and with the fault in place.
    """

    def __init__(
        self,
        plant: Plant,
        model: Any = linear,
        ask: Callable[..., Any] = scores,
        first: Callable[[Case], Tensor] | None = None,
        **shape: Any,
    ) -> None:
        self.plant, self.model, self.ask, self.first, self.shape = plant, model, ask, first, shape

    def case(self) -> Case:
        case = case_of(self.model, **self.shape)
        assert len(case.g) == len(case.v)  # formed before anything is planted
        if self.first is not None:
            case.first = [self.first(case)]
        return case


def short(case: Case) -> Tensor:
    return case.train[:, :2]


FAULTS: dict[str, Fault] = {
    **{f"a rule {name}": Fault(plant) for name, plant in RULE_FAULTS.items()},
    "a rule is wrong in large batches": Fault(RULE_FAULTS["is wrong in large batches"], n=5),
    "a rule is wrong for long samples, after short ones": Fault(
        RULE_FAULTS["is wrong for long samples"], first=short
    ),
    "a rule is wrong in large batches, after small ones": Fault(
        RULE_FAULTS["is wrong in large batches"], first=lambda case: case.train[:3], n=5
    ),
    "a rule transposes": Fault(transposing_rule),
    "the reader of scores forgets a transpose": Fault(forgetful(readers.DotReader), square_weights),
    "the reader of pairs forgets a transpose": Fault(
        forgetful(readers.PairReader), square_weights, pairs
    ),
    "the reader of projections forgets a transpose": Fault(
        forgetful(_readers.KroneckerReader), square_weights, projection
    ),
    "a derivative is forgotten": Fault(tanh_is_linear, squashed_weights),
    "factors of a multiple are taken as they are": Fault(products_are_casts, scaled_weights, norms),
    "norms have no cross terms": Fault(without_cross_terms, used_twice, norms),
    "Gram matrices are of the first use": Fault(gram_of_the_first_use, used_twice, gram),
    "a projection swaps its sides": Fault(sides_swapped, square_weights, projection),
    "squares of small gradients are off": Fault(squares_of_dense_gradients, linear, norms),
    "cosines have no cross terms": Fault(without_cross_terms, used_twice, cosines),
    "clipping has no cross terms": Fault(without_cross_terms, used_twice, clipped),
    "clipping forgets its weights": Fault(weights_forgotten, linear, clipped),
    "kept factors are of the first use": Fault(gram_of_the_first_use, used_twice, of_kept_factors),
    "products with kept factors lack positions": Fault(
        products_of_the_first_position, linear, along_kept_factors
    ),
    "training gradients are off by a hundredth": Fault(
        totals_off_by_a_hundredth, linear, steps, n=8
    ),
    "small gradients are those of other samples": Fault(
        small_gradients_in_another_order, linear, in_one_run, n=8
    ),
    "validation gradients lack samples": Fault(validation_of_one_sample, linear, in_one_run, n=8),
    "shares of positions are doubled": Fault(changes_doubled, linear, by_positions),
    "shapes tell where samples lie": Fault(shapes_tell_all, time_first_when_long, first=short),
    "folds are sample-major": Fault(folds_are_sample_major, folded_time_first),
    "unseen uses pass": Fault(unseen_uses_pass, unseen_when_long, first=short, t=5),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_spoils_a_number(fault: Fault, monkeypatch: Patch) -> None:
    """Unproved, the number is wrong: there is something to be caught."""
    case = fault.case()
    fault.plant(monkeypatch)
    for batch in case.first:
        gf.ghost_norm(case.model_fn, case.params, batch, **UNPROVED)
    assert off(case, fault.ask, **UNPROVED)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_is_caught(fault: Fault, monkeypatch: Patch) -> None:
    """No wrong number comes out: the call raises, or finds another way to the right one."""
    case = fault.case()
    fault.plant(monkeypatch)
    case = case.anew()
    for batch in case.first:  # no harm is done there
        assert not off(case_like(case, batch), norms)
    with contextlib.suppress(gf.GhostError):
        assert not off(case, fault.ask)


def case_like(case: Case, train: Tensor) -> Case:
    return Case(case.model_fn, case.params, train, case.val)


# --- beyond one direction of scores ---------------------------------------------------------------


def test_zeros_hide_nothing(monkeypatch: Patch) -> None:
    """LoRA at initialisation: b is zero, and so is all that a fault of `a`'s gradient would change.
    Trained a little, it is the same program at the same shapes, and nothing is new."""
    case = case_of(adapted)
    case.params["b"] = torch.zeros(4, 2, dtype=torch.float64)
    rule = RULES[F.linear]
    fn = rule.fn

    def wrong(b: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        return fn(b.flip(-2) if weight.shape[-2:] == (2, 4) else b, input, weight, bias)

    monkeypatch.setitem(RULES, F.linear, replace(rule, fn=wrong))
    with pytest.raises(gf.SampleAxisError, match="at parameter 'a'"):
        case.of(gf.ghost_dot_prod, case.val)


def test_zeros_that_the_program_looks_at_stay(monkeypatch: Patch) -> None:
    """A program that goes another way where its parameters are not zero is proved as it is."""

    def model(p: Any, x: Tensor) -> Tensor:
        own = F.linear(x, p["w"])
        beside = F.linear(F.linear(x, p["a"]), p["b"])
        return energy(own + beside if not bool(p["b"].any()) else own.flip(1) * beside)

    case = case_of(adapted)
    case.model_fn = model
    case.params["b"] = torch.zeros(4, 2, dtype=torch.float64)
    assert not off(case, norms)


def test_copies_of_one_sample_prove_nothing_of_others(monkeypatch: Patch) -> None:
    """Positions that are exchanged within samples of ones are right; within others they are not."""
    case = case_of(linear)
    assert len(case.g) == 2
    in_rule(lambda b: b.flip(-2))(monkeypatch)
    alike = torch.ones_like(case.train[:1]).expand(3, -1, -1).clone()
    gf.ghost_dot_prod(case.model_fn, case.params, alike, direction=case.u)  # right
    with pytest.raises(gf.GhostError):
        off(case, scores)


def test_copies_of_one_sample_are_told_apart(monkeypatch: Patch) -> None:
    """Rows that are exchanged among copies are seen, though their numbers are right."""
    case = case_of(linear)
    in_rule(lambda b: b.roll(1, 0))(monkeypatch)
    alike = case.train[:1].expand(3, -1, -1).clone()
    with pytest.raises(gf.SampleAxisError, match="not those of plain autograd"):
        gf.ghost_dot_prod(case.model_fn, case.params, alike, direction=case.u)


def test_parameters_of_one_shape_are_told_apart(monkeypatch: Patch) -> None:
    """The sum over parameters is right; what each of them contributes is not."""
    case = case_of(attentive)
    assert len(case.g) == 2
    right = Dot.readers

    def exchanged(self: Any, leaves: Any, spec: Any) -> Any:
        return right(self, leaves, spec)[::-1]

    monkeypatch.setattr(Dot, "readers", exchanged)
    with pytest.raises(gf.GhostError):
        off(case, scores)


def test_small_parameters_have_a_scale_of_their_own(monkeypatch: Patch) -> None:
    """In float32, a ten-thousandth of the gradient is a ten-thousandth of the sum's digits."""

    def model(p: Any, x: Tensor) -> Tensor:
        return energy(100 * F.linear(x, p["w"]) + 1e-3 * F.linear(x.tanh(), p["q"]))

    case = case_of(model, dtype=torch.float32)
    case.u = {name: u.clone() for name, u in case.u.items()}
    rule = RULES[F.linear]
    fn = rule.fn
    seen: list[Any] = []

    def wrong(b: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        seen.append(weight)
        small = bool(input.abs().max() <= 1)  # tanh
        return fn(b.flip(-2) if small else b, input, weight, bias)

    assert len(case.g) == 2
    monkeypatch.setitem(RULES, F.linear, replace(rule, fn=wrong))
    with pytest.raises(gf.GhostError):
        off(case, scores)
    assert seen
