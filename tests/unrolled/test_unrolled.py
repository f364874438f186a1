"""Metagradients against finite differences of whole trainings, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghostfunc as gf
from ghostfunc.unrolled import Micro, Optimizer, Training, UnrolledError

Params = dict[str, Tensor]
SAMPLES, STEPS, BATCH = 12, 30, 4


def model(p: Params, b: Any) -> Tensor:
    h = torch.tanh(F.linear(b["x"], p["w"], p["b"]))
    return F.cross_entropy(F.linear(h, p["v"]), b["y"], reduction="none")


def draw_params() -> Params:
    shapes = {"b": (4,), "v": (3, 4), "w": (4, 5)}
    return {k: 0.7 * torch.randn(s, dtype=torch.float64) for k, s in shapes.items()}


def draw(n: int) -> dict[str, Tensor]:
    return {"x": torch.randn(n, 5, dtype=torch.float64), "y": torch.randint(3, (n,))}


def take(data: dict[str, Tensor], ids: Tensor) -> Micro:
    return Micro(ids, {k: x[ids] for k, x in data.items()})


def draw_steps(data: dict[str, Tensor], count: int = STEPS) -> list[Micro]:
    g = torch.Generator().manual_seed(1)
    return [take(data, torch.randperm(SAMPLES, generator=g)[:BATCH]) for _ in range(count)]


def warmed(step: int) -> float:
    """A warm-up and a cosine."""
    return 0.05 * min(1, (step + 1) / 5) * (1 + math.cos(math.pi * step / STEPS)) / 2


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": gf.unrolled.sgd(lr=0.2, weight_decay=0.01),
    "momentum": gf.unrolled.sgd(lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "nesterov": gf.unrolled.sgd(lr=warmed, momentum=0.8, nesterov=True),
    "adam": gf.unrolled.adam(lr=0.02, eps=1e-4, weight_decay=0.02),
    "adamw": gf.unrolled.adamw(lr=warmed, eps=1e-4, weight_decay=0.1),
    "clipped adam": gf.unrolled.clipped(gf.unrolled.adam(lr=0.02, eps=1e-4), max_norm=0.4),
}


def final_loss(
    params: Params,
    steps: Sequence[Any],
    optimizer: Optimizer,
    val: Any,
    weights: Tensor,
    **rest: Any,
) -> float:
    """Of a whole training with these weights of the samples."""
    training = Training(
        rest.pop("model_fn", model), params, steps, optimizer=optimizer, weights=weights, **rest
    )
    trained = gf.unrolled.train(training, keep_every=len(steps))
    return float(training.model_fn(trained.params, val).mean())


def finite_differences(ids: Sequence[int], *args: Any, **rest: Any) -> Tensor:
    out, h = [], 1e-4
    for i in ids:
        at = []
        for sign in (1, -1):
            weights = torch.ones(SAMPLES, dtype=torch.float64)
            weights[i] += sign * h
            at.append(final_loss(*args, weights, **rest))
        out.append((at[0] - at[1]) / (2 * h))
    return torch.tensor(out, dtype=torch.float64)


def assert_equal(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"off by {error:.1e}"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_finite_differences_of_retraining(name: str) -> None:
    params, data, val = draw_params(), draw(SAMPLES), draw(6)
    steps, optimizer = draw_steps(data), OPTIMIZERS[name]
    training = Training(model, params, steps, optimizer=optimizer)
    trained = gf.unrolled.train(training, keep_every=7)
    made = gf.unrolled.metagradients(trained, val)
    ids = [0, 3, 7, 11]
    expected = finite_differences(ids, params, steps, optimizer, val)
    assert_equal(made.scores.values[ids, 0], expected)
    assert float(made.losses) == pytest.approx(float(model(trained.params, val).mean()))


def test_the_derivative_by_one_step_and_by_the_initial_parameters() -> None:
    params, data, val = draw_params(), draw(SAMPLES), draw(6)
    steps, optimizer = draw_steps(data, 8), OPTIMIZERS["adam"]

    def loss(p: Params, c: Tensor) -> float:
        """`c` are the weights of the samples of step 2 alone."""
        ids = torch.cat([m.ids for m in steps])
        at = torch.arange(len(ids))  # every sample of every step by itself
        pieces = [Micro(x, m.batch) for x, m in zip(at.split(BATCH), steps, strict=True)]
        weights = torch.ones(len(ids), dtype=torch.float64)
        weights[2 * BATCH : 3 * BATCH] = c
        training = Training(model, p, pieces, optimizer=optimizer, weights=weights)
        return float(model(gf.unrolled.train(training, keep_every=8).params, val).mean())

    trained = gf.unrolled.train(Training(model, params, steps, optimizer=optimizer), keep_every=3)
    made = gf.unrolled.metagradients(trained, val)
    ones, h = torch.ones(BATCH, dtype=torch.float64), 1e-4
    eye = torch.eye(BATCH, dtype=torch.float64)
    expected = [(loss(params, ones + h * e) - loss(params, ones - h * e)) / (2 * h) for e in eye]
    assert_equal(made.steps[2].values[:, 0], torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(made.steps[2].ids, steps[2].ids)
    u = {k: torch.randn_like(x) for k, x in params.items()}
    up, down = ({k: x + s * h * u[k] for k, x in params.items()} for s in (1, -1))
    slope = (loss(up, ones) - loss(down, ones)) / (2 * h)
    found = sum(float((made.params[k][0] * u[k]).sum()) for k in u)
    assert found == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("options", [{"vectorize": False}, {"hvp": "reverse"}, {}], ids=str)
def test_every_query_has_its_own(options: dict[str, Any]) -> None:
    params, data, val = draw_params(), draw(SAMPLES), draw(3)
    training = Training(model, params, draw_steps(data, 9), optimizer=OPTIMIZERS["adamw"])
    trained = gf.unrolled.train(training, keep_every=4)
    each = gf.unrolled.metagradients(trained, val, reduction="none", **options)
    mean = gf.unrolled.metagradients(trained, val)
    assert each.scores.values.shape == (SAMPLES, 3)
    torch.testing.assert_close(each.scores.values.mean(1), mean.scores.values[:, 0])
    for j in range(3):
        one = {k: x[j : j + 1] for k, x in val.items()}
        alone = gf.unrolled.metagradients(trained, one)
        torch.testing.assert_close(each.scores.values[:, j], alone.scores.values[:, 0])
    counts = torch.stack([m.ids for m in training.steps]).flatten().bincount()  # type: ignore[union-attr]
    assert torch.equal(each.scores.counts, counts)


def test_kept_states_change_nothing() -> None:
    data, val = draw(SAMPLES), draw(3)
    training = Training(model, draw_params(), draw_steps(data, 10), optimizer=OPTIMIZERS["adam"])
    made = [
        gf.unrolled.metagradients(gf.unrolled.train(training, keep_every=k), val)
        for k in (1, 3, 5, 10, 99)
    ]
    for other in made[1:]:
        assert torch.equal(other.scores.values, made[0].scores.values)


def test_micro_batches_are_the_batch() -> None:
    params, data, val = draw_params(), draw(SAMPLES), draw(3)
    whole = draw_steps(data, 8)
    parts = [[take(data, m.ids[:1]), take(data, m.ids[1:])] for m in whole]
    made = []
    for steps in (whole, parts):
        training = Training(model, params, steps, optimizer=OPTIMIZERS["clipped adam"])
        made.append(gf.unrolled.metagradients(gf.unrolled.train(training, keep_every=3), val))
    torch.testing.assert_close(made[0].scores.values, made[1].scores.values)
    assert torch.equal(made[1].steps[3].ids, whole[3].ids)


# --- models that draw random numbers ------------------------------------------------------------


def with_dropout() -> tuple[Any, Params]:
    net = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 3)).double()
    return gf.from_module(net, lambda m, b: F.cross_entropy(m(b["x"]), b["y"], reduction="none"))


def test_dropout_is_replayed() -> None:
    model_fn, params = with_dropout()
    data, val = draw(SAMPLES), draw(4)
    steps, optimizer = draw_steps(data, 10), OPTIMIZERS["adam"]
    before = torch.get_rng_state()
    trained, evaluated = [], model_fn.module
    for k in (2, 5):
        evaluated.train()
        training = Training(model_fn, params, steps, optimizer=optimizer, seed=3)
        trained.append(gf.unrolled.train(training, keep_every=k))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(trained[0].final.params, trained[1].final.params, strict=True):
        assert torch.equal(a, b)

    def val_fn(p: Params, b: Any) -> Tensor:
        h = torch.tanh(F.linear(b["x"], p["0.weight"], p["0.bias"]))
        z = F.linear(h, p["3.weight"], p["3.bias"])
        return F.cross_entropy(z, b["y"], reduction="none")

    made = gf.unrolled.metagradients(trained[0], val, val_fn=val_fn)
    each = gf.unrolled.metagradients(trained[0], val, val_fn=val_fn, reduction="none")
    torch.testing.assert_close(each.scores.values.mean(1), made.scores.values[:, 0])
    h, ids = 1e-4, [1, 8]
    expected = []
    for i in ids:
        ends = []
        for sign in (1, -1):
            weights = torch.ones(SAMPLES, dtype=torch.float64)
            weights[i] += sign * h
            run = Training(model_fn, params, steps, optimizer=optimizer, weights=weights, seed=3)
            final = gf.unrolled.train(run, keep_every=10)
            ends.append(float(val_fn(final.params, val).mean()))
        expected.append((ends[0] - ends[1]) / (2 * h))
    assert_equal(made.scores.values[ids, 0], torch.tensor(expected, dtype=torch.float64))
    reverse = gf.unrolled.metagradients(trained[0], val, val_fn=val_fn, hvp="reverse")
    torch.testing.assert_close(reverse.scores.values, made.scores.values)
    # Other seeds draw other numbers.
    other = gf.unrolled.train(
        Training(model_fn, params, steps, optimizer=optimizer, seed=4), keep_every=10
    )
    assert not torch.equal(other.final.params[0], trained[0].final.params[0])


def test_random_numbers_without_a_seed_are_refused() -> None:
    model_fn, params = with_dropout()
    with pytest.raises(gf.RandomnessError):
        Training(model_fn, params, draw_steps(draw(SAMPLES), 2), optimizer=OPTIMIZERS["sgd"])


# --- the optimizers are torch's -----------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_that_of_torch(name: str) -> None:
    params, data = draw_params(), draw(SAMPLES)
    steps = draw_steps(data)
    ours = gf.unrolled.train(
        Training(model, params, steps, optimizer=OPTIMIZERS[name]), keep_every=STEPS
    ).params
    theirs = {k: x.clone().requires_grad_() for k, x in params.items()}
    leaves = list(theirs.values())
    torch_optimizer: Any = {
        "sgd": lambda: torch.optim.SGD(leaves, lr=0.2, weight_decay=0.01),
        "momentum": lambda: torch.optim.SGD(
            leaves, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01
        ),
        "nesterov": lambda: torch.optim.SGD(leaves, lr=0.1, momentum=0.8, nesterov=True),
        "adam": lambda: torch.optim.Adam(leaves, lr=0.02, eps=1e-4, weight_decay=0.02),
        "adamw": lambda: torch.optim.AdamW(leaves, lr=0.1, eps=1e-4, weight_decay=0.1),
        "clipped adam": lambda: torch.optim.Adam(leaves, lr=0.02, eps=1e-4),
    }[name]()
    for t, micro in enumerate(steps):
        if name in ("nesterov", "adamw"):
            torch_optimizer.param_groups[0]["lr"] = warmed(t)
        torch_optimizer.zero_grad()
        model(theirs, micro.batch).mean().backward()
        if name == "clipped adam":
            torch.nn.utils.clip_grad_norm_(leaves, 0.4)
        torch_optimizer.step()
    for k, x in theirs.items():
        torch.testing.assert_close(ours[k], x.detach(), rtol=1e-10, atol=1e-12)


def test_a_frozen_entry_has_no_derivative_through_adam() -> None:
    """Where all gradients are zero, Adam's root has no derivative: nothing is NaN."""

    def squares(p: Params, b: Any) -> Tensor:
        return ((b["x"] * p["w"]).sum(1) - 1).square()

    data = {"x": torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)}
    steps = [take(data, torch.arange(2)) for _ in range(4)]
    params = {"w": torch.zeros(2, dtype=torch.float64)}
    training = Training(squares, params, steps, optimizer=gf.unrolled.adam(lr=0.1))
    made = gf.unrolled.metagradients(gf.unrolled.train(training, keep_every=2), data)
    assert bool(made.scores.values.isfinite().all())
    assert bool(made.scores.values.any())


