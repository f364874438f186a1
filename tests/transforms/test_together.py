"""Train and validation samples in one run of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, gram, sample_grads
from problems import CASES, Problem, features
from torch import Tensor

import ghostfunc as gf
from benchmarks.live_bytes import LiveBytes
from ghostfunc import NonFiniteLossError
from ghostfunc._base.trees import batch_size

TWO_RUNS = {
    "a parameter with several large uses, or of derived tensors": {
        "layer_called_twice", "layer_called_three_times", "regulariser",
        "weight_and_its_transpose", "matmul_parameter_right", "matmul_parameter_left",
        "learned_queries", "relative_position_bias", "in_place_arithmetic", "elementwise",
        "packed_projection", "stacked_weights", "cast_up",
    },
    "half precision": {"bfloat16"},
}  # fmt: skip


def counting(problem: Problem) -> tuple[Callable[[Any, Any], Tensor], list[int]]:
    """The model function, and the sizes of the batches it is called with."""
    sizes: list[int] = []

    def counted(params: Any, batch: Any) -> Tensor:
        sizes.append(batch_size(batch))
        return problem.model_fn(params, batch)

    return counted, sizes


@pytest.mark.usefixtures("form")
def test_every_problem(problem: Problem) -> None:
    args = problem.model_fn, problem.params
    for n, t, m in ((5, 4, 1), (8, 3, 2)):
        train, val = problem.batch(n, t), problem.batch(m, t, seed=1)
        pairs = gram(sample_grads(problem, train), sample_grads(problem, val))
        plain = gf.ghost_value_and_grad(*args, train, val, mode="materialized")
        for reduction, expected in (
            ("mean", [x.mean(1) for x in pairs]),
            ("sum", [x.sum(1) for x in pairs]),
        ):
            scores = gf.ghost_dot_prod(*args, train, val, reduction=reduction)
            assert_close(scores, sum(expected), problem.tolerance)
            step = gf.ghost_value_and_grad(*args, train, val, reduction=reduction, per_param=True)
            assert_close(step.dot_prods, expected, problem.tolerance)
            assert_close([step.losses, step.grads], [plain.losses, plain.grads], problem.tolerance)


@pytest.mark.parametrize("name", CASES)
def test_in_one_run_or_in_two(name: str) -> None:
    problem = CASES[name]()
    counted, sizes = counting(problem)
    train, val = problem.batch(5), problem.batch(1, seed=1)
    gf.ghost_value_and_grad(counted, problem.params, train, val)
    sizes.clear()
    gf.ghost_value_and_grad(counted, problem.params, train, val)
    assert sizes == ([1, 5] if any(name in x for x in TWO_RUNS.values()) else [6])


def test_what_takes_two_runs() -> None:
    problem = CASES["tied_lm"]()
    counted, sizes = counting(problem)
    train, val = problem.batch(8, 4), problem.batch(2, 4, seed=1)
    for at_once, batch, options in (
        (True, val, {}),
        (True, val, {"per_param": True}),
        (True, val, {"contract_dtype": torch.bfloat16}),
        (False, problem.batch(2, 5), {}),  # another length
        (False, problem.batch(3, 4), {}),  # more than a quarter
        (False, val, {"reduction": "none"}),
        (False, val, {"normalize": True}),
        (False, val, {"chunk_size": 8}),
        (False, val, {"randomness": "different"}),
        (False, {"a": val, "b": val}, {}),
    ):
        for call in (gf.ghost_dot_prod, gf.ghost_value_and_grad):
            call(counted, problem.params, train, batch, **options)
            sizes.clear()
            call(counted, problem.params, train, batch, **options)
            assert (sizes == [10]) == at_once, (options, sizes)


def test_one_tensor_in_two_places_stays_one() -> None:
    def model_fn(params: Any, batch: dict[str, Tensor]) -> Tensor:
        same = batch["key"] is batch["value"]
        return F.linear(batch["key"], params["w"]).square().sum(1) * (2.0 if same else 1.0)

    params = {"w": torch.randn(3, 2, dtype=torch.float64)}
    x, y = torch.randn(4, 2, dtype=torch.float64), torch.randn(1, 2, dtype=torch.float64)
    train, val = {"key": x, "value": x}, {"key": y, "value": y}
    for other in (val, {"key": y, "value": y.clone()}):
        two_runs = gf.ghost_dot_prod(model_fn, params, train, other, chunk_size=4)
        assert_close(gf.ghost_dot_prod(model_fn, params, train, other), two_runs, 1e-10)


def test_a_model_that_pulls_back_something_itself() -> None:
    """A gradient taken in the forward pass goes past the same taps."""

    def model_fn(params: Any, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        y = F.linear(x, params["w"])
        (g,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        return (y.square() * g.sign().sum(1, keepdim=True)).sum(1)

    problem = Problem(model_fn, {"w": torch.randn(3, 2, dtype=torch.float64)}, features(2))
    train, val = problem.batch(4), problem.batch(1, seed=1)
    ours, theirs = sample_grads(problem, train), sample_grads(problem, val)
    step = gf.ghost_value_and_grad(model_fn, problem.params, train, val)
    assert_close(step.dot_prods, sum(gram(ours, theirs))[:, 0], 1e-10)
    assert_close(step.grads, [g.mean(0) for g in ours], 1e-10)


SETTINGS: dict[str, Callable[[Any, Tensor], Any]] = {
    "a row of a parameter": lambda p, task: p["heads"][task[0]],
    "a factor": lambda p, task: p["heads"][0] / (1 + task[0]),
    "item": lambda p, task: p["heads"][0] * (1 + task[0].item()),
    "tolist": lambda p, task: p["heads"][0] * (1 + task.tolist()[0]),
    "one branch or another": lambda p, task: p["heads"][1 if (task > 0).all() else 0],
    "the largest": lambda p, task: p["heads"][int(task.max())],
}


@pytest.mark.parametrize("expanded", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
def test_batches_that_are_each_of_one_kind_are_not_mixed(setting: str, expanded: bool) -> None:
    """What a sample says of its whole batch is right for two batches, not for both as one."""

    def model_fn(params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, task = batch
        return torch.tanh(torch.tanh(x @ params["w"]) @ SETTINGS[setting](params, task)).sum(1)

    def draw(n: int, task: int) -> tuple[Tensor, Tensor]:
        tasks = torch.tensor(task).expand(n) if expanded else torch.full((n,), task)
        return torch.randn(n, 5, dtype=torch.float64), tasks

    params = {
        "w": torch.randn(5, 4, dtype=torch.float64),
        "heads": torch.randn(3, 4, 2, dtype=torch.float64),
    }
    train, val = draw(8, 0), draw(2, 1)
    exact = gf.ghost_dot_prod(model_fn, params, train, val, mode="materialized", vectorize=False)
    for _ in range(2):
        assert_close(gf.ghost_dot_prod(model_fn, params, train, val), exact, 1e-10)


def trimmed_tied(params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    ids, lengths = batch
    kept = (torch.arange(ids.shape[1]) < lengths[:, None]).any(0)
    ids = ids[:, kept]
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    h = torch.tanh(F.embedding(ids, params["e"]) @ params["w"])
    logits = (h @ params["e"].t()).transpose(1, 2)
    return (F.cross_entropy(logits, ids, reduction="none") * mask).sum(1) / lengths


def test_tied_weights_and_a_batch_trimmed_to_its_longest_sample() -> None:
    """How long that is, the first samples do not tell."""
    params = {
        "e": torch.randn(11, 5, dtype=torch.float64),
        "w": torch.randn(5, 5, dtype=torch.float64),
    }

    def draw(*lengths: int) -> tuple[Tensor, Tensor]:
        return torch.randint(11, (len(lengths), 12)), torch.tensor(lengths)

    for train, val in (
        (draw(3, 4, 9, 2, 5, 6, 7, 3), draw(5, 6)),
        (draw(3, 4, 7, 2, 5, 6, 7, 3), draw(5, 8)),
        (draw(1, 1, 2, 12), draw(3)),
    ):
        materialized = {"mode": "materialized", "vectorize": False}
        exact = gf.ghost_dot_prod(trimmed_tied, params, train, val, **materialized)
        assert_close(gf.ghost_dot_prod(trimmed_tied, params, train, val), exact, 1e-10)
        exact = gf.ghost_norm(trimmed_tied, params, train, **materialized)
        assert_close(gf.ghost_norm(trimmed_tied, params, train), exact, 1e-10)


def test_another_size_of_vocabulary() -> None:
    def model_fn(params: Any, ids: Tensor) -> Tensor:
        return torch.tanh(F.embedding(ids, params["e"]) @ params["e"].t()).sum((1, 2))

    for rows in (11, 14):
        params = {"e": torch.randn(rows, 4, dtype=torch.float64)}
        train, val = torch.randint(rows, (8, 3)), torch.randint(rows, (2, 3))
        exact = gf.ghost_dot_prod(model_fn, params, train, val, mode="materialized")
        assert_close(gf.ghost_dot_prod(model_fn, params, train, val), exact, 1e-10)


def test_a_mask_made_for_the_train_batch() -> None:
    """A model that cannot take more than 8 samples is run twice, and not tried again."""
    sizes: list[int] = []
    offset = torch.randn(8, 5, dtype=torch.float64) * 0

    def model_fn(params: Any, x: Tensor) -> Tensor:
        sizes.append(len(x))
        return torch.tanh(x @ params["w"] + offset[: len(x)]).sum(1)

    params = {"w": torch.randn(4, 5, dtype=torch.float64)}
    train, val = torch.randn(8, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    exact = gf.ghost_dot_prod(model_fn, params, train, val, mode="materialized")
    assert_close(gf.ghost_dot_prod(model_fn, params, train, val), exact, 1e-10)
    sizes.clear()
    gf.ghost_dot_prod(model_fn, params, train, val)
    assert sizes == [2, 8]


def test_the_way_of_the_batch_is_found_by_its_parameters() -> None:
    """The same ops in every pair of samples, but not with the same parameters."""

    def model_fn(params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, flag = batch
        h = torch.tanh(x @ params["w"])
        other = params["a"] if flag.any() else params["b"]
        return torch.where(flag, (h @ other).sum(1), (h @ params["b"]).sum(1))

    params = {
        "w": torch.randn(4, 5, dtype=torch.float64),
        "a": torch.randn(5, 2, dtype=torch.float64),
        "b": torch.randn(5, 2, dtype=torch.float64),
    }
    batch = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) == 5
    exact = gf.ghost_norm(model_fn, params, batch, mode="materialized", vectorize=False)
    assert_close(gf.ghost_norm(model_fn, params, batch), exact, 1e-10)


def test_a_loss_that_is_not_finite_is_blamed_on_its_batch() -> None:
    problem = CASES["mlp"]()
    train, val = problem.batch(5), problem.batch(1, seed=1)
    gf.ghost_dot_prod(problem.model_fn, problem.params, train, val)
    bad = val.clone()
    bad[0, 0] = torch.nan
    with pytest.raises(NonFiniteLossError, match=r"1 of 1 losses .* losses\[0\] = nan"):
        gf.ghost_dot_prod(problem.model_fn, problem.params, train, bad)
    bad = train.clone()
    bad[3, 0] = torch.nan
    with pytest.raises(NonFiniteLossError, match=r"1 of 5 losses .* losses\[3\] = nan"):
        gf.ghost_dot_prod(problem.model_fn, problem.params, bad, val)


def peak(step: Callable[[], object]) -> int:
    step()
    with LiveBytes() as memory:
        step()
    return memory.peak


def test_no_more_memory_than_a_plain_step() -> None:
    module = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(6)))
    model_fn, params = gf.from_module(module, lambda m, x: m(x).square().mean((1, 2)))
    train, val = torch.randn(16, 32, 64), torch.randn(4, 32, 64)
    both = torch.cat([train, val])

    def plain() -> None:
        module.zero_grad()
        module(both).square().mean().backward()

    ghost = peak(lambda: gf.ghost_value_and_grad(model_fn, params, train, val))
    assert ghost <= 1.1 * peak(plain) + both.nbytes


def table_looked_up_in_its_transpose(p: Any, ids: Tensor) -> Tensor:
    h = torch.tanh(F.embedding(ids, p["head"].t()) @ p["w"])
    logits = (h @ p["head"]).flatten(0, 1)
    return F.cross_entropy(logits, ids.flatten(), reduction="none").view(ids.shape).mean(1)


def looked_up_often(p: Any, ids: Tensor) -> Tensor:
    return sum(F.embedding((ids + k) % 800, p["e"]) * (k + 1.0) for k in range(24)).sum((1, 2))


def expanded(p: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, same = batch
    return (x @ p["w"]).square().sum(1) + 0 * same[:, 0]


def large_samples(p: Any, x: Tensor) -> Tensor:
    return (x @ p["w"]).square().sum(1)


def ids(n: int) -> Tensor:
    return torch.randint(800, (n, 16))


BIG = torch.randn(1, 100_000)


@pytest.mark.parametrize(
    ("model_fn", "params", "draw"),
    [
        (table_looked_up_in_its_transpose, {"head": (32, 800), "w": (32, 32)}, ids),
        (looked_up_often, {"e": (800, 32)}, ids),
        (expanded, {"w": (4, 4)}, lambda n: (torch.randn(n, 4), BIG.expand(n, -1))),
        (large_samples, {"w": (40_000, 2)}, lambda n: torch.randn(n, 40_000)),
    ],
)
def test_where_two_runs_take_less_memory(
    model_fn: Callable[[Any, Any], Tensor],
    params: dict[str, tuple[int, ...]],
    draw: Callable[[int], Any],
) -> None:
    args = model_fn, {k: torch.randn(shape) for k, shape in params.items()}
    train, val = draw(32), draw(4)
    at_once = peak(lambda: gf.ghost_dot_prod(*args, train, val))
    assert at_once <= 1.05 * peak(lambda: gf.ghost_dot_prod(*args, train, val, chunk_size=32))


def test_long_samples_keep_their_digits() -> None:
    """The products of 65,536 pairs of positions are added up in pairs, not one by one."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> torch.Tensor:
        return torch.rand(n, 256, 640, generator=generator)  # sums that grow

    def model_fn(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, params["w"]).square().sum((1, 2))

    w, train, val = torch.rand(640, 640, generator=generator), draw(4), draw(1)
    found = gf.ghost_dot_prod(model_fn, {"w": w}, train, val)
    right = gf.ghost_dot_prod(model_fn, {"w": w.double()}, train.double(), val.double())
    assert ((found - right).abs() / right.abs()).max() < 1e-6
