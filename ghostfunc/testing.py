"""Check op rules and quantities, ghostfunc's own and yours, against plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ghostfunc._base.errors import OptionError, VerificationError
from ghostfunc._base.options import check_callable, check_positive, check_type, check_whole
from ghostfunc._base.program import Program
from ghostfunc._base.refusals import op_name
from ghostfunc._quantities.quantity import Quantity
from ghostfunc._rules.registry import DECOMPOSITIONS, canonical
from ghostfunc._trace.fitting import traced
from ghostfunc._transforms.dot_prods import ghost_dot_prod, ghost_value_and_grad
from ghostfunc._transforms.grads import per_sample_grads
from ghostfunc._transforms.gram import ghost_gram
from ghostfunc._transforms.vjp import ghost_vjp
from ghostfunc.projection import ghost_project, kronecker_projection

Tensors: TypeAlias = dict[str, Tensor]
Draw: TypeAlias = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One way to call an op.

    Attributes:
        call: `call(params, samples) -> output`, a model in miniature that calls the op. The samples
            lie on the first axis of the output, whatever happens inside.
        params: the tensors that are parameters: a shape, which is filled with normal numbers, or a
            function `draw(generator)`.
        samples: the tensors that carry samples: the shape of one sample, or a function
            `draw(n, generator)` that returns `[n, ...]` (integers, say: see `ids`).
        name: what reports call it.
    """

    call: Callable[[Tensors, Tensors], Tensor]
    params: Mapping[str, Sequence[int] | Draw]
    samples: Mapping[str, Sequence[int] | Draw]
    name: str = ""


def ids(high: int, *shape: int) -> Draw:
    """Integers in `[0, high)`, of this shape in each sample."""
    return lambda n, generator: torch.randint(
        high, (n, *shape), generator=generator, device=generator.device
    )


def check_rule(
    op: Callable[..., Any],
    cases: Sequence[Case],
    *,
    samples: Sequence[int] = (1, 2, 3),
    tolerance: float = 1e-10,
    seed: int = 0,
) -> None:
    """Check that an op's rule is exact, in float64.

        g_i in ghost mode = g_i by autograd, one sample at a time

    where the loss of a sample is a sum of sines of its part of the output. Their mean is compared,
    too, their inner products with a direction, with other samples' gradients, and with each other,
    and their projections. Numbers of samples follow one another on one model function, as in a
    training loop. Take a case for every option of the op, and one in which there are as many
    positions as samples.

    Args:
        op: the op, as given to `gf.register_rule`.
        cases: ways to call it.
        samples: numbers of samples to draw.
        tolerance: largest error, relative to the size of the parameter's gradients.
        seed: of the random numbers.

    Raises:
        VerificationError: numbers differ, with a line for each; or a case never has the op called
            with a parameter where samples are, or has no gradient other than zero.
        GhostError: whatever ghost mode says of the op; `UnsupportedOpError` if it has no rule.
    """
    _check_asked(samples, tolerance, seed)
    check_type("cases", cases, (list, tuple), "a list of Case")
    if not cases:
        raise OptionError("check_rule needs at least one case.")
    for case in cases:
        check_type("a member of cases", case, Case, "a Case(call, params, samples)")
    wrong = []
    for number, case in enumerate(cases):
        model_fn = _model(case)
        name = f"case {number}" + (f" ({case.name})" if case.name else "")
        generator = torch.Generator().manual_seed(seed)
        params = {k: _draw(x, generator) for k, x in case.params.items()}
        moved = False
        for n in samples:
            train = {k: _draw(x, generator, n) for k, x in case.samples.items()}
            val = {k: _draw(x, generator, 2) for k, x in case.samples.items()}
            if n == samples[0]:
                _check_called(op, name, model_fn, params, train)
            ours = _loop(model_fn, params, train)
            moved |= any(bool(g.any()) for g in ours.values())
            lines = _compare(model_fn, params, train, val, ours, tolerance)
            wrong += [f"{name}, n = {n}, {line}" for line in lines]
        if not moved:
            raise VerificationError(
                f"{name} tests nothing: all its gradients are zero. Have its call return what "
                "depends on the parameters."
            )
    if wrong:
        raise VerificationError(
            f"The rule of {op_name(op)} differs from autograd by more than {tolerance:.0e} of "
            "its size:\n" + "\n".join(f"  {line}" for line in wrong)
        )


