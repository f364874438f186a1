"""Optimizers as pure functions: the same steps as `torch.optim`, and their derivatives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import assert_close
from shapley_problems import network
from torch import Tensor

import ghostfunc as gf

optim = torch.optim
SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
Make = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "decay": lambda p: SGD(p, lr=0.1, weight_decay=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "maximize": lambda p: SGD(p, lr=0.1, momentum=0.9, maximize=True),
    "adam": lambda p: Adam(p, lr=0.01),
    "adam_decay": lambda p: Adam(
        p, lr=torch.tensor(0.01).double(), weight_decay=0.1, betas=(0.8, 0.9)
    ),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, eps=1e-4, maximize=True),
    "amsgrad": lambda p: Adam(p, lr=0.01, amsgrad=True, eps=1e-4),
    "adamax": lambda p: optim.Adamax(p, lr=0.01, weight_decay=0.1, maximize=True),
    "nadam": lambda p: optim.NAdam(p, lr=0.01, eps=1e-4),
    "nadam_decoupled": lambda p: optim.NAdam(
        p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "radam": lambda p: optim.RAdam(p, lr=0.01, betas=(0.8, 0.6), eps=1e-4),
    "radam_momentum": lambda p: optim.RAdam(p, lr=0.01, weight_decay=0.1, maximize=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, eps=1e-4),
    "rmsprop_centered": lambda p: optim.RMSprop(
        p, lr=0.01, centered=True, momentum=0.9, weight_decay=0.1
    ),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.1),
    "adadelta": lambda p: optim.Adadelta(p, weight_decay=0.1, maximize=True),
    "asgd": lambda p: optim.ASGD(p, lr=0.1, lambd=0.01, weight_decay=0.1),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.1, weight_decay=0.1),
}


def groups(module: Any) -> list[dict[str, Any]]:
    """Two groups with settings of their own."""
    first, *rest = module.parameters()
    return [{"params": [first], "lr": 0.3, "weight_decay": 0.2}, {"params": rest}]


def train(module: Any, optimizer: torch.optim.Optimizer, loss: Any, draw: Any, steps: int) -> None:
    for seed in range(steps):
        optimizer.zero_grad()
        loss(module, draw(6, seed)).mean().backward()
        optimizer.step()


def gradient(module: Any, loss: Any, batch: Any) -> dict[str, Tensor]:
    model_fn, params = gf.from_module(module, loss)
    return gf.direction(model_fn, params, batch)


def real_change(
    module: Any, optimizer: torch.optim.Optimizer, grads: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What a step of the real optimizer with these gradients adds."""
    module, optimizer = copy.deepcopy((module, optimizer))
    before = {k: p.detach().clone() for k, p in module.named_parameters()}
    for k, p in module.named_parameters():
        p.grad = grads[k].clone()
    optimizer.step()
    return {k: p.detach() - before[k] for k, p in module.named_parameters()}


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_and_derivatives_are_those_of_torch(name: str, steps: int) -> None:
    """The derivative against differences of real steps."""
    module, loss, draw = network()
    optimizer = OPTIMIZERS[name](groups(module))
    train(module, optimizer, loss, draw, steps)
    pure = gf.shapley.from_optimizer(optimizer, module)
    params = gf.from_module(module, loss)[1]
    grads = gradient(module, loss, draw(6, 9))
    assert_close(pure.update(grads, params), real_change(module, optimizer, grads), 1e-12)

    u, h = gradient(module, loss, draw(4, 10)), 1e-7
    along = gradient(module, loss, draw(2, 11))
    ends = [
        real_change(module, optimizer, {k: g + s * h * along[k] for k, g in grads.items()})
        for s in (1, -1)
    ]
    expected = sum(((ends[0][k] - ends[1][k]) * u[k]).sum() for k in u) / (2 * h)
    pulled = pure.pull_back(grads, params, u)
    got = sum((pulled[k] * along[k]).sum() for k in u)
    size = sum((pulled[k].abs() * along[k].abs()).sum() for k in u)
    # At Adam's first step the derivative is next to nothing: differences cancel.
    assert abs(float(got - expected)) < 1e-5 * float(size) + 1e-9


MUON = vars(optim).get("Muon")  # from torch 2.9 on


