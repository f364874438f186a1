"""Values of one step against what the step really does, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from compare import assert_close
from shapley_problems import Setting, dense_values, zeros_like
from torch import Tensor

import ghostfunc as gf

WEIGHT = 1 / 5


def step(setting: Setting, **options: Any) -> gf.shapley.ShapleyStep:
    return gf.shapley.step(
        setting.model_fn, setting.params, setting.train, setting.val_sets, **options
    )


def game(setting: Setting, lr: float, samples: tuple[int, ...], name: str) -> float:
    """What a step of SGD on some of the samples changes a validation loss by."""
    grads = setting.weighted_grad(list(samples), WEIGHT)
    changes = {k: -lr * g for k, g in grads.items()}
    return setting.val_loss(name, changes) - setting.val_loss(name, zeros_like(setting.params))


def leave_one_out(setting: Setting, lr: float, name: str) -> Tensor:
    everyone = tuple(range(5))
    whole = game(setting, lr, everyone, name)
    rest = [game(setting, lr, tuple(j for j in everyone if j != i), name) for i in everyone]
    return torch.tensor([whole - x for x in rest], dtype=torch.float64)


def shapley_values(setting: Setting, lr: float, name: str) -> Tensor:
    """By definition: over all coalitions of the five samples."""
    n, values = 5, torch.zeros(5, dtype=torch.float64)
    worth = {
        s: game(setting, lr, s, name)
        for size in range(n + 1)
        for s in itertools.combinations(range(n), size)
    }
    for s, total in worth.items():
        for i in s:
            share = math.factorial(len(s) - 1) * math.factorial(n - len(s)) / math.factorial(n)
            values[i] += share * (total - worth[tuple(j for j in s if j != i)])
    return values


def slope(errors: dict[float, float]) -> float:
    (lr1, e1), (lr2, e2) = errors.items()
    return math.log(e1 / e2) / math.log(lr1 / lr2)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("case", ["mlp", "nanogpt"])
def test_first_order_error_falls_as_lr(case: str) -> None:
    setting = Setting(case)
    errors = {}
    for lr in (0.008, 0.002):
        values = step(setting, optimizer=gf.shapley.sgd(lr=lr)).values
        errors[lr] = relative(values[:, 0], leave_one_out(setting, lr, "a"))
    assert 0.8 < slope(errors) < 1.2
    assert errors[0.002] < 0.03


@pytest.mark.parametrize("case", ["mlp", "nanogpt"])
def test_second_order_error_falls_as_lr_squared(case: str) -> None:
    """Against Shapley values by definition; and to second order those are the mean of removing a
    sample from all and adding it to none."""
    setting = Setting(case)
    to_shapley, to_mean, first = {}, {}, {}
    for lr in (0.008, 0.002):
        optimizer = gf.shapley.sgd(lr=lr)
        values = step(setting, optimizer=optimizer, order=2).values
        alone = torch.tensor([game(setting, lr, (i,), "b") for i in range(5)])
        exact = shapley_values(setting, lr, "b")
        to_shapley[lr] = relative(values[:, 1], exact)
        to_mean[lr] = relative(values[:, 1], (leave_one_out(setting, lr, "b") + alone) / 2)
        first[lr] = relative(step(setting, optimizer=optimizer).values[:, 1], exact)
    assert 1.8 < slope(to_shapley) < 2.2
    assert 1.8 < slope(to_mean) < 2.2
    assert 0.8 < slope(first) < 1.2
    assert to_shapley[0.002] < 0.1 * first[0.002]


OPTIMIZERS = {
    "sgd": lambda p, lr: gf.shapley.sgd(lr=lr),
    "momentum": lambda p, lr: gf.shapley.sgd(
        lr=lr,
        momentum=0.9,
        dampening=0.2,
        weight_decay=0.1,
        momentum_buffer={k: 0.05 * x.cos() for k, x in p.items()},
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_values_sum_to_the_change_of_the_loss(optimizer: str) -> None:
    """To second order: what is left falls as lr cubed."""
    setting = Setting("nanogpt")
    for name, column in (("a", 0), ("b", 1)):
        errors = {}
        for lr in (0.008, 0.002):
            rule = OPTIMIZERS[optimizer](setting.params, lr)
            out = step(setting, optimizer=rule, order=2)
            ends = [out.grads, zeros_like(setting.params)]
            after, without = (setting.val_loss(name, rule.update(g, setting.params)) for g in ends)
            errors[lr] = abs(float(out.values[:, column].sum()) - (after - without))
        assert 2.7 < slope(errors) < 3.3


@pytest.mark.parametrize("how", ["forward", "reverse"])
@pytest.mark.parametrize("case", ["nanogpt", "padded_embedding", "lora", "table_and_head"])
def test_second_order_is_the_formula(case: str, how: str) -> None:
    """Against the Hessian by plain autograd and materialized gradients."""
    setting, lr = Setting(case), 0.3
    out = step(setting, optimizer=gf.shapley.sgd(lr=lr), order=2, hvp=how)
    grads = setting.weighted_grad(list(range(5)), WEIGHT)
    assert_close(out.grads, grads, 1e-10)
    us = {}
    for name, val in setting.val_sets.items():
        leaves = {k: x.clone().requires_grad_() for k, x in setting.params.items()}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = setting.model_fn(leaves, val).mean()
            u = torch.autograd.grad(
                loss, list(leaves.values()), create_graph=True, materialize_grads=True
            )
            along = sum((x * grads[k]).sum() for k, x in zip(leaves, u, strict=True))
            product = torch.autograd.grad(along, list(leaves.values()), materialize_grads=True)
        us[name] = {
            k: -lr * x.detach() + lr**2 / 2 * y for k, x, y in zip(leaves, u, product, strict=True)
        }
    assert_close(out.values, dense_values(setting, us, WEIGHT), 1e-9)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("form", ["exact", "previous_state"])
def test_ways_of_computing_agree(order: int, form: str) -> None:
    """Factors kept or a second pass; one batch or micro-batches; losses scaled or not."""
    setting = Setting("nanogpt")
    moments = {
        "exp_avg": {k: 0.01 * x.sin() for k, x in setting.params.items()},
        "exp_avg_sq": {k: 0.01 * x.square() for k, x in setting.params.items()},
    }
    optimizer = gf.shapley.clipped(gf.shapley.adamw(lr=0.01, step=3, **moments), max_norm=0.5)
    options = {"optimizer": optimizer, "order": order, "form": form}
    if (order, form) == (2, "previous_state"):
        with pytest.raises(gf.OptionError, match="exact"):
            step(setting, **options)
        return
    out = step(setting, **options)
    again = step(setting, **options, keep_factors=False)
    assert_close(again.values, out.values, 1e-10)
    scaled = step(setting, **options, loss_scale=2.0**16)
    assert torch.equal(scaled.values, out.values)
    assert all(torch.equal(scaled.grads[k], g) for k, g in out.grads.items())

    us = gf.shapley.directions(
        setting.model_fn,
        setting.params,
        setting.val_sets,
        optimizer=optimizer,
        order=order,
        grads=out.grads if form == "exact" else None,
    )
    columns = []
    for part in setting.train.split(2):
        dots = {name: gf.Dot(u) for name, u in us.items()}
        read = gf.ghost_vjp(setting.model_fn, setting.params, part, dots).values
        columns.append(torch.stack([WEIGHT * sum(v.values()) for v in read.values()], dim=1))
    assert_close(torch.cat(columns), out.values, 1e-10)


def test_an_op_without_forward_mode() -> None:
    setting = Setting("weight_norm")
    options = {"optimizer": gf.shapley.sgd(lr=0.1), "order": 2}
    with pytest.raises(gf.TransformError, match=r"hvp=.reverse.*_weight_norm_interface"):
        step(setting, **options)
    step(setting, **options, hvp="reverse")


def test_micro_batches_give_the_scores_of_the_batch() -> None:
    setting = Setting("nanogpt")
    whole = step(setting, optimizer=gf.shapley.sgd(lr=0.1))
    parts = [
        gf.shapley.step(
            setting.model_fn,
            setting.params,
            part,
            setting.val_sets,
            optimizer=gf.shapley.sgd(lr=0.1),
            weight=WEIGHT,
        )
        for part in setting.train.split(2)
    ]
    assert_close(torch.cat([p.values for p in parts]), whole.values, 1e-10)
    summed = {k: sum(p.grads[k] for p in parts) for k in setting.params}
    assert_close(summed, whole.grads, 1e-10)


def test_sgd_is_the_plain_score() -> None:
    setting = Setting("tied_lm")
    values = step(setting, optimizer=gf.shapley.sgd(lr=0.1)).values
    plain = [
        gf.ghost_dot_prod(setting.model_fn, setting.params, setting.train, val)
        for val in setting.val_sets.values()
    ]
    assert_close(values, torch.stack(plain, 1) * -0.1 / 5, 1e-12)


def test_a_sample_that_is_in_the_validation_set_helps() -> None:
    """The sign: it lowers the loss, so its value is negative."""
    setting = Setting("mlp", n=1)
    out = gf.shapley.step(
        setting.model_fn,
        setting.params,
        setting.train,
        {"itself": setting.train},
        optimizer=gf.shapley.sgd(lr=0.1),
    )
    assert float(out.values) < 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"order": 3}, "Use one of: 1, 2"),
        ({"form": "approximate"}, "'exact', 'previous_state'"),
        ({"order": 2, "hvp": "backward"}, "'forward', 'reverse'"),
    ],
)
def test_unknown_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(gf.OptionError, match=said):
        step(Setting("mlp"), optimizer=gf.shapley.sgd(lr=0.1), **options)


@pytest.mark.parametrize("val_sets", [{}, torch.ones(2, 4)])
def test_validation_sets_have_names(val_sets: Any) -> None:
    setting = Setting("mlp")
    setting.val_sets = val_sets
    with pytest.raises(gf.OptionError, match="dict from names to batches"):
        step(setting, optimizer=gf.shapley.sgd(lr=0.1))


def test_second_order_under_autocast() -> None:
    """By plain autograd twice; torch's transforms do not go together with autocast."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.GELU(), torch.nn.Linear(6, 3)
    )
    sets = [(torch.randn(n, 4), torch.randint(0, 3, (n,))) for n in (5, 2)]

    def losses(module: torch.nn.Module, batch: Any) -> Tensor:
        x, y = batch
        with torch.autocast("cpu", torch.bfloat16):
            logits = module(x)
        return torch.nn.functional.cross_entropy(logits.float(), y, reduction="none")

    model_fn, params = gf.from_module(model, losses)
    train, val = sets
    options: dict[str, Any] = {"optimizer": gf.shapley.sgd(lr=0.3), "order": 2}
    out = gf.shapley.step(model_fn, params, train, {"": val}, **options, hvp="reverse")
    weights = list(model.parameters())
    g = [torch.autograd.grad(x / 5, weights, retain_graph=True) for x in losses(model, train)]
    total = [sum(column) for column in zip(*g, strict=True)]
    u = torch.autograd.grad(losses(model, val).mean(), weights, create_graph=True)
    product = torch.autograd.grad(u, weights, total)
    rows = zip(u, product, strict=True)
    along = [-0.3 * (a.detach() - 0.3 * b / 2) for a, b in rows]
    want = [sum((a * b).sum() for a, b in zip(row, along, strict=True)) for row in g]
    assert_close(out.values[:, 0], torch.stack(want), 0.02)


def test_a_step_of_no_weight_is_refused() -> None:
    with pytest.raises(gf.OptionError, match="weight=0: such a step trains on nothing"):
        step(Setting("mlp"), optimizer=gf.shapley.sgd(lr=0.1), weight=0.0)
