"""What stands for PEFT's hand-written functions has their values and gradients."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from compare import assert_close
from hf_trainers import llama
from peft.tuners.c3a.utils import BlockCircularConvolution
from peft.tuners.loha.layer import HadaWeight, HadaWeightCP
from peft.tuners.randlora.layer import UniqueBaseGrad
from torch import Tensor, nn

import ghostfunc as gf
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


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        peft.RandLoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
    ],
    ids=["loha", "randlora"],
)
def test_every_mode(config: peft.PeftConfig) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.rand_like(p) / 4)
    model_fn, params = gf.hf.causal_lm(model)
    train, val = ({"input_ids": torch.randint(3, 40, (n, 6))} for n in (4, 2))
    assert gf.verify(model_fn, params, train, val).ok
    for mode in ("jvp", "materialized"):
        scores = gf.ghost_dot_prod(model_fn, params, train, val, mode=mode)
        found = gf.ghost_dot_prod(model_fn, params, train, val)
        assert_close(found, scores, 1e-6)  # RMS norms round to float32
    assert "get_delta_weight" not in {name for m in model.modules() for name in vars(m)}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_a_checkpoint_of_torch() -> None:
    """Plain autograd runs PEFT's own functions, the second time as the first; taps say what to
    use."""
    config = peft.LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config).train()
    model.gradient_checkpointing_enable()
    model_fn, params = gf.hf.causal_lm(model)
    batch = {"input_ids": torch.randint(3, 40, (4, 7))}
    leaves = {name: x.clone().requires_grad_() for name, x in params.items()}
    model_fn(leaves, batch).sum().backward()
    assert all(x.grad is not None for x in leaves.values())
    with pytest.raises(gf.TransformError, match=r"torch.utils.checkpoint.*gf.remat"):
        gf.ghost_norm(model_fn, params, batch, randomness="different")


def loss_of(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    losses: Tensor = module(**batch).logits.square().mean((1, 2))
    return losses


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_model_functions_are_pickled() -> None:
    config = peft.LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model_fn, params = gf.from_module(peft.get_peft_model(llama(), config).eval(), loss_of)
    batch = {"input_ids": torch.randint(3, 40, (2, 5))}
    again = pickle.loads(pickle.dumps(model_fn))
    assert torch.equal(gf.ghost_norm(again, params, batch), gf.ghost_norm(model_fn, params, batch))


@pytest.mark.parametrize("member", [None, property(lambda self: 1), staticmethod(len)])
def test_members_with_the_name_of_a_method(member: Any) -> None:
    kind: Any = type("Odd", (nn.Linear,), {"get_delta_weight": member})
    model_fn, params = gf.from_module(kind(3, 2), lambda module, x: module(x).sum(1))
    assert gf.ghost_norm(model_fn, params, torch.randn(4, 3)).shape == (4,)


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
