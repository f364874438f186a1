"""Check op rules, the ones that come with ghostfunc and your own, against plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor

from ghostfunc._errors import OptionError, VerificationError
from ghostfunc._rules import DECOMPOSITIONS
from ghostfunc._rules._registry import op_name
from ghostfunc._transforms import ghost_dot_prod, per_sample_grads
from ghostfunc._tree import flatten_params
from ghostfunc._vjp import traced

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
    return lambda n, generator: torch.randint(high, (n, *shape), generator=generator)


def check_rule(
    op: Callable[..., Any],
    cases: Sequence[Case],
    *,
    samples: Sequence[int] = (1, 2, 3),
    tolerance: float = 1e-10,
    seed: int = 0,
) -> None:
    """Check that an op's rule is exact, in float64.

        g_i (ghost) = g_i (autograd, one sample at a time)
        <g_i, g_j>  (ghost) = the same from autograd's gradients, summed over j and one by one

    where the loss of a sample is a sum of sines of its part of the output. Numbers of
    samples follow one another on one model function, as in a training loop. Take a case in which
    the number of positions equals that of samples, and one for every option of the op.

    Args:
        op: the op, as given to `gf.register_rule`.
        cases: ways to call it.
        samples: numbers of samples to draw.
        tolerance: largest error, relative to the size of the parameter's gradients.
        seed: of the random numbers.

    Raises:
        VerificationError: numbers differ, with a line for each; or a case never has the op called
            with a parameter where samples are.
        GhostError: whatever ghost mode says of the op; `UnsupportedOpError` if it has no rule.
    """
    if not cases:
        raise OptionError("check_rule needs at least one case.")
    wrong = []
    for number, case in enumerate(cases):
        model_fn = _model(case)
        name = f"case {number}" + (f" ({case.name})" if case.name else "")
        generator = torch.Generator().manual_seed(seed)
        params = {k: _draw(x, generator) for k, x in case.params.items()}
        for n in samples:
            train = {k: _draw(x, generator, n) for k, x in case.samples.items()}
            val = {k: _draw(x, generator, 2) for k, x in case.samples.items()}
            if n == samples[0]:
                _check_called(op, name, model_fn, params, train)
            lines = _compare(model_fn, params, train, val, tolerance)
            wrong += [f"{name}, n = {n}, {line}" for line in lines]
    if wrong:
        raise VerificationError(
            f"The rule of {op_name(op)} differs from autograd by more than {tolerance:.0e} of "
            "its size:\n" + "\n".join(f"  {line}" for line in wrong)
        )


def _draw(spec: Sequence[int] | Draw, generator: Generator, *n: int) -> Tensor:
    if callable(spec):
        return spec(*n, generator)
    return torch.randn((*n, *spec), generator=generator, dtype=torch.float64)


def _model(case: Case) -> Callable[[Tensors, Tensors], Tensor]:
    def model_fn(params: Tensors, samples: Tensors) -> Tensor:
        out = case.call(params, samples)
        n = len(next(iter(samples.values())))
        if out.ndim == 0 or out.shape[0] != n:
            raise OptionError(
                f"A case's output must have the {n} samples on its first axis, but has shape "
                f"{tuple(out.shape)}: reshape it in the case."
            )
        out = out.reshape(n, -1)
        return (out * torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)).sin().sum(1)

    return model_fn


def _check_called(
    op: Callable[..., Any],
    name: str,
    model_fn: Callable[[Tensors, Tensors], Tensor],
    params: Tensors,
    batch: Tensors,
) -> None:
    leaves, spec = flatten_params(params)
    calls = traced(model_fn, leaves, spec, batch, randomness="error").calls
    met = [call.func for call in calls if call.kind == "use"]
    if op not in met and op not in DECOMPOSITIONS:
        names = ", ".join(sorted({op_name(x) for x in met})) or "nothing"
        raise VerificationError(
            f"{name} does not test {op_name(op)}: its parameters meet samples in {names}."
        )


def _compare(
    model_fn: Callable[[Tensors, Tensors], Tensor],
    params: Tensors,
    train: Tensors,
    val: Tensors,
    tolerance: float,
) -> list[str]:
    """One line for every parameter and quantity that differs."""
    ours, theirs = _loop(model_fn, params, train), _loop(model_fn, params, val)
    lines = _differing(
        "g_i",
        per_sample_grads(model_fn, params, train, mode="ghost"),
        ours,
        {k: float(g.abs().max()) for k, g in ours.items()},
        tolerance,
    )
    pairs = {k: _matrix(g) @ _matrix(theirs[k]).mT for k, g in ours.items()}
    # The products may cancel; what they are made of does not.
    scales = {k: _norms(g).max() * _norms(theirs[k]).sum() for k, g in ours.items()}
    for reduction, expected in {
        "sum": {k: x.sum(1) for k, x in pairs.items()},
        "none": pairs,
    }.items():
        dots = ghost_dot_prod(
            model_fn,
            params,
            train,
            val,
            reduction=reduction,  # type: ignore[arg-type]
            per_param=True,
        )
        lines += _differing(f"<g_i, g_j> ({reduction})", dots, expected, scales, tolerance)
    return lines


def _differing(
    what: str, got: Tensors, want: Tensors, scales: dict[str, Any], tolerance: float
) -> list[str]:
    # What is zero but for rounding is held to the size of the others.
    floor = 1e-4 * max(map(float, scales.values()))
    lines = []
    for k, expected in want.items():
        error, scale = float((got[k] - expected).abs().max()), max(float(scales[k]), floor)
        if not error <= tolerance * scale:
            lines.append(f"{what} of {k!r}: off by {error:.1e} where sizes are {scale:.1e}")
    return lines


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
