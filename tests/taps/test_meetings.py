"""Parameters that samples meet in more than one way: all cross terms count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, sample_grads
from problems import Problem, features, sequences
from torch import Tensor

import ghostfunc as gf


def weights(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    return {k: 0.5 * torch.randn(*s, generator=g, dtype=torch.float64) for k, s in shapes.items()}


def check(problem: Problem, batch: Any) -> None:
    """Norm, Gram, cosine, clipped sum and the book agree with gradients themselves."""
    g = torch.cat([x.reshape(len(x), -1) for x in sample_grads(problem, batch)], 1)
    fn, params = problem.model_fn, problem.params
    assert_close(gf.ghost_norm(fn, params, batch), g.norm(dim=1), 1e-10)
    assert_close(gf.ghost_gram(fn, params, batch), g @ g.mT, 1e-10)
    assert_close(gf.ghost_gram(fn, params, batch, batch), g @ g.mT, 1e-10)
    cosine = F.cosine_similarity(g, g.mean(0, keepdim=True))
    assert_close(gf.ghost_cosine(fn, params, batch, batch), cosine, 1e-10)
    bound = float(g.norm(dim=1).median())
    grads = gf.ghost_clipped_grad(fn, params, batch, max_norm=bound).grads
    flat = torch.cat([grads[k].flatten() for k in sorted(params)])
    assert_close(flat, (bound / g.norm(dim=1)).clamp(max=1) @ g, 1e-10)


def energy(x: Tensor) -> Tensor:
    return (x.flatten(1) - 1).square().mean(1)


def one_op_twice(p: Any, x: Tensor) -> Tensor:
    return energy(torch.addcmul(x, p["c"], p["c"]))


def own_square(p: Any, x: Tensor) -> Tensor:
    return energy(torch.tanh(x @ p["w"]) @ p["w"] @ p["w"].t())


def two_derivations(p: Any, x: Tensor) -> Tensor:
    h = x @ (p["w"] + p["w"].t())
    return energy(h * p["w"].square().sum(0) + x @ F.normalize(p["w"], dim=0))


def table_head_and_mean(p: Any, x: Tensor) -> Tensor:
    ids = (x[..., 0] > 0).long() + 2 * (x[..., 1] > 0).long()
    h = F.embedding(ids, p["w"])
    return energy((h + p["w"].mean(0)) @ p["w"].t())


def recurrent(p: Any, x: Tensor) -> Tensor:
    h = torch.zeros_like(x[:, 0])
    for step in x.unbind(1):
        h = torch.tanh(step @ p["u"] + h @ p["w"])
    return energy(h)


def weight_and_buffer_of_it(p: Any, x: Tensor) -> Tensor:
    return energy(F.linear(x, p["w"], p["w"].diagonal()))


SQUARE = {"w": (4, 4)}
MODELS = {
    "one_op_twice": (one_op_twice, {"c": (4,)}),
    "own_square": (own_square, SQUARE),
    "two_derivations": (two_derivations, SQUARE),
    "table_head_and_mean": (table_head_and_mean, SQUARE),
    "recurrent": (recurrent, {"w": (4, 4), "u": (4, 4)}),
    "weight_and_bias_of_it": (weight_and_buffer_of_it, SQUARE),
}


@pytest.mark.parametrize("t", [1, 3, 4])
@pytest.mark.parametrize(("fn", "shapes"), MODELS.values(), ids=MODELS)
def test_every_meeting_counts(fn: Any, shapes: dict[str, tuple[int, ...]], t: int) -> None:
    problem = Problem(fn, weights(**shapes), sequences(4))
    check(problem, problem.batch(4, t))


@pytest.mark.parametrize("lengths", [(1, 3), (3, 1), (2, 5)])
def test_the_number_of_meetings_may_change_with_the_length(lengths: tuple[int, int]) -> None:
    """The trace of one length is made anew for another, and the uses are counted anew."""

    def fn(p: Any, x: Tensor) -> Tensor:
        return recurrent(p, x)

    problem = Problem(fn, weights(w=(4, 4), u=(4, 4)), sequences(4))
    for t in lengths:
        check(problem, problem.batch(3, t))


def test_a_parameter_that_only_one_batch_needs() -> None:
    def fn(p: Any, batch: dict[str, Tensor]) -> Tensor:
        out = batch["x"] @ p["w"]
        return energy(out + batch["y"] @ p["v"] if "y" in batch else out)

    params = weights(w=(4, 3), v=(4, 3))
    x, y = features(4)(3, 0, torch.Generator()), features(4)(3, 0, torch.Generator().manual_seed(9))
    with_y, without = {"x": x, "y": y}, {"x": x}
    g = Problem(fn, params, features(4))
    rows, others = sample_grads(g, with_y), sample_grads(g, without)
    expected = [a.flatten(1) @ b.flatten(1).mT for a, b in zip(rows, others, strict=True)]
    names = sorted(params)
    gram = gf.ghost_gram(fn, params, with_y, without, per_param=True)
    assert_close([gram[k] for k in names], expected, 1e-10)
    gram = gf.ghost_gram(fn, params, without, with_y, per_param=True)
    assert_close([gram[k] for k in names], [e.mT for e in expected], 1e-10)
    for reduction in ("mean", "none"):
        cosine = gf.ghost_cosine(fn, params, with_y, without, per_param=True, reduction=reduction)
        assert not cosine["v"].any()
        assert (cosine["w"] != 0).all()


def test_a_zero_gradient_has_no_direction() -> None:
    def fn(p: Any, x: Tensor) -> Tensor:
        return (x @ p["w"]).sum(1)

    params = weights(w=(4, 3))
    x = features(4)(3, 0, torch.Generator())
    x[1] = 0
    val = features(4)(2, 0, torch.Generator().manual_seed(3))
    for mode in ("ghost", "materialized"):
        assert gf.ghost_norm(fn, params, x, mode=mode)[1] == 0
        cosine = gf.ghost_cosine(fn, params, x, val, mode=mode)
        assert cosine[1] == 0
        assert (cosine[[0, 2]].abs() > 0.01).all()
        assert (cosine.abs() <= 1).all()
        assert not gf.ghost_cosine(fn, params, x, torch.zeros(2, 4).double(), mode=mode).any()
    u = {"w": torch.zeros(4, 3, dtype=torch.float64)}
    assert not gf.ghost_cosine(fn, params, x, direction=u).any()


def test_cosine_with_a_direction(problem: Problem) -> None:
    train, val = problem.batch(3, t=4), problem.batch(2, t=5, seed=1)
    fn, params = problem.model_fn, problem.params
    u = gf.direction(fn, params, val)
    for mode in ("ghost", "materialized"):
        options: Any = {"mode": mode, "vectorize": False}
        cosine = gf.ghost_cosine(fn, params, train, direction=u, **options)
        assert_close(cosine, gf.ghost_cosine(fn, params, train, val, **options), problem.tolerance)


def test_quantities_of_one_pass(problem: Problem) -> None:
    """Dot products, norms, Gram matrix and training gradient out of one backward pass."""
    batch = problem.batch(3, t=4)
    fn, params = problem.model_fn, problem.params
    u = gf.direction(fn, params, batch)
    asked = {"dot": gf.Dot(u), "norm": gf.SqNorm(), "gram": gf.Gram(workspace=50)}
    together = gf.ghost_vjp(fn, params, batch, asked, grads=True)
    for name, quantity in asked.items():
        alone = gf.ghost_vjp(fn, params, batch, quantity)
        assert_close(together.values[name], alone.values, problem.tolerance)


def test_options_that_do_not_exist() -> None:
    params, x = weights(w=(4, 4)), sequences(4)(2, 3, torch.Generator())
    with pytest.raises(gf.OptionError, match="mode='jvp' is not an option"):
        gf.ghost_norm(own_square, params, x, mode="jvp")
    with pytest.raises(gf.OptionError, match="mode='fast' is not an option"):
        gf.ghost_gram(own_square, params, x, mode="fast")
    with pytest.raises(gf.OptionError, match="exactly one of val and direction; neither"):
        gf.ghost_cosine(own_square, params, x)
    with pytest.raises(gf.OptionError, match="exactly one of val and direction; both"):
        gf.ghost_cosine(own_square, params, x, x, direction=params)
    with pytest.raises(gf.OptionError, match="reduction='max' is not an option"):
        gf.ghost_cosine(own_square, params, x, x, reduction="max")
    with pytest.raises(gf.OptionError, match="randomness='no' is not an option"):
        gf.factored_grads(own_square, params, x, randomness="no")