def check_quantity(
    quantity: Quantity,
    definition: Callable[[Tensor], Tensor],
    *,
    samples: Sequence[int] = (1, 2, 3),
    tolerance: float = 1e-10,
    seed: int = 0,
) -> None:
    """Check that a quantity is what it is defined to be, in float64.

        value of a parameter = definition(its per-sample gradients [n, *shape] by autograd)

    on small models in which parameters meet samples in every way that there is: a linear layer and
    its transpose, an embedding, a convolution, a scale, a bias, a weight that is used twice, tied
    to an embedding, or made of others, and one that is not used at all.

    Args:
        quantity: what is checked, such as `gf.SqNorm()`.
        definition: from one parameter's per-sample gradients, `[n, *shape]`, to the value.
        samples: numbers of samples to draw.
        tolerance: largest error, relative to the largest entry of the value.
        seed: of the random numbers.

    Raises:
        VerificationError: values differ, with a line for each parameter, or have another shape.
        GhostError: whatever ghost mode says of the quantity.

    Example:
        >>> check_quantity(gf.SqNorm(), lambda g: g.flatten(1).square().sum(1))
    """
    _check_asked(samples, tolerance, seed)
    check_callable("definition", definition, "of per-sample gradients [n, *shape]")
    wrong = []
    for name, case in _QUANTITY_CASES.items():
        model_fn = _model(case)
        generator = torch.Generator().manual_seed(seed)
        params = {k: _draw(x, generator) for k, x in case.params.items()}
        for n in samples:
            batch = {k: _draw(x, generator, n) for k, x in case.samples.items()}
            found = ghost_vjp(model_fn, params, batch, quantity, check="never").values
            for k, g in _loop(model_fn, params, batch).items():
                expected, value = definition(g), found[k]
                where = f"{name}, n = {n}, parameter {k!r} {tuple(params[k].shape)}"
                check_type("what definition returned", expected, Tensor, "a tensor")
                if value is None:
                    wrong.append(f"{where}: nothing was read, defined as {tuple(expected.shape)}")
                    continue
                if value.shape != expected.shape:
                    wrong.append(
                        f"{where}: shape {tuple(value.shape)}, defined as {tuple(expected.shape)}"
                    )
                    continue
                size = float(expected.abs().max()) if expected.numel() else 0.0
                error = float((value - expected).abs().max()) if expected.numel() else 0.0
                if not error <= tolerance * max(size, 1e-4):
                    wrong.append(f"{where}: off by {error:.1e} where values are {size:.1e}")
    if wrong:
        raise VerificationError(
            f"{type(quantity).__name__} differs from its definition by more than {tolerance:.0e} "
            "of its size:\n" + "\n".join(f"  {line}" for line in wrong)
        )


def _check_asked(samples: object, tolerance: object, seed: object) -> None:
    """Raise `OptionError` for what would check nothing."""
    check_type("samples", samples, (list, tuple, range), "numbers of samples, such as (1, 2, 3)")
    for n in samples:  # type: ignore[attr-defined]
        check_whole("a member of samples", n)
    if not samples:
        raise OptionError("samples is empty: nothing would be checked. Leave it out for (1, 2, 3).")
    check_positive("tolerance", tolerance)
    if type(seed) is not int:
        raise OptionError(f"seed={seed!r} must be an integer.")


_QUANTITY_CASES: dict[str, Case] = {
    "linear": Case(
        lambda p, s: F.linear(s["x"], p["w"], p["b"]),
        {"w": (5, 4), "b": (5,)},
        {"x": (3, 4)},
    ),
    "transposed": Case(lambda p, s: s["x"] @ p["w"], {"w": (4, 5)}, {"x": (3, 4)}),
    "embedding": Case(lambda p, s: F.embedding(s["i"], p["e"]), {"e": (6, 4)}, {"i": ids(6, 3)}),
    "tied": Case(
        lambda p, s: torch.tanh(F.embedding(s["i"], p["e"])) @ p["e"].t(),
        {"e": (6, 4)},
        {"i": ids(6, 3)},
    ),
    "used twice": Case(
        lambda p, s: F.linear(torch.tanh(F.linear(s["x"], p["w"])), p["w"]),
        {"w": (4, 4)},
        {"x": (3, 4)},
    ),
    "convolution": Case(
        lambda p, s: F.conv1d(s["x"], p["w"], p["b"]),
        {"w": (3, 2, 2), "b": (3,)},
        {"x": (2, 5)},
    ),
    "scale and table": Case(
        lambda p, s: s["x"] * p["scale"] + p["table"],
        {"scale": (4,), "table": (3, 4)},
        {"x": (3, 4)},
    ),
    "derived": Case(
        lambda p, s: F.linear(s["x"], p["w"] + p["b"] @ p["a"]),
        {"w": (5, 4), "b": (5, 2), "a": (2, 4)},
        {"x": (3, 4)},
    ),
    "not used": Case(
        lambda p, s: F.linear(s["x"], p["w"]), {"w": (5, 4), "free": (3, 2)}, {"x": (3, 4)}
    ),
}
"""One model for every way in which a parameter meets samples."""


def _draw(spec: Sequence[int] | Draw, generator: Generator, *n: int) -> Tensor:
    if callable(spec):
        return spec(*n, generator)
    return torch.randn(
        (*n, *spec), generator=generator, dtype=torch.float64, device=generator.device
    )


def _model(case: Case) -> Callable[[Tensors, Tensors], Tensor]:
    def model_fn(params: Tensors, samples: Tensors) -> Tensor:
        out = case.call(params, samples)
        check_type("what a case's call returned", out, Tensor, "a tensor")
        n = len(next(iter(samples.values())))
        if out.ndim == 0 or out.shape[0] != n:
            raise OptionError(
                f"A case's output must have the {n} samples on its first axis, but has shape "
                f"{tuple(out.shape)}: reshape it in the case."
            )
        out = out.reshape(n, -1)
        return (
            (out * torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype, device="cpu"))
            .sin()
            .sum(1)
        )

    return model_fn