# --- killed and resumed -------------------------------------------------------------------------


class Killed(Exception):
    pass


class Dying(list[Any]):
    """Steps of which so many can be had before the process is killed."""

    left = 0

    def __getitem__(self, index: Any) -> Any:
        if self.left == 0:
            raise Killed
        self.left -= 1
        return super().__getitem__(index)


def counted(steps: Sequence[Any], left: int) -> Dying:
    out = Dying(steps)
    out.left = left
    return out


@pytest.mark.parametrize("alive", [3, 7, 11])
def test_a_killed_training_goes_on(tmp_path: Path, alive: int) -> None:
    params, steps = draw_params(), draw_steps(draw(SAMPLES), 10)
    optimizer = OPTIMIZERS["adam"]
    expected = gf.unrolled.train(
        Training(model, params, steps, optimizer=optimizer), keep_every=3
    ).params
    dying = counted(steps, 10_000)
    training = Training(model, params, dying, optimizer=optimizer)
    dying.left = alive
    with pytest.raises(Killed):
        gf.unrolled.train(training, keep_every=3, directory=tmp_path)
    training = Training(model, params, steps, optimizer=optimizer)
    again = gf.unrolled.train(training, keep_every=3, directory=tmp_path)
    for k, x in expected.items():
        assert torch.equal(again.params[k], x)
    names = sorted(x.name for x in tmp_path.iterdir())
    assert names == [f"state_{t:08d}.safetensors" for t in (0, 3, 6, 9, 10)]


