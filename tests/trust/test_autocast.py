"""Under an outer `torch.autocast`, contractions run in float32 or wider."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_quantity import Case, assert_right
from problems import energy, weights
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ghostfunc as gf


def in_float32(p: Any, batch: Any) -> Tensor:
    """The model itself is told not to cast."""
    with torch.autocast("cpu", enabled=False):
        return energy(torch.tanh(batch @ p["w"]) @ p["v"])


def derived(p: Any, batch: Any) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return energy(batch @ (p["w"] @ p["v"]))


ASKED = (
    "dots", "dots_of_pairs", "dots_along_a_direction", "dots_with_kept_gradients", "steps", "norms",
    "gram", "gram_with_others", "clipped_sums", "factored", "one_pass", "sample_grads",
    "projections_gaussian", "projections_dense", "validation_gradients",
)  # fmt: skip


class Products(TorchDispatchMode):
    """Notes the dtypes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.dtypes.add(args[-1].dtype)
        return out


def case_of(model: Any) -> Case:
    params = {k: v.float() for k, v in weights(w=(4, 6), v=(6, 4)).items()}

    def draw(n: int) -> Tensor:
        return torch.randn(n, 3, 4, generator=Generator().manual_seed(n))

    return Case(model, params, draw(4), draw(2))


@pytest.mark.parametrize("model", [in_float32, derived], ids=lambda f: f.__name__)
def test_numbers_have_the_digits_of_float32(model: Any) -> None:
    case = case_of(model)
    assert len(case.g) == len(case.v) == 2  # the loop runs outside
    assert case.losses.ndim == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_right(case, ASKED, tolerance=1e-5)


def test_no_product_is_of_bfloat16() -> None:
    case = case_of(in_float32)
    for ask in (gf.ghost_norm, gf.ghost_gram, gf.factored_grads, gf.direction):
        with torch.autocast("cpu", dtype=torch.bfloat16), Products() as products:
            case.of(ask)
        assert torch.bfloat16 not in products.dtypes, ask.__name__


def test_a_model_that_casts() -> None:
    """The model's own products are rounded, as the user asked; contractions of them are not."""

    def model(p: Any, batch: Any) -> Tensor:
        return energy((batch @ p["w"]).float())

    case = case_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = case.of(gf.ghost_dot_prod, case.val, mode="materialized", vectorize=False)
        got = case.of(gf.ghost_dot_prod, case.val)
        norms = case.of(gf.ghost_norm)
        kept = case.of(gf.factored_grads).norms()
    torch.testing.assert_close(got, plain, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(norms, kept, rtol=1e-5, atol=1e-6)
