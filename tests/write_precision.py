"""Write `docs/precision.md`: errors against float64 in every precision.

python tests/write_precision.py
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from precision import (
    HALF,
    SETTINGS,
    SUMS,
    Setting,
    exact_language_model,
    language_model,
    name_of,
    relative,
    tokens,
)

import ghostfunc as gf

PAGE = Path(__file__).resolve().parent.parent / "docs/precision.md"
HEAD = """# Precision

What each precision costs, measured against float64. `tests/write_precision.py` writes the tables,
and [tests/transforms/test_precision.py](../tests/transforms/test_precision.py) holds what is
said here.

## What runs in which precision

- **The model** runs in the precision you run it in: parameters in bfloat16 or float16, or
  `torch.autocast` inside the loss. Its activations `a` and cotangents `b` are rounded there, once
  per op, as in training.
- **Contractions** of `a` and `b`, and all sums of what they give, run in float32, or in float64 for
  float64 parameters. Scores, norms, Gram matrices and projections are returned like that. Nothing
  is cast down on the way, also not the validation gradient: it is kept as factors, or added up in
  float32. (Behind a re-parametrisation of half-precision parameters, such as weight norm, it passes
  through autograd in their dtype.)
- **Where a parameter is broadcast** against samples (`x + w`, `w * x`), autograd itself sums over a
  sample's positions. It does so in float32 and rounds the result to the parameter's dtype once.
- **What has the dtype of the parameters**: `grads` and `gf.direction`. A direction computed once
  and used for many batches is rounded to it; `ghost_dot_prod(..., val)` has no such rounding.
- **jvp and materialized** push directions, or form `g_i`, in the dtype of the parameters, and
  contract in float32.

"""
MODELS = """## Whole models

Scores of 6 samples with 3, and norms, of a GPT-2 of two layers. The truth is the same model, with
the same (rounded) parameters, run in float64. Errors are the largest of any sample, relative to the
largest value.

| parameters | ghost | jvp | materialized | norms |
| --- | --- | --- | --- | --- |
"""
ALONE = """
Below float32 the model's own rounding is all there is to see: the three modes differ from float64
by as much as each other.

## Contractions alone

Here the factors are exact numbers of half precision, 512 positions a sample, so that all of the
error is that of the contraction. Beside it what forming `g_i` in the parameters' dtype gives.

| op | dtype | scores | norms | Gram matrix | scores of formed `g_i` |
| --- | --- | --- | --- | --- | --- |
"""
SCALING = """
## Scaled losses

Scaling is yours, and what you scale is what you get: with losses scaled by `s`, `g_i`, norms and
projections are scaled by `s`, and so are dot products with a direction that is not. Dot products of
two scaled batches are scaled by `s^2`, as Gram matrices are. Divide by it. If `s` is a power of two
this undoes the scaling exactly, bit by bit: only exponents move, while none runs over or under.

In float16 they do run under, and there scaling is what keeps small cotangents from vanishing. As
contractions run in float32, no product of two scaled numbers runs over in them. The model above, in
float16, with losses divided by 2^14 and scaled by `s`:

| s | error of the scores |
| --- | --- |
"""
FOOT = """
Losses are checked to be finite, cotangents are not: a score that is infinite or NaN says that the
scale is too large, as for `torch.amp.GradScaler`.
"""


def model_row(setting: Setting) -> str:
    x, exact = language_model(setting), exact_language_model(setting)
    train, val = tokens(6, 0), tokens(3, 1)
    want = gf.ghost_dot_prod(*exact, train, val, mode="materialized", vectorize=False)
    norms = gf.ghost_norm(*exact, train, mode="materialized", vectorize=False)
    found = [
        gf.ghost_dot_prod(*x, train, val),
        gf.ghost_dot_prod(*x, train, val, mode="jvp"),
        gf.ghost_dot_prod(*x, train, val, mode="materialized", vectorize=False),
    ]
    errors = [relative(f, want) for f in found] + [relative(gf.ghost_norm(*x, train), norms)]
    return f"| {setting} | {' | '.join(f'{e:.0e}' for e in errors)} |\n"


def sum_row(name: str, dtype: torch.dtype) -> str:
    case = SUMS[name]
    x = case.model_fn, case.params(dtype)
    train, val = case.batch(4, dtype, 0), case.batch(3, dtype, 1)
    g, g_val = (case.grads(batch).flatten(1) for batch in (train, val))
    want = g @ g_val.mean(0)
    errors = [
        relative(gf.ghost_dot_prod(*x, train, val), want),
        relative(gf.ghost_norm(*x, train), g.norm(dim=1)),
        relative(gf.ghost_gram(*x, train), g @ g.mT),
        relative(gf.ghost_dot_prod(*x, train, val, mode="materialized"), want),
    ]
    return f"| {name_of(dtype)} | {' | '.join(f'{e:.0e}' for e in errors)} |\n"


def scaled_row(power: int) -> str:
    train, val = tokens(6, 0), tokens(3, 1)
    setting, small = Setting(torch.float16), 2.0**-14
    want = gf.ghost_dot_prod(*exact_language_model(setting), train, val) * small**2
    got = gf.ghost_dot_prod(*language_model(setting, 2.0**power * small), train, val)
    return f"| 2^{power} | {relative(got.double() / 4.0**power, want):.0e} |\n"


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sums = "".join(
        (f"| {name} " if dtype is HALF[0] else "| ") + sum_row(name, dtype)
        for name in SUMS
        for dtype in HALF
    )
    PAGE.write_text(
        HEAD
        + MODELS
        + "".join(map(model_row, SETTINGS))
        + ALONE
        + sums
        + SCALING
        + "".join(map(scaled_row, (0, 4, 8, 12, 16)))
        + FOOT
    )


if __name__ == "__main__":
    main()