@pytest.mark.parametrize("alive", [3, 12, 25])
def test_killed_metagradients_go_on(tmp_path: Path, alive: int) -> None:
    params, val = draw_params(), draw(3)
    dying = counted(draw_steps(draw(SAMPLES), 10), 10_000)
    training = Training(model, params, dying, optimizer=OPTIMIZERS["adam"])
    trained = gf.unrolled.train(training, keep_every=3, directory=tmp_path / "states")
    expected = gf.unrolled.metagradients(trained, val)
    options: Any = {"checkpoint": tmp_path / "adjoint"}
    dying.left = alive
    with pytest.raises(Killed):
        gf.unrolled.metagradients(trained, val, **options)
    dying.left = 10_000
    made = gf.unrolled.metagradients(trained, val, **options)
    spent = 10_000 - dying.left
    assert torch.equal(made.scores.values, expected.scores.values)
    assert all(torch.equal(x, made.params[k]) for k, x in expected.params.items())
    dying.left = 10_000
    gf.unrolled.metagradients(trained, val, **options)  # all of it was kept
    assert 10_000 - dying.left < spent
    with pytest.raises(UnrolledError, match="belongs to other metagradients: it differs in obj"):
        gf.unrolled.metagradients(trained, draw(3), **options)


def test_states_of_another_run_are_refused(tmp_path: Path) -> None:
    params, data = draw_params(), draw(SAMPLES)
    steps = draw_steps(data, 4)
    options: Any = {"keep_every": 2, "directory": tmp_path}
    gf.unrolled.train(Training(model, params, steps, optimizer=OPTIMIZERS["adam"]), **options)
    others = {
        "optimizer": Training(model, params, steps, optimizer=OPTIMIZERS["sgd"]),
        "params": Training(model, draw_params(), steps, optimizer=OPTIMIZERS["adam"]),
        "data": Training(model, params, steps[::-1], optimizer=OPTIMIZERS["adam"]),
        "weights": Training(
            model, params, steps, optimizer=OPTIMIZERS["adam"], weights=torch.ones(SAMPLES)
        ),
        "seed": Training(model, params, steps, optimizer=OPTIMIZERS["adam"], seed=1),
    }
    for named, training in others.items():
        with pytest.raises(UnrolledError, match=f"belongs to another run: it differs in {named}"):
            gf.unrolled.train(training, **options)


