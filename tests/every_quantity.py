"""Every public quantity beside its definition: a loop over samples of plain autograd, in float64.

A `Case` is a model function, its parameters and two batches. `QUANTITIES` has, by name, what asks
the library for a quantity and holds every number against the loop, sample by sample, each to its
own scale. `judge` says what became of it: right, refused by an error of ghostfunc's own, wrong, or
crashed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor

import ghostfunc as gf

Status = Literal["right", "refused", "wrong", "crashed"]


@dataclass
class Case:
    """`train` has n samples, `val` has m; what each of them is to be held against is formed once.

    Attributes:
        oracle_fn: the function the loop runs, where it is not `model_fn` itself.
        first: batches that the library is asked about first, before every quantity, of a function
            it has never seen: what it learns of them must not mislead it.
    """

    model_fn: Callable[[Any, Any], Tensor]
    params: Any
    train: Any
    val: Any
    oracle_fn: Callable[[Any, Any], Tensor] | None = None
    first: Sequence[Any] = ()

    def anew(self) -> Case:
        """The same case of another function object, which has been asked about `first` alone."""
        if not self.first:
            return self
        fn = self.model_fn
        other = copy.copy(self)
        other.model_fn = lambda params, batch: fn(params, batch)
        for batch in self.first:
            gf.ghost_norm(other.model_fn, self.params, batch)
        return other

    @cached_property
    def g(self) -> list[Tensor]:
        """`[n, size]` per parameter, in float64."""
        return self._grads(self.train)

    @cached_property
    def v(self) -> list[Tensor]:
        """`[m, size]` per parameter."""
        return self._grads(self.val)

    def _grads(self, batch: Any) -> list[Tensor]:
        fn = self.oracle_fn or self.model_fn
        return [x.reshape(len(x), x[0].numel()).double() for x in loop(fn, self.params, batch)]

    @cached_property
    def losses(self) -> Tensor:
        with torch.no_grad():
            return (self.oracle_fn or self.model_fn)(self.params, self.train).double()

    @cached_property
    def u(self) -> Any:
        """A random direction."""
        generator = torch.Generator().manual_seed(3)

        def draw(x: Tensor) -> Tensor:
            return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)

        return optree.tree_map(draw, self.params)

    @property
    def directions(self) -> list[Tensor]:
        """`u`, `[1, size]` per parameter."""
        return [x.reshape(1, x.numel()).double() for x in leaves_of(self.u)]

    def of(self, fn: Callable[..., Any], *rest: Any, **options: Any) -> Any:
        """A public function's answer for the train batch."""
        return fn(self.model_fn, self.params, self.train, *rest, **options)

    def shaped(self, rows: list[Tensor]) -> list[Tensor]:
        """`[n, size]` per parameter in the shapes of the parameters."""
        shapes = [x.shape for x in leaves_of(self.params)]
        return [x.reshape(len(x), *shape) for x, shape in zip(rows, shapes, strict=True)]


def leaves_of(tree: Any) -> list[Tensor]:
    return optree.tree_leaves(tree)


def loop(fn: Callable[[Any, Any], Tensor], params: Any, batch: Any) -> list[Tensor]:
    """Per-sample gradients by their definition, one sample at a time: `[n, *shape]`."""
    flat, treedef = optree.tree_flatten(params)
    flat = [x.detach().clone().requires_grad_() for x in flat]
    rows = []
    for i in range(len(leaves_of(batch)[0])):
        sample = optree.tree_map(lambda x, i=i: x[i : i + 1].clone(), batch)
        (loss,) = fn(optree.tree_unflatten(treedef, flat), sample)
        grads = torch.autograd.grad(loss, flat, allow_unused=True, materialize_grads=True)
        rows.append([x.to_dense() if x.is_sparse else x for x in grads])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


class Held(NamedTuple):
    """A number, what it should be, and the size its error is measured by (all alike in shape)."""

    what: str
    got: Any
    want: Tensor
    scale: Tensor