@pytest.mark.skipif(MUON is None, reason="this torch has no Muon")
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon(nesterov: bool) -> None:
    """Its steps are rounded to bfloat16 in torch: the derivative is that of what is rounded."""
    torch.manual_seed(0)
    module = torch.nn.ModuleList(torch.nn.Linear(*s, bias=False) for s in ((3, 5), (5, 3)))
    assert MUON is not None
    optimizer = MUON(module.double().parameters(), lr=0.1, nesterov=nesterov)
    params = {k: p.detach() for k, p in module.named_parameters()}
    grads, along, u = ({k: torch.randn_like(p) for k, p in params.items()} for _ in range(3))
    for k, p in module.named_parameters():
        p.grad = grads[k].flip(0)
    optimizer.step()
    pure = gf.shapley.from_optimizer(optimizer, module)
    assert not pure.elementwise
    assert_close(pure.update(grads, params), real_change(module, optimizer, grads), 1e-12)
    ends = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Tensor, "bfloat16", lambda x: x.clone())
        for h in (1e-5, -1e-5):
            moved = {k: g + h * along[k] for k, g in grads.items()}
            ends.append(real_change(module, optimizer, moved))
    want = sum(((ends[0][k] - ends[1][k]) * u[k]).sum() for k in u) / 2e-5
    pulled = pure.pull_back(grads, params, u)
    got = sum((pulled[k] * along[k]).sum() for k in u)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_groups_by_name_and_the_state_of_a_checkpoint() -> None:
    """What transformers writes as `optimizer.pt`, loaded into an optimizer of named parameters."""
    module, loss, draw = network()
    named = list(module.named_parameters())
    by_name = [{"params": named[:1], "lr": 0.3}, {"params": named[1:], "weight_decay": 0.0}]
    optimizer = AdamW(by_name, lr=0.01)
    train(module, optimizer, loss, draw, 2)
    other = AdamW(by_name, lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    params, grads = gf.from_module(module, loss)[1], gradient(module, loss, draw(6, 9))
    got = gf.shapley.from_optimizer(other, module).update(grads, params)
    assert_close(got, real_change(module, optimizer, grads), 1e-12)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_written_out_and_read_from_torch_agree(name: str) -> None:
    module, loss, draw = network()
    make, settings = {
        "sgd": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        "adam": (Adam, {"lr": 0.01, "weight_decay": 0.1}),
        "adamw": (AdamW, {"lr": 0.01, "betas": (0.8, 0.9)}),
    }[name]
    optimizer = make(module.parameters(), **settings)
    train(module, optimizer, loss, draw, 2)
    held = {k: optimizer.state[p] for k, p in module.named_parameters()}
    keys = ("momentum_buffer",) if name == "sgd" else ("exp_avg", "exp_avg_sq")
    state: dict[str, Any] = {key: {k: x[key] for k, x in held.items()} for key in keys}
    if name != "sgd":
        state["step"] = 2
    written = {"sgd": gf.shapley.sgd, "adam": gf.shapley.adam, "adamw": gf.shapley.adamw}[name]
    params, grads = gf.from_module(module, loss)[1], gradient(module, loss, draw(6, 9))
    pure, read = written(**settings, **state), gf.shapley.from_optimizer(optimizer, module)
    assert_close(pure.update(grads, params), read.update(grads, params), 1e-14)
    assert (pure.linear, pure.gain) == (read.linear, read.gain)


def test_an_entry_without_any_gradient_does_not_move() -> None:
    """Adam's formula has no derivative there."""
    module, loss, draw = network()
    params, grads = gf.from_module(module, loss)[1], gradient(module, loss, draw(6, 0))
    grads["0.weight"][0] = 0.0
    zeros = {k: torch.zeros_like(x) for k, x in params.items()}
    optimizer = gf.shapley.adam(lr=0.1, exp_avg=zeros, exp_avg_sq=zeros, step=0)
    pulled = optimizer.pull_back(grads, params, params)
    assert all(bool(x.isfinite().all()) for x in pulled.values())
    assert not pulled["0.weight"][0].any()
    assert pulled["0.weight"][1:].any()


SIZED: dict[str, Make] = {
    "amsgrad": lambda p: Adam(p, lr=0.1, amsgrad=True),
    "adamax": lambda p: optim.Adamax(p, lr=0.1),
    "nadam": lambda p: optim.NAdam(p, lr=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.1, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.1),
    **({} if MUON is None else {"muon": lambda p: MUON(p, lr=0.1)}),
}
"""Optimizers that divide by a running size of the gradient."""


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", SIZED)
def test_no_step_divides_by_a_size_that_is_zero(name: str, steps: int) -> None:
    """Values would be those of samples divided by eps, and outweigh all others of a run."""
    torch.manual_seed(0)
    module = torch.nn.ModuleList(torch.nn.Linear(3, 5, bias=False) for _ in range(2)).double()
    optimizer = SIZED[name](module.parameters())
    met, never = (p for p in module.parameters())
    for _ in range(steps):
        met.grad, never.grad = torch.randn_like(met), torch.zeros_like(never)
        if name != "muon":
            met.grad[0] = 0
        optimizer.step()
    pure = gf.shapley.from_optimizer(optimizer, module)
    params = {k: p.detach() for k, p in module.named_parameters()}
    zeros = {k: torch.zeros_like(p) for k, p in params.items()}
    u = {k: torch.ones_like(p) for k, p in params.items()}
    first, second = pure.pull_back(zeros, params, u).values()
    assert not second.any()
    assert first.isfinite().all()
    assert bool(first[1:].any()) == bool(steps)
    if name != "muon":
        assert not first[0].any()


@pytest.mark.parametrize("max_norm", [0.01, 100.0])
def test_clipping_is_that_of_torch(max_norm: float) -> None:
    module, loss, draw = network()
    optimizer = SGD(module.parameters(), lr=0.1)
    params, grads = gf.from_module(module, loss)[1], gradient(module, loss, draw(6, 0))
    pure = gf.shapley.clipped(gf.shapley.from_optimizer(optimizer, module), max_norm=max_norm)
    gf.accumulate_grads(module, grads)
    torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm)
    short = {k: p.grad for k, p in module.named_parameters()}
    assert_close(pure.update(grads, params), {k: -0.1 * g for k, g in short.items()}, 1e-12)

    u, h = gradient(module, loss, draw(4, 10)), 1e-6
    pulled = pure.pull_back(grads, params, u)
    ends = [
        pure.update({k: g + s * h * params[k] for k, g in grads.items()}, params) for s in (1, -1)
    ]
    expected = sum(((ends[0][k] - ends[1][k]) * u[k]).sum() for k in u) / (2 * h)
    torch.testing.assert_close(
        sum((pulled[k] * params[k]).sum() for k in u), expected, rtol=1e-6, atol=0
    )
    at_zero = pure.pull_back({k: torch.zeros_like(g) for k, g in grads.items()}, params, u)
    assert_close(at_zero, {k: -0.1 * x for k, x in u.items()}, 1e-12)