def test_states_of_another_loss_are_refused(tmp_path: Path) -> None:
    """Also where only their values tell: of functions nobody can see what they close over."""
    params, steps = draw_params(), draw_steps(draw(SAMPLES), 4)
    options: Any = {"keep_every": 2, "directory": tmp_path}
    gf.unrolled.train(Training(model, params, steps, optimizer=OPTIMIZERS["adam"]), **options)

    def other(p: Params, b: Any) -> Tensor:
        return 2 * model(p, b)

    with pytest.raises(UnrolledError, match="belongs to another run: it differs in losses"):
        gf.unrolled.train(Training(other, params, steps, optimizer=OPTIMIZERS["adam"]), **options)


def test_a_replay_leads_where_training_went() -> None:
    """What changed in between is told, not differentiated."""
    net = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 3)).double()
    net.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def losses(module: nn.Module, b: Any) -> Tensor:
        return F.cross_entropy(module(b["x"]) * module.scale, b["y"], reduction="none")

    fn, params = gf.from_module(net, losses)
    data, val = draw(SAMPLES), draw(6)
    steps, rate = draw_steps(data, 6), [0.1]
    training = Training(
        fn, params, steps, optimizer=gf.unrolled.sgd(lr=lambda t: rate[0], momentum=0.5), seed=1
    )
    trained = gf.unrolled.train(training, keep_every=4)
    ask = gf.unrolled.metagradients
    with pytest.raises(gf.RandomnessError, match="losses of val draw random numbers"):
        ask(trained, val)
    steady: Any = {"val_fn": model_like(params)}
    expected = ask(trained, val, **steady).scores.values
    said = "do not lead to the state that was kept after them"
    for change, back in (
        (net.eval, net.train),
        (lambda: net.scale.mul_(2), lambda: net.scale.div_(2)),
        (lambda: rate.__setitem__(0, 0.2), lambda: rate.__setitem__(0, 0.1)),
        (lambda: steps.reverse(), lambda: steps.reverse()),
    ):
        change()
        with pytest.raises(UnrolledError, match=said):
            ask(trained, val, **steady)
        back()
    assert torch.equal(ask(trained, val, **steady).scores.values, expected)


