"""What stored projections rely on: the same numbers on every machine, and in every version."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import ghostfunc as gf
from ghostfunc.projection import _random

SHAPES = {"h.0.weight": (6, 5), "wte.weight": (9, 4)}
GOLDEN = {
    "gaussian": [2.111428, 0.978956, 3.744006, -1.291915, 0.468893, 0.387609, -1.081683, 2.455874],
    "rademacher": [-2, 4 / 3, 4 / 3, 2 / 3, -13 / 12, -13 / 12, 13 / 12, 13 / 12],
    "orthonormal": [
        *(-0.91879, -0.567853, 2.300352, 3.120709),
        *(0.019852, 1.797172, -0.674603, 2.70171),
    ],
    "sparse": [5 / 6, 4 / 3, 4 / 3, -31 / 6, 7 / 12, 1.25, 0.25, 1.25],
    "dense": [-11 / 12, 25 / 12, -47 / 12, -41 / 12],
}
SIGNS = "f6d7a00c6ef9fc64a1483871df37b5b0a78d359d178bbfd660227e5bbc6ff3f9"


def golden_grads() -> dict[str, Tensor]:
    """Gradients of one sample that are exact on every machine."""
    grads = {}
    for name, shape in SHAPES.items():
        i = torch.arange(shape[0] * shape[1], dtype=torch.float64)
        grads[name] = ((7 * i) % 13 - 6).view(1, *shape) / 6
    return grads


def projected(kind: str, **options: object) -> list[float]:
    params = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    projection = gf.kronecker_projection(
        params, rank_total=4, rank_min=2, kind=kind, seed=2026, **options
    )
    return projection.apply(golden_grads())[0].tolist()


@pytest.mark.parametrize("kind", GOLDEN)
def test_numbers_of_every_kind_are_pinned(kind: str) -> None:
    assert projected(kind) == pytest.approx(GOLDEN[kind], abs=2e-6)


def test_compressed_numbers_are_pinned() -> None:
    want = [3.271651, -0.288675, -2.501851]
    assert projected("rademacher", compress=3) == pytest.approx(want, abs=2e-6)


def test_signs_are_pinned_bit_for_bit() -> None:
    key = _random.stream_key(2026, "w", "golden")
    made = _random.rademacher(key, 0, 1000, 100).astype("<f4").tobytes()
    assert hashlib.sha256(made).hexdigest() == SIGNS
    # Another process, with other global seeds and hash randomisation, makes the same.
    code = (
        "import hashlib, numpy as np; np.random.seed(5)\n"
        "from ghostfunc.projection import _random\n"
        "key = _random.stream_key(2026, 'w', 'golden')\n"
        "made = _random.rademacher(key, 0, 1000, 100).astype('<f4').tobytes()\n"
        "print(hashlib.sha256(made).hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == SIGNS


@pytest.mark.parametrize("kind", GOLDEN)
def test_a_selection_changes_no_matrix(kind: str) -> None:
    """A parameter alone gets what it gets among others; for `dense` the others add to it."""
    whole = projected(kind)
    parts = [projected(kind, layers=[name]) for name in SHAPES]
    if kind == "dense":
        joined = [a + b for a, b in zip(*parts, strict=True)]
    else:
        joined = [x for part in parts for x in part]
    assert joined == pytest.approx(whole, rel=1e-12, abs=1e-12)