def test_an_update_of_ones_own() -> None:
    """Sign descent with a softened sign, against differences of its own steps."""
    module, loss, draw = network()
    model_fn, params = gf.from_module(module, loss)

    def update(grads: dict[str, Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: -0.1 * torch.tanh(20 * g) for k, g in grads.items()}

    train_batch, val = draw(6, 0), draw(4, 1)
    optimizer = gf.shapley.Optimizer(update)
    out = gf.shapley.step(model_fn, params, train_batch, {"val": val}, optimizer=optimizer)
    rows, u = (
        gf.per_sample_grads(model_fn, params, train_batch),
        gf.direction(model_fn, params, val),
    )
    for i in range(6):
        slope = {
            k: (
                update({k: out.grads[k] + 1e-6 * rows[k][i]}, params)[k]
                - update({k: out.grads[k] - 1e-6 * rows[k][i]}, params)[k]
            )
            / 2e-6
            for k in params
        }
        expected = sum((slope[k] * u[k]).sum() for k in u) / 6
        torch.testing.assert_close(out.values[i, 0], expected, rtol=1e-6, atol=1e-12)


def test_what_from_optimizer_refuses() -> None:
    module = network()[0]
    refused = {
        "Rprop has no derivative.* signs": optim.Rprop,
        "LBFGS has no derivative.* evaluates the loss several times": optim.LBFGS,
        "SparseAdam has no derivative.* use Adam": lambda p: optim.SparseAdam(list(p)),
        "knows those of torch.optim .*Lion": type("Lion", (SGD,), {}),
        "AdamW8bit keeps its moments in a few bits": type("AdamW8bit", (AdamW,), {}),
    }
    known = {x for x in vars(optim).values() if isinstance(x, type) and x is not optim.Optimizer}
    read = {type(make([torch.zeros(2, 2)])) for make in OPTIMIZERS.values()} | {MUON} - {None}
    assert known == read | {optim.Rprop, optim.LBFGS, optim.SparseAdam}  # every one of torch's
    for said, make in refused.items():
        with pytest.raises(gf.OptionError, match=said):
            gf.shapley.from_optimizer(make(module.parameters()), module)
    with pytest.raises(gf.ParamsError, match=r"'2\.weight' .* not in the optimizer"):
        gf.shapley.from_optimizer(SGD(module[0].parameters(), lr=0.1), module)
    with pytest.raises(gf.OptionError, match="step=-1"):
        gf.shapley.adam(lr=0.1, exp_avg={}, exp_avg_sq={}, step=-1)
    with pytest.raises(gf.OptionError, match="must be a positive number"):
        gf.shapley.clipped(gf.shapley.sgd(lr=0.1), max_norm=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nesterov": True}, "nesterov=True needs a momentum and no dampening"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "and no dampening"),
        ({"momentum_buffer": {"w": torch.zeros(1)}}, "momentum_buffer without a momentum"),
    ],
)
def test_what_sgd_of_torch_refuses(options: dict[str, Any], said: str) -> None:
    with pytest.raises(gf.OptionError, match=said):
        gf.shapley.sgd(lr=0.1, **options)