def model_like(params: Params) -> Any:
    """The network of that test by hand, without dropout."""

    def losses(p: Params, b: Any) -> Tensor:
        h = torch.tanh(F.linear(b["x"], p["0.weight"], p["0.bias"]))
        z = F.linear(h, p["3.weight"], p["3.bias"])
        return F.cross_entropy(z, b["y"], reduction="none")

    return losses


def test_autocast_in_training_alone_is_told() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

    def losses(module: nn.Module, b: Any) -> Tensor:
        return F.cross_entropy(module(b["x"].float()), b["y"], reduction="none")

    fn, params = gf.from_module(net, losses)
    steps, val = draw_steps(draw(SAMPLES), 6), draw(6)
    training = Training(fn, params, steps, optimizer=gf.unrolled.sgd(lr=0.5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = gf.unrolled.train(training, keep_every=4)
        gf.unrolled.metagradients(trained, val)
    with pytest.raises(UnrolledError, match="autocast"):
        gf.unrolled.metagradients(trained, val)


def test_weights_are_not_rounded_to_a_parameters_dtype() -> None:
    params = {"a": torch.zeros(3, dtype=torch.bfloat16), "w": torch.randn(3, 5)}

    def losses(p: Params, b: Any) -> Tensor:
        z = F.linear(b["x"].float(), p["w"]) + p["a"].float()
        return F.cross_entropy(z, b["y"], reduction="none")

    steps, weights = draw_steps(draw(SAMPLES), 2), torch.rand(SAMPLES)
    training = Training(losses, params, steps, optimizer=OPTIMIZERS["sgd"], weights=weights)
    (shares,) = training.shares(training.micros(0))
    assert torch.equal(shares, weights[steps[0].ids] / BATCH)
    trained = gf.unrolled.train(training, keep_every=2)
    for hvp in ("forward", "reverse"):
        made = gf.unrolled.metagradients(trained, draw(4), hvp=hvp)
        assert bool(made.scores.values.isfinite().all())


def test_a_damaged_state_is_an_error(tmp_path: Path) -> None:
    steps = draw_steps(draw(SAMPLES), 4)
    training = Training(model, draw_params(), steps, optimizer=OPTIMIZERS["adam"])
    trained = gf.unrolled.train(training, keep_every=2, directory=tmp_path)
    path = tmp_path / "state_00000002.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UnrolledError, match="it was cut short"):
        gf.unrolled.metagradients(trained, draw(2))
    path.unlink()
    with pytest.raises(UnrolledError, match="the state after 2 steps is missing"):
        gf.unrolled.metagradients(trained, draw(2))


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "k"), [(9, 3), (10, 4), (6, 1), (5, 8)])
def test_memory_is_as_stated(steps: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(
        model, draw_params(), draw_steps(draw(SAMPLES), steps), optimizer=OPTIMIZERS["adam"]
    )
    trained = gf.unrolled.train(training, keep_every=k)
    assert len(trained.states._held) == -(-steps // k) + 1
    alive, most = 0, 0
    gradient = training.gradient

    class Counted(list[Tensor]):
        def __init__(self, values: list[Tensor]) -> None:
            nonlocal alive, most
            super().__init__(values)
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    monkeypatch.setattr(training, "gradient", lambda *args: Counted(gradient(*args)))
    gf.unrolled.metagradients(trained, draw(2))
    # Each gradient is held together with its state.
    assert most <= min(k, steps) + 1


# --- bad input ----------------------------------------------------------------------------------


def test_options() -> None:
    params, data = draw_params(), draw(SAMPLES)
    steps, sgd = draw_steps(data, 2), OPTIMIZERS["sgd"]
    with pytest.raises(gf.OptionError, match=r"Those of gf\.shapley hold one step's state"):
        Training(model, params, steps, optimizer=gf.shapley.sgd(lr=0.1))  # type: ignore[arg-type]
    with pytest.raises(gf.OptionError, match="a sequence of at least one step"):
        Training(model, params, [], optimizer=sgd)
    with pytest.raises(gf.OptionError, match="a sequence of at least one step"):
        Training(model, params, iter(steps), optimizer=sgd)  # type: ignore[arg-type]
    with pytest.raises(gf.OptionError, match="seed='x'"):
        Training(model, params, steps, optimizer=sgd, seed="x")  # type: ignore[arg-type]
    with pytest.raises(gf.OptionError, match="weights must be floating-point"):
        Training(model, params, steps, optimizer=sgd, weights=torch.arange(3))
    with pytest.raises(gf.BatchError, match="there are 2 weights"):
        Training(model, params, steps, optimizer=sgd, weights=torch.ones(2))
    with pytest.raises(gf.BatchError, match=r"steps\[0\] must be a gf\.unrolled\.Micro"):
        Training(model, params, [data], optimizer=sgd)  # type: ignore[list-item]
    with pytest.raises(gf.BatchError, match="must be a tensor of 12 integers"):
        Training(model, params, [Micro(torch.arange(3), data)], optimizer=sgd)
    training = Training(model, params, steps, optimizer=sgd)
    with pytest.raises(gf.OptionError, match="keep_every=0"):
        gf.unrolled.train(training, keep_every=0)
    with pytest.raises(gf.OptionError, match=r"expected what gf\.unrolled\.train returns"):
        gf.unrolled.metagradients(training, data)  # type: ignore[arg-type]
    trained = gf.unrolled.train(training, keep_every=1)
    with pytest.raises(gf.OptionError, match="reduction='sum'"):
        gf.unrolled.metagradients(trained, data, reduction="sum")  # type: ignore[arg-type]
    with pytest.raises(gf.OptionError, match="hvp='both'"):
        gf.unrolled.metagradients(trained, data, hvp="both")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: gf.unrolled.sgd(lr=0.1, momentum=-1),
        lambda: gf.unrolled.sgd(lr=0.1, nesterov=True),
        lambda: gf.unrolled.adam(lr=0.1, betas=(0.9, 1.0)),
        lambda: gf.unrolled.adamw(lr=0.1, weight_decay=-0.1),
        lambda: gf.unrolled.clipped(gf.unrolled.sgd(lr=0.1), max_norm=0),
        lambda: gf.unrolled.train(
            Training(
                model,
                draw_params(),
                draw_steps(draw(SAMPLES), 2),
                optimizer=gf.unrolled.sgd(lr=lambda t: -0.1),
            ),
            keep_every=1,
        ),
    ],
)
def test_settings_that_do_not_exist(make: Any) -> None:
    with pytest.raises(gf.OptionError):
        make()


