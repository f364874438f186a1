"""Several validation batches or directions at once: a dict of scores for one train backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, gram, leaves_of, random_direction, sample_grads
from problems import CASES, Problem
from torch import Tensor

import ghostfunc as gf
from ghostfunc import BatchError, OptionError, ParamsError
from ghostfunc._factors import beside_total, cost
from ghostfunc._factors.factor import Outer


def joined(grads: list[Tensor]) -> Tensor:
    return torch.cat(
        [
            (g.float() if g.dtype == torch.bfloat16 else g).flatten(1) if g.ndim > 1 else g[:, None]
            for g in grads
        ],
        1,
    )


def test_every_problem(problem: Problem) -> None:
    train = problem.batch(3, 4)
    val = {"b": problem.batch(2, 5, seed=1), "a": problem.batch(1, 4, seed=2)}
    args = problem.model_fn, problem.params, train
    grads, theirs = (
        sample_grads(problem, train),
        {k: sample_grads(problem, v) for k, v in val.items()},
    )
    pairs = {k: gram(grads, g) for k, g in theirs.items()}
    for mode in ["ghost", "materialized"] + ["jvp"] * problem.forward_mode:
        dots = gf.ghost_dot_prod(*args, val, mode=mode, vectorize=False)
        assert list(dots) == ["b", "a"]
        for name, pair in pairs.items():
            assert_close(dots[name], sum(x.mean(1) for x in pair), problem.tolerance)
    each = gf.ghost_dot_prod(*args, val, reduction="none", per_param=True)
    step = gf.ghost_value_and_grad(*args, val, per_param=True)
    cosines = gf.ghost_value_and_grad(*args, val, normalize=True).dot_prods
    for name, pair in pairs.items():
        assert_close(each[name], pair, problem.tolerance)
        assert_close(step.dot_prods[name], [x.mean(1) for x in pair], problem.tolerance)
        u = joined([g.mean(0, keepdim=True) for g in theirs[name]])
        assert_close(cosines[name], F.cosine_similarity(joined(grads), u), problem.tolerance)
    assert_close(step.grads, [g.mean(0) for g in grads], problem.tolerance)


def test_directions(problem: Problem) -> None:
    train = problem.batch(4, 4)
    args = problem.model_fn, problem.params, train
    us = {k: random_direction(problem.params, seed=k) for k in range(3)}
    step = gf.ghost_value_and_grad(*args, direction=us, per_param=True)
    dots = gf.ghost_dot_prod(*args, direction=us, per_param=True)
    grads = sample_grads(problem, train)
    for name, u in us.items():
        expected = [x[:, 0] for x in gram(grads, [x[None] for x in leaves_of(u)])]
        assert_close(dots[name], expected, problem.tolerance)
        assert_close(step.dot_prods[name], expected, problem.tolerance)
    assert_close(step.grads, [g.mean(0) for g in grads], problem.tolerance)


@pytest.mark.parametrize(
    ("call", "options"),
    [
        (gf.ghost_dot_prod, {}),
        (gf.ghost_dot_prod, {"reduction": "none"}),
        (gf.ghost_dot_prod, {"per_position": True}),
        (gf.ghost_value_and_grad, {}),
        (gf.ghost_value_and_grad, {"normalize": True}),
        (gf.ghost_cosine, {}),
    ],
)
def test_the_train_batch_is_run_once(call: Callable[..., Any], options: dict[str, Any]) -> None:
    problem = CASES["nanogpt"]()
    sizes: list[int] = []

    def counted(params: Any, ids: Tensor) -> Tensor:
        sizes.append(len(ids))
        return problem.model_fn(params, ids)

    val = {k: problem.batch(k, 5, seed=k) for k in (3, 4, 5)}
    call(counted, problem.params, problem.batch(6, 5), val, **options)  # traces
    sizes.clear()
    call(counted, problem.params, problem.batch(6, 5, seed=9), val, **options)
    assert sizes == [3, 4, 5, 6]


@pytest.mark.parametrize("mode", ["ghost", "jvp", "materialized"])
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none"}, {"reduction": "none", "per_param": True}, {"normalize": True}],
    ids=str,
)
def test_chunks(mode: str, options: dict[str, Any]) -> None:
    """The batches have unequal numbers of chunks."""
    if mode == "jvp" and "normalize" in options:
        pytest.skip("no norms in forward mode")
    problem = CASES["tied_lm"]()
    args = problem.model_fn, problem.params, problem.batch(5, 4)
    val = {k: problem.batch(k, 5, seed=k) for k in (1, 5, 2)}
    whole = gf.ghost_value_and_grad(*args, val, mode=mode, **options)
    chunked = gf.ghost_value_and_grad(*args, val, mode=mode, chunk_size=2, **options)
    assert list(chunked.dot_prods) == [1, 5, 2]
    assert_close(chunked, whole, 1e-10)
    dots = gf.ghost_dot_prod(*args, val, mode=mode, chunk_size=2, **options)
    assert_close(dots, whole.dot_prods, 1e-10)


# --- a batch, or a dict of batches ------------------------------------------------------------


def masked_sum(p: dict[str, Tensor], batch: Any) -> Tensor:
    """Takes a tensor, a tuple `(x, mask)`, or dicts `{"x", "mask"?}`, nested or not."""
    if isinstance(batch, tuple):
        batch = {"x": batch[0], "mask": batch[1]}
    if isinstance(batch, Tensor):
        batch = {"x": batch}
    if "in" in batch:
        batch = {**batch["in"], "mask": batch.get("mask", torch.ones(len(batch["in"]["x"])))}
    losses = torch.tanh(batch["x"] @ p["w"]).sum(1)
    return losses * batch["mask"] if "mask" in batch else losses


W = {"w": torch.linspace(-1, 1, 12).view(4, 3)}
X = torch.linspace(-2, 1, 20).view(5, 4)
Y, ONES = X[:3] + 0.5, torch.ones(3)


@pytest.mark.parametrize(
    ("train", "val"),
    [
        (X, {"a": Y, "b": X}),
        ({"x": X}, {"a": {"x": Y}, "b": {"x": X}}),
        ({"x": X}, {"x": {"x": Y}, "mask": {"x": X}}),  # names may be keys of a batch
        ((X, torch.ones(5)), {"a": (Y, ONES)}),
        ({"x": X}, {"a": {"x": Y, "mask": ONES}, "b": {"x": Y}}),
        ({"x": X, "mask": torch.ones(5)}, {"a": {"x": Y}}),
        ({"in": {"x": X}}, {"a": {"in": {"x": Y}}, "b": {"in": {"x": Y}, "mask": ONES}}),
    ],
)
def test_a_dict_of_batches(train: Any, val: dict[str, Any]) -> None:
    dots = gf.ghost_dot_prod(masked_sum, W, train, val)
    assert list(dots) == list(val)
    for name, batch in val.items():
        alone = gf.ghost_dot_prod(
            masked_sum, W, train, direction=gf.direction(masked_sum, W, batch)
        )
        torch.testing.assert_close(dots[name], alone)


@pytest.mark.parametrize(
    ("train", "val"),
    [
        (X, Y),
        ({"x": X}, {"x": Y}),
        ({"x": X}, {"x": Y, "mask": ONES}),
        ({"x": X, "mask": torch.ones(5)}, {"x": Y}),
        ({"in": {"x": X}}, {"in": {"x": Y}}),
        ({"in": {"x": X}}, {"in": {"x": Y}, "mask": ONES}),
        ({"x": X}, (Y, ONES)),  # no dict, hence one batch
    ],
)
def test_one_batch(train: Any, val: Any) -> None:
    dots = gf.ghost_dot_prod(masked_sum, W, train, val)
    alone = gf.ghost_dot_prod(masked_sum, W, train, direction=gf.direction(masked_sum, W, val))
    torch.testing.assert_close(dots, alone)


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (
            {"x": X},
            {"a": {"y": Y}},
            r"neither can be meant here: val is \{'a': \{'y': \[3, 4\]\}\}",
        ),
        ((X, torch.ones(5)), {"x": Y, "mask": ONES}, "neither"),
        ({"x": X}, {"a": {"x": Y}, "b": Y}, "neither"),
        ({"x": X, "in": {"x": X}}, {"in": {"x": Y}}, "both"),
        ({"x": X}, {"a": {"x": Y[:0]}}, r"val\['a'\] is empty"),
        ({"x": X}, {}, "val has no tensors"),
    ],
)
def test_what_may_mean_either(train: Any, val: Any, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        gf.ghost_dot_prod(masked_sum, W, train, val)


def test_directions_with_the_names_of_parameters() -> None:
    us = {"w": {"w": torch.ones(4, 3)}, "v": {"w": torch.eye(4)[:, :3]}}
    dots = gf.ghost_dot_prod(masked_sum, W, X, direction=us)
    for name, u in us.items():
        torch.testing.assert_close(dots[name], gf.ghost_dot_prod(masked_sum, W, X, direction=u))
    with pytest.raises(ParamsError, match=r"direction\['v'\] leaf 'w' must have the shape"):
        gf.ghost_dot_prod(masked_sum, W, X, direction={**us, "v": {"w": torch.ones(3)}})
    with pytest.raises(ParamsError, match=r"Missing: \['w'\]; not in params: \['a'\]"):
        gf.ghost_dot_prod(masked_sum, W, X, direction={"a": torch.ones(4, 3)})


def test_cosines_have_no_forward_mode() -> None:
    with pytest.raises(OptionError, match='"jvp" does not have'):
        gf.ghost_dot_prod(masked_sum, W, X, Y, mode="jvp", normalize=True)


# --- work that is shared ------------------------------------------------------------------------


@pytest.mark.parametrize("with_total", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_dots_read_off_one_gradient(
    rows: int, with_total: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, t, p, d, k = 3, 5, 7, 4, 3
    before = torch.randn(p, d).double()
    factor = Outer(torch.randn(n, t, p).double(), torch.randn(n, t, d).double())
    us = [torch.randn(p, d).double() for _ in range(k)]
    monkeypatch.setattr(cost, "ROWS_ELEMENTS", rows * d)
    results = []
    for shared in (False, True):
        monkeypatch.setattr(cost, "share_dots", lambda *args, shared=shared, **options: shared)
        results.append(beside_total.dots_and_total(factor, us, with_total=with_total))
    g = torch.einsum("ntp,ntd->npd", *factor)
    for dots, total in results:
        assert_close(dots, [torch.einsum("npd,pd->n", g, u) for u in us], 1e-12)
        assert (total is not None) == with_total
        if total is not None:
            assert_close(total, g.sum(0), 1e-12)
    if with_total:
        for shared in (False, True):
            monkeypatch.setattr(cost, "share_dots", lambda *args, shared=shared, **options: shared)
            into = before.clone()
            dots, total = beside_total.dots_and_total(factor, us, with_total=True, into=into)
            assert total is into
            assert_close(into, before + g.sum(0), 1e-12)
            assert_close(dots, [torch.einsum("npd,pd->n", g, u) for u in us], 1e-12)


def test_sharing_is_chosen_by_cost() -> None:
    assert cost.share_dots(4, 256, 384, 1536, 2, with_total=False)
    assert cost.share_dots(4, 256, 384, 1536, 4, with_total=True)
    assert not cost.share_dots(4, 1, 384, 1536, 4, with_total=False)
