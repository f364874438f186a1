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


def rounded(p: Any, batch: Any) -> Tensor:
    """Losses in float32 of products in bfloat16, whose last digits depend on how many there are."""
    hidden = torch.tanh(batch.bfloat16() @ p["w"].bfloat16())
    return energy((hidden @ p["v"].bfloat16()).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_in_between_is_no_coupling(dtype: torch.dtype) -> None:
    generator = Generator().manual_seed(0)
    p = {
        k: torch.randn(s, generator=generator).to(dtype) for k, s in (("w", (6, 8)), ("v", (8, 3)))
    }
    for _ in range(8):
        batch = 3 * torch.randn(5, 6, generator=generator)
        found, right = (
            gf.ghost_norm(rounded, p, batch, mode=mode) for mode in ("ghost", "materialized")
        )
        torch.testing.assert_close(found.float(), right.float(), rtol=0.1, atol=0.1)
        gf.direction(rounded, p, batch)

    def coupled(p: Any, batch: Any) -> Tensor:
        losses = rounded(p, batch)
        return losses * losses.mean()

    for mode in ("ghost", "materialized"):
        with pytest.raises(gf.CoupledSamplesError):
            gf.ghost_norm(coupled, p, batch, mode=mode)


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