Question: TypeAlias = Callable[[Case], Iterator[Held]]
QUANTITIES: dict[str, Question] = {}


def quantity(ask: Question) -> Question:
    QUANTITIES[ask.__name__] = ask
    return ask


# --- scales -----------------------------------------------------------------------------------


def lengths(rows: list[Tensor]) -> list[Tensor]:
    """`||g_i^p||` per parameter, none so small that it is rounding noise of the whole: of the
    sample's own gradient, or of a sample a million times as large."""
    own = torch.stack([x.norm(dim=1) for x in rows])
    whole = own.square().sum(0).sqrt()
    floor = 1e-4 * whole + 1e-6 * whole.max() + 1e-100
    return list(torch.maximum(own, floor))


def _evenly(n: int) -> Tensor:
    return torch.full((n,), 1 / n, dtype=torch.float64)


def whole(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).square().sum(0).sqrt()


def pairs(g: list[Tensor], v: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """`<g_i, v_j>` per parameter, and the bound of Cauchy and Schwarz."""
    dots = [a @ b.mT for a, b in zip(g, v, strict=True)]
    bounds = [a[:, None] * b for a, b in zip(lengths(g), lengths(v), strict=True)]
    return dots, bounds


def reduced(x: Tensor, reduction: str) -> Tensor:
    return x if reduction == "none" else x.sum(1) if reduction == "sum" else x.mean(1)


def held_pairs(
    what: str, got: Any, g: list[Tensor], v: list[Tensor], reduction: str, *, per_param: bool
) -> Iterator[Held]:
    dots, bounds = ([reduced(x, reduction) for x in part] for part in pairs(g, v))
    if per_param:
        for i, (a, d, s) in enumerate(zip(leaves_of(got), dots, bounds, strict=True)):
            yield Held(f"{what}, parameter {i}", a, d, s)
    else:
        yield Held(what, got, torch.stack(dots).sum(0), torch.stack(bounds).sum(0))


def held_rows(what: str, got: Any, want: list[Tensor]) -> Iterator[Held]:
    """Gradients of every sample, or others of their shape."""
    for i, (a, w, size) in enumerate(zip(leaves_of(got), want, lengths(want), strict=True)):
        yield Held(f"{what}, parameter {i}", a.reshape(w.shape), w, size[:, None].expand(w.shape))


def held_sum(
    what: str, got: Any, g: list[Tensor], weights: Tensor | list[Tensor]
) -> Iterator[Held]:
    """`sum_i w_i g_i` per parameter."""
    per_param = weights if isinstance(weights, list) else [weights] * len(g)
    for i, (a, x, size, w) in enumerate(zip(leaves_of(got), g, lengths(g), per_param, strict=True)):
        want = (w[:, None] * x).sum(0)
        scale = (w.abs() * size).sum().expand(want.shape)
        yield Held(f"{what}, parameter {i}", a.to_dense().reshape(-1), want, scale)


def held_norms(what: str, got: Any, g: list[Tensor], *, per_param: bool) -> Iterator[Held]:
    """Squares are compared: the root of a sum that cancels has half its digits."""
    squares = [x.square().sum(1) for x in g]
    scales = [x.square() for x in lengths(g)]
    if per_param:
        for i, (a, sq, s) in enumerate(zip(leaves_of(got), squares, scales, strict=True)):
            yield Held(f"{what}, parameter {i}", a.double() ** 2, sq, s)
    else:
        yield Held(what, got.double() ** 2, sum(squares), sum(scales))


def held_cosines(
    what: str, got: Tensor, g: list[Tensor], v: list[Tensor], *, mean: bool
) -> Iterator[Held]:
    """Cosines of gradients that are not zero, as far as numbers can tell."""
    v = [x.mean(0, keepdim=True) for x in v] if mean else v
    dots = torch.stack(pairs(g, v)[0]).sum(0)
    product = whole([x.norm(dim=1) for x in g])[:, None] * whole([x.norm(dim=1) for x in v])
    known = product > 1e-5 * product.max()
    want = torch.where(known, dots / product.clamp_min(1e-100), 0)
    scale = torch.where(known, 1.0, torch.inf)
    if mean:
        want, scale = want[:, 0], scale[:, 0]
    yield Held(what, got, want, scale)


# --- dot products -------------------------------------------------------------------------------


def _dots(case: Case, what: str, *, reduction: str = "mean", **options: Any) -> Iterator[Held]:
    per_param = options.get("per_param", False)
    got = case.of(gf.ghost_dot_prod, case.val, reduction=reduction, **options)
    yield from held_pairs(what, got, case.g, case.v, reduction, per_param=per_param)


@quantity
def dots(case: Case) -> Iterator[Held]:
    yield from _dots(case, "mean")
    yield from _dots(case, "sum", reduction="sum", per_param=True)


@quantity
def dots_of_pairs(case: Case) -> Iterator[Held]:
    yield from _dots(case, "none", reduction="none")
    yield from _dots(case, "none", reduction="none", per_param=True)


@quantity
def dots_in_chunks(case: Case) -> Iterator[Held]:
    yield from _dots(case, "chunks of 1", chunk_size=1)
    yield from _dots(case, "chunks of 2", chunk_size=2, per_param=True)
    yield from _dots(case, "pairs in chunks of 2", reduction="none", chunk_size=2)


@quantity
def dots_along_a_direction(case: Case) -> Iterator[Held]:
    for per_param in (False, True):
        got = case.of(gf.ghost_dot_prod, direction=case.u, per_param=per_param)
        yield from held_pairs("dots", got, case.g, case.directions, "sum", per_param=per_param)


@quantity
def dots_with_kept_gradients(case: Case) -> Iterator[Held]:
    kept = gf.factored_grads(case.model_fn, case.params, case.val)
    for reduction in ("mean", "none"):
        got = case.of(gf.ghost_dot_prod, direction=kept, reduction=reduction)
        yield from held_pairs(reduction, got, case.g, case.v, reduction, per_param=False)


@quantity
def dots_with_several_batches(case: Case) -> Iterator[Held]:
    got = case.of(gf.ghost_dot_prod, {"val": case.val, "train": case.train})
    for name, v in {"val": case.v, "train": case.g}.items():
        yield from held_pairs(name, got[name], case.g, v, "mean", per_param=False)


@quantity
def dots_by_position(case: Case) -> Iterator[Held]:
    got = case.of(gf.ghost_dot_prod, direction=case.u, per_position=True)
    yield from held_pairs("sums", got.sum(1), case.g, case.directions, "sum", per_param=False)


@quantity
def dots_by_jvp(case: Case) -> Iterator[Held]:
    yield from _dots(case, "mean", mode="jvp", per_param=True)


@quantity
def dots_materialized(case: Case) -> Iterator[Held]:
    yield from _dots(case, "mean", mode="materialized", per_param=True)


@quantity
def dots_in_a_loop(case: Case) -> Iterator[Held]:
    yield from _dots(case, "none", mode="materialized", reduction="none", vectorize=False)


@quantity
def steps(case: Case) -> Iterator[Held]:
    n = len(case.losses)
    for reduction in ("mean", "none"):
        step = case.of(gf.ghost_value_and_grad, case.val, reduction=reduction)
        yield Held("losses", step.losses, case.losses, 1e-2 + case.losses.abs())
        yield from held_sum("grads", step.grads, case.g, _evenly(n))
        yield from held_pairs(reduction, step.dot_prods, case.g, case.v, reduction, per_param=False)


@quantity
def steps_along_a_direction(case: Case) -> Iterator[Held]:
    n = len(case.losses)
    step = case.of(gf.ghost_value_and_grad, direction=case.u, chunk_size=max(1, n - 1))
    yield from held_sum("grads", step.grads, case.g, _evenly(n))
    got = step.dot_prods
    yield from held_pairs("dots", got, case.g, case.directions, "sum", per_param=False)


# --- norms, Gram matrices, cosines ---------------------------------------------------------------


@quantity
def norms(case: Case) -> Iterator[Held]:
    yield from held_norms("norms", case.of(gf.ghost_norm), case.g, per_param=False)
    yield from held_norms("norms", case.of(gf.ghost_norm, per_param=True), case.g, per_param=True)


@quantity
def norms_in_chunks(case: Case) -> Iterator[Held]:
    got = case.of(gf.ghost_norm, per_param=True, chunk_size=2)
    yield from held_norms("norms", got, case.g, per_param=True)


@quantity
def spread(case: Case) -> Iterator[Held]:
    n = len(case.losses)
    step = case.of(gf.ghost_health)
    yield from held_sum("grads", step.grads, case.g, _evenly(n))
    tables = leaves_of(step.spread)
    norms = [x[:, 0].double().clamp(min=0).sqrt() for x in tables]
    yield from held_norms("norms", norms, case.g, per_param=True)
    dots = [x[:, 1] for x in tables]
    yield from held_pairs("with the sum", dots, case.g, case.g, "sum", per_param=True)


@quantity
def gram(case: Case) -> Iterator[Held]:
    yield from held_pairs("gram", case.of(gf.ghost_gram), case.g, case.g, "none", per_param=False)
    got = case.of(gf.ghost_gram, per_param=True)
    yield from held_pairs("gram", got, case.g, case.g, "none", per_param=True)


@quantity
def gram_with_others(case: Case) -> Iterator[Held]:
    got = case.of(gf.ghost_gram, case.val)
    yield from held_pairs("gram", got, case.g, case.v, "none", per_param=False)
    got = case.of(gf.ghost_gram, case.val, per_param=True)
    yield from held_pairs("gram", got, case.g, case.v, "none", per_param=True)


@quantity
def gram_in_chunks(case: Case) -> Iterator[Held]:
    got = case.of(gf.ghost_gram, chunk_size=2)
    yield from held_pairs("gram", got, case.g, case.g, "none", per_param=False)


@quantity
def cosines(case: Case) -> Iterator[Held]:
    yield from held_cosines("mean", case.of(gf.ghost_cosine, case.val), case.g, case.v, mean=True)
    got = case.of(gf.ghost_cosine, case.val, reduction="none")
    yield from held_cosines("none", got, case.g, case.v, mean=False)
    got = case.of(gf.ghost_gram, case.val, normalize=True)
    yield from held_cosines("gram", got, case.g, case.v, mean=False)


# --- sums ---------------------------------------------------------------------------------------


@quantity
def clipped_sums(case: Case) -> Iterator[Held]:
    sizes = whole([x.norm(dim=1) for x in case.g])
    bound = max(float(sizes.mean()), 1e-3)  # some are above it
    got = case.of(gf.ghost_clipped_grad, max_norm=bound)
    yield from held_norms("norms", got.norms, case.g, per_param=False)
    clip = (bound / sizes.clamp_min(1e-100)).clamp(max=1)
    yield from held_sum("clipped", got.grads, case.g, clip)


@quantity
def sums_clipped_per_layer(case: Case) -> Iterator[Held]:
    own = [x.norm(dim=1) for x in case.g]
    bound = max(float(whole(own).mean()), 1e-3)
    weights = torch.linspace(0.5, 1.5, len(case.losses)).double()
    got = case.of(gf.ghost_clipped_grad, max_norm=bound, per_layer=True, weights=weights)
    yield from held_norms("norms", got.norms, case.g, per_param=True)
    each = bound / len(own) ** 0.5
    clips = [weights * (each / x.clamp_min(1e-100)).clamp(max=1) for x in own]
    yield from held_sum("clipped", got.grads, case.g, clips)


@quantity
def validation_gradients(case: Case) -> Iterator[Held]:
    m = len(case.v[0])
    for options in ({}, {"chunk_size": 1}, {"chunk_size": 2}):
        got = gf.direction(case.model_fn, case.params, case.val, **options)
        what = f"direction {options}"
        yield from held_sum(what, got, case.v, _evenly(m))


# --- several at once ----------------------------------------------------------------------------


@quantity
def factored(case: Case) -> Iterator[Held]:
    ours = case.of(gf.factored_grads)
    theirs = gf.factored_grads(case.model_fn, case.params, case.val)
    yield from held_norms("norms", ours.norms(per_param=True), case.g, per_param=True)
    got = ours.gram(theirs)
    yield from held_pairs("gram", got, case.g, case.v, "none", per_param=False)
    got = ours.dot_prods(case.u, per_param=True)
    yield from held_pairs("dots", got, case.g, case.directions, "sum", per_param=True)
    weights = torch.linspace(-1, 2, len(case.losses)).double()
    yield from held_sum("sum", ours.weighted_sum(weights), case.g, weights)


@quantity
def one_pass(case: Case) -> Iterator[Held]:
    asked = {"dot": gf.Dot(case.u), "squares": gf.SqNorm(), "gram": gf.Gram(), "g": gf.SampleGrad()}
    losses, values, grads = case.of(gf.ghost_vjp, asked, grads=True)
    yield Held("losses", losses, case.losses, 1e-2 + case.losses.abs())
    got = values["dot"]
    yield from held_pairs("dot", got, case.g, case.directions, "sum", per_param=True)
    yield from held_pairs("gram", values["gram"], case.g, case.g, "none", per_param=True)
    squares = [x.double().sqrt() for x in leaves_of(values["squares"])]
    yield from held_norms("squares", squares, case.g, per_param=True)
    yield from held_rows("g", values["g"], case.g)
    yield from held_sum("grads", grads, case.g, torch.ones(len(losses)).double())


@quantity
def sample_grads(case: Case) -> Iterator[Held]:
    yield from held_rows("ghost", case.of(gf.per_sample_grads, mode="ghost"), case.g)


@quantity
def sample_grads_by_vmap(case: Case) -> Iterator[Held]:
    yield from held_rows("vmap", case.of(gf.per_sample_grads), case.g)


@quantity
def sample_grads_in_a_loop(case: Case) -> Iterator[Held]:
    yield from held_rows("loop", case.of(gf.per_sample_grads, vectorize=False), case.g)


@quantity
def verified(case: Case) -> Iterator[Held]:
    report = gf.verify(case.model_fn, case.params, case.train, case.val)
    if not report.ok:  # it compares what nobody has proved: a call that proves it must raise
        case.of(gf.ghost_dot_prod, case.val, per_param=True)
    ok = torch.tensor(float(report.ok))
    yield Held("report.ok", ok, torch.tensor(1.0), torch.tensor(1.0))


# --- projections --------------------------------------------------------------------------------


def _projected(case: Case, kind: str, **options: Any) -> Iterator[Held]:
    names = [name for name, x in named(case.params) if x.numel()]
    options = {"rank_total": 4, "rank_min": 2, "layers": names, **options}
    projection = gf.kronecker_projection(case.params, kind=kind, seed=5, **options)
    yield from held_projection(case, kind, projection)


def held_projection(case: Case, what: str, projection: Any, **options: Any) -> Iterator[Held]:
    """Beside `vec(P_o g_i P_i^T)`, block by block, or what all columns are hashed or added to."""
    got = case.of(gf.ghost_project, projection, **options)
    names = [name for name, _ in named(case.params)]
    if projection.compress is None and projection.kind != "dense":
        sizes = dict(zip(names, lengths(case.g), strict=True))
        rows = dict(zip(names, case.g, strict=True))
        for b in projection.blocks:
            left = projection.matrix(b.path, "o").double()
            right = projection.matrix(b.path, "i").double()
            g = rows[b.path].reshape(-1, b.n_o, b.n_i)
            want = torch.einsum("ko,noi,li->nkl", left, g, right).flatten(1)
            scale = sizes[b.path][:, None].expand(want.shape)
            yield Held(f"{what}, {b.path}", got[:, b.columns], want, scale)
        return
    grads = optree.tree_unflatten(optree.tree_structure(case.params), case.shaped(case.g))
    want = projection.apply(grads)
    scale = whole(lengths(case.g))[:, None].expand(want.shape)
    yield Held(what, got, want, scale)


def named(params: Any) -> list[tuple[str, Tensor]]:
    paths, found, _ = optree.tree_flatten_with_path(params)
    return [(".".join(map(str, p)) or "params", x) for p, x in zip(paths, found, strict=True)]


@quantity
def projections_gaussian(case: Case) -> Iterator[Held]:
    yield from _projected(case, "gaussian")


@quantity
def projections_of_other_kinds(case: Case) -> Iterator[Held]:
    for kind in ("rademacher", "orthonormal", "sparse"):
        yield from _projected(case, kind)
    yield from _projected(case, "gaussian", compress=5)


@quantity
def projections_dense(case: Case) -> Iterator[Held]:
    yield from _projected(case, "dense")


@quantity
def projections_in_full(case: Case) -> Iterator[Held]:
    names = [name for name, x in named(case.params) if x.numel()]
    full = gf.projection.full_projection(case.params, layers=names)
    yield from held_projection(case, "full", full)
    yield from held_projection(case, "full, in chunks", full, chunk_size=2)


# --- inside transforms --------------------------------------------------------------------------


@quantity
def vmap_over_directions(case: Case) -> Iterator[Held]:
    u = optree.tree_map(lambda x: torch.stack([x, -2 * x, x.flip(0) if x.ndim else x]), case.u)
    got = torch.vmap(lambda one: case.of(gf.ghost_dot_prod, direction=one))(u)
    rows = [x.reshape(3, x[0].numel()).double() for x in leaves_of(u)]
    yield from held_pairs("dots", got.mT, case.g, rows, "none", per_param=False)


@quantity
def grad_of_scores(case: Case) -> Iterator[Held]:
    """The derivative of `sum_i <g_i, u>` along u is the sum of gradients."""
    got = torch.func.grad(lambda u: case.of(gf.ghost_dot_prod, direction=u).sum())(case.u)
    yield from held_sum("grad", got, case.g, torch.ones(len(case.losses)).double())


@quantity
def jvp_of_scores(case: Case) -> Iterator[Held]:
    """Scores are linear in the direction."""
    zero = optree.tree_map(torch.zeros_like, case.u)
    _, got = torch.func.jvp(lambda u: case.of(gf.ghost_dot_prod, direction=u), (zero,), (case.u,))
    yield from held_pairs("jvp", got, case.g, case.directions, "sum", per_param=False)


# --- judgement ----------------------------------------------------------------------------------

TRANSFORMS = ("vmap_over_directions", "grad_of_scores", "jvp_of_scores")
"""Calls inside a transform."""

OTHER_MODES = (
    "dots_by_jvp",
    "dots_materialized",
    "dots_in_a_loop",
    "sample_grads_by_vmap",
    "sample_grads_in_a_loop",
    "verified",
)
"""What runs modes other than ghost mode."""

GHOST = tuple(x for x in QUANTITIES if x not in (*OTHER_MODES, *TRANSFORMS, "dots_by_position"))
"""What ghost mode has to get right for every model that it takes."""


ESSENTIAL = (
    "dots", "dots_of_pairs", "dots_along_a_direction", "dots_with_kept_gradients",
    "dots_in_chunks", "norms", "gram_with_others", "one_pass", "clipped_sums",
    "projections_gaussian", "projections_dense",
)  # fmt: skip
"""One of every family: directions dense and factored, pairs, chunks, kept factors, projections."""


class Verdict(NamedTuple):
    """What became of one quantity.

    Attributes:
        error: the largest error, relative to each number's own scale.
    """

    quantity: str
    status: Status
    said: str = ""
    error: float = 0.0

    def __str__(self) -> str:
        return f"{self.quantity}: {self.status} {self.said}".rstrip()


def judge(case: Case, name: str, tolerance: float = 1e-9) -> Verdict:
    """What becomes of one quantity."""
    expected = case.g, case.v, case.losses  # an error of the loop is not the library's
    assert len(expected) == 3
    worst = 0.0
    try:
        for held in QUANTITIES[name](case.anew()):
            if held.got.shape != held.want.shape:
                shapes = f"{tuple(held.got.shape)}, expected {tuple(held.want.shape)}"
                return Verdict(name, "wrong", f"({held.what} has shape {shapes})", torch.inf)
            errors = (held.got.double() - held.want.double()).abs() / held.scale
            error = float(errors.nan_to_num(torch.inf, torch.inf).max()) if errors.numel() else 0.0
            if error > tolerance:
                return Verdict(name, "wrong", f"({held.what} is off by {error:.1e})", error)
            worst = max(worst, error)
    except gf.GhostError as error:
        return Verdict(name, "refused", f"({type(error).__name__}: {error})")
    except Exception as error:  # whatever it is, a user would see it
        return Verdict(name, "crashed", f"({type(error).__name__}: {error})"[:400])
    return Verdict(name, "right", error=worst)


def assert_right(
    case: Case,
    quantities: Collection[str] = ESSENTIAL,
    *,
    tolerance: float = 1e-9,
    refusable: Collection[str] = (),
) -> None:
    """Fail unless all `quantities` are right; those of `refusable` may also be refused."""
    verdicts = [judge(case, name, tolerance) for name in quantities]
    _none_of(
        v
        for v in verdicts
        if v.status != "right" and not (v.status == "refused" and v.quantity in refusable)
    )


def assert_right_or_refused(
    case: Case,
    *errors: type[gf.GhostError],
    quantities: Collection[str] = ESSENTIAL,
    tolerance: float = 1e-9,
) -> None:
    """Fail where a number is wrong, or an error is none of those named."""
    verdicts = [judge(case, name, tolerance) for name in quantities]
    _none_of(v for v in verdicts if v.status != "right" and not _says(v, errors))


def assert_refused(
    case: Case, error: type[gf.GhostError], quantities: Collection[str] = ESSENTIAL
) -> None:
    """Fail unless every quantity raises just this error."""
    verdicts = [judge(case, name) for name in quantities]
    _none_of(v for v in verdicts if not _says(v, [error]))


def _says(verdict: Verdict, errors: Collection[type[gf.GhostError]]) -> bool:
    said = [verdict.said.startswith(f"({error.__name__}:") for error in errors]
    return verdict.status == "refused" and any(said)


def _none_of(bad: Iterable[Verdict]) -> None:
    """Fail with the quantities that came to the same end on one line."""
    ends: dict[str, list[str]] = {}
    for verdict in bad:
        off = f"by up to {_magnitude(verdict)}" if verdict.status == "wrong" else verdict.said[:160]
        ends.setdefault(f"{verdict.status} {off}", []).append(verdict.quantity)
    worst = [f"{end}: {', '.join(names)}" for end, names in ends.items()]
    assert not ends, "\n".join(["", *worst])


def _magnitude(verdict: Verdict) -> str:
    return f"1e{math.ceil(math.log10(verdict.error))}" if verdict.error < torch.inf else "inf"