def _check_called(
    op: Callable[..., Any],
    name: str,
    model_fn: Callable[[Tensors, Tensors], Tensor],
    params: Tensors,
    batch: Tensors,
) -> None:
    calls = traced(Program.of(model_fn, params), batch).trace.calls
    met = [canonical(call.func) for call in calls if call.kind == "use"]
    if canonical(op) not in met and canonical(op) not in DECOMPOSITIONS:
        names = ", ".join(sorted({op_name(x) for x in met})) or "nothing"
        raise VerificationError(
            f"{name} does not test {op_name(op)}: its parameters meet samples in {names}."
        )


def _compare(
    model_fn: Callable[[Tensors, Tensors], Tensor],
    params: Tensors,
    train: Tensors,
    val: Tensors,
    ours: Tensors,
    tolerance: float,
) -> list[str]:
    """One line for every parameter and quantity that differs; `ours` by a loop over `train`."""
    theirs = _loop(model_fn, params, val)
    u = {
        k: torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device="cpu").view_as(x)
        for k, x in params.items()
    }
    step = ghost_value_and_grad(model_fn, params, train, direction=u, per_param=True, check="never")
    sizes = {k: _norms(g).max() for k, g in ours.items()}
    # Products may cancel; what they are made of does not.
    along = {k: size * u[k].norm() for k, size in sizes.items()}
    pairs = {k: size * _norms(theirs[k]).max() for k, size in sizes.items()}
    squares = {k: size**2 for k, size in sizes.items()}
    results: list[tuple[str, Tensors, Tensors, Tensors]] = [
        (
            "g_i",
            per_sample_grads(model_fn, params, train, mode="ghost", check="never"),
            ours,
            sizes,
        ),
        ("mean of g_i", step.grads, {k: g.mean(0) for k, g in ours.items()}, sizes),
        (
            "<g_i, u>",
            step.dot_prods,
            {k: _dots(g, u[k][None])[:, 0] for k, g in ours.items()},
            along,
        ),
        (
            "<g_i, v_j>",
            ghost_dot_prod(
                model_fn, params, train, val, reduction="none", per_param=True, check="never"
            ),
            {k: _dots(g, theirs[k]) for k, g in ours.items()},
            pairs,
        ),
        (
            "<g_i, g_j>",
            ghost_gram(model_fn, params, train, per_param=True, check="never"),
            {k: _dots(g, g) for k, g in ours.items()},
            squares,
        ),
        *_projections(model_fn, params, train, ours, sizes),
    ]
    return [line for result in results for line in _differing(*result, tolerance)]


def _projections(
    model_fn: Callable[[Tensors, Tensors], Tensor],
    params: Tensors,
    batch: Tensors,
    grads: Tensors,
    sizes: Tensors,
) -> list[tuple[str, Tensors, Tensors, Tensors]]:
    """Projections of both sorts, a product of two matrices and one map of everything."""
    layers = [k for k, x in params.items() if x.numel()]
    if not layers:
        return []
    results = []
    for kind in ("gaussian", "dense"):
        projection = kronecker_projection(
            params, rank_total=4, rank_min=1, kind=kind, seed=0, layers=layers
        )
        got = {"all": ghost_project(model_fn, params, batch, projection, check="never")}
        size = {"all": torch.stack([sizes[k] for k in layers]).norm()}
        results.append((f"{kind} projection", got, {"all": projection.apply(grads)}, size))
    return results


def _differing(
    what: str, got: Tensors, want: Tensors, sizes: Tensors, tolerance: float
) -> list[str]:
    # What is zero but for rounding is held to the size of the others.
    floor = 1e-4 * max(map(float, sizes.values()))
    lines = []
    for k, expected in want.items():
        off = (got[k] - expected).abs()
        error, size = float(off.max()) if off.numel() else 0.0, max(float(sizes[k]), floor)
        if not error <= tolerance * size:
            lines.append(f"{what} of {k!r}: off by {error:.1e} where sizes are {size:.1e}")
    return lines


def _dots(g: Tensor, h: Tensor) -> Tensor:
    return _matrix(g) @ _matrix(h).mT


def _norms(g: Tensor) -> Tensor:
    return _matrix(g).norm(dim=1)


def _matrix(g: Tensor) -> Tensor:
    return g.reshape(len(g), -1)


def _loop(
    model_fn: Callable[[Tensors, Tensors], Tensor], params: Tensors, batch: Tensors
) -> Tensors:
    """Per-sample gradients by their definition."""
    leaves = {k: x.detach().clone().requires_grad_() for k, x in params.items()}
    n = len(next(iter(batch.values())))
    rows = []
    for i in range(n):
        (loss,) = model_fn(leaves, {k: x[i : i + 1].clone() for k, x in batch.items()})
        rows.append(
            torch.autograd.grad(
                loss, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        )
    return {
        k: torch.stack(column) for k, column in zip(leaves, zip(*rows, strict=True), strict=True)
    }
