"""float32 products that torch may round: a proof expects the digits that they have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import ghostfunc as gf
from ghostfunc._base.dtypes import digits_of

DIGITS = {"highest": torch.float32, "high": torch.float16, "medium": torch.bfloat16}


@pytest.fixture(params=DIGITS)
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def test_digits_of_products(precision: str) -> None:
    assert digits_of(torch.float32) is DIGITS[precision]
    assert digits_of(torch.float64) is torch.float64


def test_right_numbers_are_not_refused(precision: str) -> None:
    """Where the processor rounds them, too: Intel's with AMX do at "medium"."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    model_fn, params = gf.from_module(net, lambda m, x: m(x).square().mean((1, 2)))
    x = torch.randn(6, 64, 256)
    want = gf.per_sample_grads(model_fn, params, x)
    rows = torch.cat([g.flatten(1) for g in want.values()], 1)
    got = gf.ghost_dot_prod(model_fn, params, x[:4], x[4:])
    torch.testing.assert_close(got, rows[:4] @ rows[4:].mean(0), rtol=0.05, atol=1e-3)
    torch.testing.assert_close(
        gf.ghost_norm(model_fn, params, x), rows.norm(dim=1), rtol=0.05, atol=0
    )


def test_samples_that_meet_are_refused(precision: str) -> None:
    def mixed(params: dict[str, Tensor], x: Tensor) -> Tensor:
        h = x @ params["w"]
        return (h - 0.5 * h.flip(0)).square().mean(1)

    with pytest.raises(gf.CoupledSamplesError):
        gf.ghost_norm(mixed, {"w": torch.randn(64, 64)}, torch.randn(4, 64))
