"""What stands for PEFT's hand-written functions has their values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compare import assert_close
from peft.tuners.c3a.utils import BlockCircularConvolution
from peft.tuners.loha.layer import HadaWeight, HadaWeightCP
from peft.tuners.randlora.layer import UniqueBaseGrad
from torch import Tensor, nn

from ghostfunc._base.hand_written import ScaledBases, hadamard
from ghostfunc._base.methods import overridden, override, overrides_now

Function = Callable[..., Tensor]
MATRICES = ((5, 2), (2, 3))
KERNELS = ((2, 2, 3, 1), (2, 5), (2, 4))


@pytest.mark.parametrize(
    ("theirs", "ours", "sizes", "constant"),
    [
        (HadaWeight.apply, hadamard, (*MATRICES, *MATRICES, ()), 4),
        (UniqueBaseGrad.apply, ScaledBases.apply, ((2, 1, 4), (2, 3), (3, 4)), 0),
    ],
    ids=["loha", "randlora"],
)
def test_values_and_gradients(
    theirs: Function, ours: Function, sizes: tuple[tuple[int, ...], ...], constant: int
) -> None:
    torch.manual_seed(0)
    given = [
        torch.randn(size, dtype=torch.float64, requires_grad=i != constant)
        for i, size in enumerate(sizes)
    ]
    expected, found = theirs(*given), ours(*given)
    b, leaves = torch.randn_like(found), [x for x in given if x.requires_grad]
    assert_close(found.detach(), expected.detach(), 1e-12)
    grads = torch.autograd.grad(found, leaves, b)
    assert_close(grads, torch.autograd.grad(expected, leaves, b), 1e-12)


def test_what_has_another_gradient() -> None:
    """The day that these are the gradients of their values, they can be trained."""

    def right(function: Function, *sizes: tuple[int, ...]) -> bool:
        torch.manual_seed(0)
        given = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
        found: bool = torch.autograd.gradcheck(function, given, raise_exception=False)
        return found

    assert right(HadaWeight.apply, *MATRICES, *MATRICES)
    assert not right(HadaWeightCP.apply, *KERNELS, *KERNELS)
    assert not right(BlockCircularConvolution.apply, (3, 8), (2, 2, 4))


def test_methods_for_a_while() -> None:
    one, two = nn.Identity(), nn.Identity()
    two.__dict__["forward"] = lambda x: -x
    doubled = [override(m, "forward", lambda m, x: 2 * x, m) for m in (one, two)]
    x = torch.ones(1)
    with overridden(doubled):
        assert (one(x), two(x)) == (2, -1)
        assert overrides_now([one, two]) == doubled[:1]
        with overridden(doubled):
            assert one(x) == 2
        assert one(x) == 2
    assert (one(x), two(x)) == (1, -1)