def test_a_training_that_diverges_is_an_error() -> None:
    steps = draw_steps(draw(SAMPLES), 3)
    training = Training(model, draw_params(), steps, optimizer=gf.unrolled.sgd(lr=1e308))
    with pytest.raises((UnrolledError, gf.NonFiniteLossError)):
        gf.unrolled.train(training, keep_every=1)


NORMS: dict[str, Any] = {
    "layer_norm": lambda x, p: F.layer_norm(x, x.shape[-1:], p["g"], p["c"]),
    "group_norm": lambda x, p: F.group_norm(x, 2, p["g"], p["c"]),
    "softmax": lambda x, p: F.gelu(x, approximate="tanh").softmax(-1) * p["g"],
}


@pytest.mark.parametrize("name", NORMS)
def test_both_ways_to_second_derivatives_are_those_of_finite_differences(name: str) -> None:
    """Forward derivatives of some ops have no right derivative in torch."""

    def normed(p: Params, b: Any) -> Tensor:
        h = torch.stack([NORMS[name](x[None] @ p["a"].T, p)[0] for x in b["x"]])
        return (torch.tanh(h) - b["y"]).square().mean(1)

    params = {k: torch.randn(4, *s).double() for k, s in {"a": (3,), "g": (), "c": ()}.items()}
    batch = {"x": torch.randn(5, 3).double(), "y": torch.randn(5, 4).double()}
    steps = [Micro(torch.arange(5), batch)] * 3
    optimizer = gf.unrolled.sgd(lr=0.3, momentum=0.5)

    def loss(weights: Tensor) -> Any:
        training = Training(normed, params, steps, optimizer=optimizer, weights=weights)
        return gf.unrolled.train(training, keep_every=3)

    ones, h = torch.ones(5, dtype=torch.float64), 1e-5
    expected = []
    for i in range(5):
        moved = [loss(ones + sign * h * F.one_hot(torch.tensor(i), 5)) for sign in (1, -1)]
        up, down = (float(normed(x.params, batch).mean()) for x in moved)
        expected.append((up - down) / (2 * h))
    for hvp in ("forward", "reverse"):
        made = gf.unrolled.metagradients(loss(ones), batch, hvp=hvp)  # type: ignore[arg-type]
        assert_equal(made.scores.values[:, 0], torch.tensor(expected).double(), 1e-6)


