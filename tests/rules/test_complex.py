"""Products with complex matrices, which are made of real parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, view_as_complex as made_complex, view_as_real as made_real
from torch.nn import functional as F

from ghostfunc.testing import Case, check_rule, ids

Tensors = Mapping[str, Tensor]


def spectral(p: Tensors, x: Tensors) -> Tensor:
    """A layer of a Fourier neural operator: each frequency has a matrix of its own."""
    waves = torch.einsum("nixy,ioxy->noxy", torch.fft.rfft2(x["x"]), made_complex(p["w"]))
    return torch.fft.irfft2(waves, s=(4, 4))


def long_filter(p: Tensors, x: Tensors) -> Tensor:
    """A diagonal state space model: a filter that is a sum of damped waves."""
    waves = torch.exp(torch.complex(-p["a"].exp(), p["b"])[..., None] * torch.arange(6))
    kernel = torch.einsum("hs,hst->ht", made_complex(p["c"]), waves).real
    return torch.fft.irfft(torch.fft.rfft(x["x"], n=12) * torch.fft.rfft(kernel, n=12), n=12)


def added(p: Tensors, x: Tensors) -> Tensor:
    bias, a, w = (made_complex(z) for z in (p["b"], x["x"], p["w"]))
    return made_real(torch.addmm(bias, a, w, beta=0.5 + 2j, alpha=1 - 1j))


def two_in_one(p: Tensors, x: Tensors) -> Tensor:
    a, w, v = (made_complex(z) for z in (x["x"], p["w"], p["v"]))
    return made_real(torch.einsum("nd,de,ef->nf", a, w, v.conj()))


def in_groups(p: Tensors, x: Tensors) -> Tensor:
    a, w = made_complex(x["x"]), made_complex(p["w"])
    return made_real(torch.einsum("ntgd,gde->ntge", a, w))


def tied(p: Tensors, x: Tensors) -> Tensor:
    w = made_complex(p["w"])
    return made_real(w[x["i"]] @ w.T)


def layer(p: Tensors, x: Tensors) -> Tensor:
    return made_real(F.linear(*(made_complex(z) for z in (x["x"], p["w"], p["b"]))))


CASES: dict[str, tuple[Callable[..., Any], Case]] = {
    "spectral": (torch.einsum, Case(spectral, {"w": (2, 3, 4, 3, 2)}, {"x": (2, 4, 4)})),
    "long filter": (
        Tensor.mul,
        Case(long_filter, {"c": (2, 3, 2), "a": (2, 3), "b": (2, 3)}, {"x": (2, 6)}),
    ),
    "added": (torch.addmm, Case(added, {"w": (4, 3, 2), "b": (3, 2)}, {"x": (4, 2)})),
    "two in one": (torch.einsum, Case(two_in_one, {"w": (4, 3, 2), "v": (3, 2, 2)}, {"x": (4, 2)})),
    "in groups": (torch.einsum, Case(in_groups, {"w": (2, 9, 8, 2)}, {"x": (7, 2, 9, 2)})),
    "tied": (Tensor.__getitem__, Case(tied, {"w": (7, 3, 2)}, {"i": ids(7, 4)})),
    "layer": (F.linear, Case(layer, {"w": (3, 4, 2), "b": (3, 2)}, {"x": (5, 4, 2)})),
    "adjoint": (
        Tensor.matmul,
        Case(
            lambda p, x: made_real(made_complex(x["x"]).conj() @ made_complex(p["w"]).mH),
            {"w": (3, 4, 2)},
            {"x": (5, 4, 2)},
        ),
    ),
    "on the left": (
        Tensor.matmul,
        Case(
            lambda p, x: made_real(made_complex(p["w"]) @ made_complex(x["x"])),
            {"w": (3, 5, 2)},
            {"x": (5, 4, 2)},
        ),
    ),
    "made of real ones": (
        Tensor.matmul,
        Case(
            lambda p, x: (torch.fft.rfft(x["x"]) @ torch.complex(p["w"], p["v"]).T).imag,
            {"w": (4, 3), "v": (4, 3)},
            {"x": (2, 5)},
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_products(name: str) -> None:
    op, case = CASES[name]
    check_rule(op, [case])