def zeros_like(params: Any, shape: tuple[int, ...] = ()) -> dict[str, Tensor]:
    return {k: torch.zeros(shape or x.shape).double() for k, x in params.items()}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: {"exp_avg": zeros_like(p, (1,))}, "exp_avg leaf '0.bias' must have the shape"),
        (lambda p: {"exp_avg_sq": {"0.bias": torch.zeros(5)}}, "exp_avg_sq must be a pytree like"),
        (lambda p: {"exp_avg_sq": {k: x - 1 for k, x in zeros_like(p).items()}}, "NaN or infinite"),
        (lambda p: {"exp_avg_sq": {k: x / 0 for k, x in zeros_like(p).items()}}, "NaN or infinite"),
    ],
)
def test_states_that_are_none_of_these_parameters(make: Any, said: str) -> None:
    """A state that broadcasts would give other numbers, one of NaN would give zeros."""
    module, loss, draw = network()
    model_fn, params = gf.from_module(module, loss)
    state = {"exp_avg": zeros_like(params), "exp_avg_sq": zeros_like(params), **make(params)}
    optimizer = gf.shapley.adam(lr=0.1, step=1, **state)
    with pytest.raises(gf.ParamsError, match=said):
        gf.shapley.step(model_fn, params, draw(4, 0), {"v": draw(2, 1)}, optimizer=optimizer)


@pytest.mark.parametrize(
    "update",
    [
        lambda g, p: None,
        lambda g, p: {"x": 1},
        lambda g, p: {k: x.sum() for k, x in g.items()},
        lambda g, p: {k: x[None] for k, x in g.items()},
    ],
)
def test_changes_are_like_params(update: Any) -> None:
    module, loss, draw = network()
    model_fn, params = gf.from_module(module, loss)
    with pytest.raises(gf.ParamsError, match=r"what optimizer\.update returned"):
        gf.shapley.step(
            model_fn,
            params,
            draw(4, 0),
            {"v": draw(2, 1)},
            optimizer=gf.shapley.Optimizer(update),
        )


def test_an_optimizer_of_other_parameters() -> None:
    module, loss, draw = network()
    model_fn, params = gf.from_module(module, loss)
    other = torch.nn.Linear(2, 2)
    optimizer = gf.shapley.from_optimizer(Adam(other.parameters()), other)
    with pytest.raises(gf.ParamsError, match="of the parameters weight, bias of a Linear"):
        gf.shapley.step(model_fn, params, draw(4, 0), {"v": draw(2, 1)}, optimizer=optimizer)