def tiny(ids: Any, **options: Any) -> gf.unrolled.Training:
    """One step of three samples of a linear model."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, generator=g)
    steps = options.pop("steps", [gf.unrolled.Micro(ids, x)])
    settings = {"optimizer": gf.unrolled.sgd(lr=0.1), **options}
    params = {"w": torch.ones(4)}
    return gf.unrolled.Training(lambda p, b: (b @ p["w"]).square(), params, steps, **settings)


@pytest.mark.parametrize(
    "ids",
    [
        [0, 1, 2],
        torch.tensor([True, False, True]),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3),
        torch.arange(2),
    ],
)
def test_ids_are_integers(ids: Any) -> None:
    """Of truth values, weights would be those of other samples."""
    with pytest.raises(gf.BatchError, match=r"ids of steps\[0\] must be a tensor of 3 integers"):
        tiny(ids, weights=torch.rand(3))


def test_ids_of_bytes_are_no_mask() -> None:
    weights = torch.tensor([1.0, 0.5, 0.25])
    ids = torch.tensor([2, 1, 1])
    ends = [
        gf.unrolled.train(tiny(ids.to(dtype), weights=weights), keep_every=1).params["w"]
        for dtype in (torch.int64, torch.uint8, torch.int8)
    ]
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("steps", [{"a": 1}, {1, 2}, iter([1])])
def test_steps_have_an_order(steps: Any) -> None:
    with pytest.raises(gf.OptionError, match="a sequence of at least one step"):
        tiny(torch.arange(3), steps=steps)


@pytest.mark.parametrize("rate", ["x", torch.tensor([0.1, 0.2]), None, float("nan"), -1.0])
def test_schedules_make_numbers(rate: Any) -> None:
    training = tiny(torch.arange(3), optimizer=gf.unrolled.sgd(lr=lambda t: rate))
    with pytest.raises(gf.OptionError, match=r"the learning rate of step 0 is .* a finite number"):
        gf.unrolled.train(training, keep_every=1)
    tensor = gf.unrolled.sgd(lr=lambda t: torch.tensor(0.1))
    gf.unrolled.train(tiny(torch.arange(3), optimizer=tensor), keep_every=1)


def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        gf.unrolled.UnrolledError, match=r"cannot be written.*Is one of its folders a file"
    ):
        gf.unrolled.train(tiny(torch.arange(3)), keep_every=1, directory=tmp_path / "file")
