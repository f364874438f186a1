"""The evaluation's measures, on scores whose worth is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import ghostfunc as gf
from examples.evaluation import digits, domains, projections
from examples.evaluation.__main__ import BEST, Config, evaluate_digits, spread, table
from examples.evaluation.attribution import Task, exact, projected
from examples.evaluation.measures import (
    datamodeling_score,
    leave_one_out,
    overlap,
    rank_correlation,
)


def additive() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, subsets, and losses that are exactly what the scores say."""
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 3, generator=g)
    subsets = torch.rand(40, 20, generator=g) < 0.5
    return scores, subsets, -(subsets.float() @ scores)


def test_datamodeling_score() -> None:
    scores, subsets, losses = additive()
    assert datamodeling_score(scores, subsets, losses) == pytest.approx(1)
    assert datamodeling_score(-scores, subsets, losses) == pytest.approx(-1)
    assert datamodeling_score(scores, subsets, losses.exp()) == pytest.approx(1)  # ranks alone
    other = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    assert abs(datamodeling_score(other, subsets, losses)) < 0.3


def test_leave_one_out() -> None:
    scores, _, _ = additive()
    left_out = torch.tensor([3, 7, 1, 12])
    assert leave_one_out(scores, left_out, scores[left_out]) == pytest.approx(1)
    assert leave_one_out(scores, left_out, -scores[left_out]) == pytest.approx(-1)


@pytest.mark.parametrize("y", [torch.zeros(3), torch.tensor([1.0, 2.0, float("nan")])])
def test_ranks_that_are_none(y: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="constant or not finite"):
        rank_correlation(torch.arange(3.0), y)


def test_overlap() -> None:
    a = torch.tensor([[4.0], [3.0], [2.0], [1.0]])
    b = torch.tensor([[4.0], [1.0], [2.0], [3.0]])
    assert [overlap(a, b, k) for k in (1, 2, 4)] == [1, 0.5, 1]


# --- digits -------------------------------------------------------------------------------------


def test_retrained_together_is_retrained_alone() -> None:
    model_fn, start = digits.model(0)
    train, queries = digits.data(30, 5, wrong=0.1, seed=0)
    weights = torch.ones(3, 30)
    weights[1, 4] = weights[2, :10] = 0
    together = digits.losses(model_fn, digits.retrain(model_fn, start, train, weights), queries)
    for i, w in enumerate(weights):
        kept = {name: x[w > 0] for name, x in train.items()}
        few = torch.ones(1, int(w.sum()))
        alone = digits.losses(model_fn, digits.retrain(model_fn, start, kept, few), queries)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-5)


def test_wrong_labels_are_as_many_as_said() -> None:
    clean, _ = digits.data(1000, 5, wrong=0.0, seed=0)
    wrong, _ = digits.data(1000, 5, wrong=0.2, seed=0)
    assert torch.equal(clean["image"], wrong["image"])
    assert 150 < int((clean["label"] != wrong["label"]).sum()) < 250


@pytest.fixture(scope="module")
def trained() -> Task:
    model_fn, start = digits.model(0)
    return digits.task(model_fn, start, *digits.data(60, 7, wrong=0.1, seed=0))


def test_methods_agree_with_their_definition(trained: Task) -> None:
    grads = [
        torch.cat(
            [
                g.flatten(1)
                for g in gf.per_sample_grads(trained.model_fn, trained.params, x).values()
            ],
            1,
        )
        for x in (trained.train, trained.queries)
    ]
    scores = exact(trained)
    torch.testing.assert_close(scores["dot product"], grads[0] @ grads[1].mT, rtol=1e-4, atol=1e-5)
    cosine = F.normalize(grads[0]) @ F.normalize(grads[1]).mT
    torch.testing.assert_close(scores["cosine"], cosine, rtol=1e-4, atol=1e-5)
    full = gf.projection.full_projection(trained.params)
    stored = projected(trained, full, damping=None)
    torch.testing.assert_close(stored["dot product"], scores["dot product"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stored["cosine"], cosine, rtol=1e-4, atol=1e-5)


def test_scores_foretell_retrained_models() -> None:
    """With few models of few samples: what the documentation's table says at length."""
    config = Config(samples=200, queries=20, subsets=64, left_out=32)
    rows = evaluate_digits(config, seed=0)
    lds = {name: cells["LDS"] for name, cells in rows.items()}
    assert abs(lds["random"]) < 0.1
    assert lds["dot product"] > 0.15
    assert lds["projected, preconditioned, dot product"] > lds["dot product"]
    assert lds["dot product"] > lds["gradient norm alone"]


# --- text ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_steps() -> domains.Domains:
    return domains.train(0, steps=20)


def test_domains_of_the_pool(few_steps: domains.Domains) -> None:
    assert few_steps.losses[-1] < few_steps.losses[0]
    assert len(few_steps.sources) == len(few_steps.task.train["input_ids"])
    assert few_steps.wanted.bincount().tolist() == [domains.QUERY_CHUNKS] * 6
    assert len(domains.texts(few_steps.task.queries["input_ids"])[0]) > 0


def test_tail_patch_follows_the_dot_product(few_steps: domains.Domains) -> None:
    """For a small step, to first order."""
    task = few_steps.task
    task = replace(
        task,
        train={"input_ids": task.train["input_ids"][::9]},
        queries={"input_ids": task.queries["input_ids"][::8]},
    )
    dots = exact(task)["dot product"]
    lr = 1e-4
    fall = domains.tail_patch(replace(few_steps, task=task), dots, BEST, lr=lr)
    expected = lr * dots.topk(BEST, dim=0).values.mean(0)
    torch.testing.assert_close(fall, expected, rtol=0.15, atol=1e-5)


def test_the_recommended_projection_keeps_the_best(few_steps: domains.Domains) -> None:
    asked = (projections.RECOMMENDED, projections.BY_PARAMETER)
    task = few_steps.task
    task = replace(task, train={"input_ids": task.train["input_ids"][::3]})
    found = projections.overlaps(task, asked, k=BEST, seed=0)
    (k, recommended), (_, by_parameter) = (found[x] for x in asked)
    assert k == projections.RECOMMENDED.compress
    assert recommended > 0.9
    assert recommended > by_parameter


# --- tables -------------------------------------------------------------------------------------


def test_tables() -> None:
    assert spread([0.5]) == "0.50"
    assert spread([0.4, 0.6]) == "0.50 ± 0.14"
    runs = [{"a": {"x": 1.0, "y": 2.0}}, {"a": {"x": 3.0, "y": 2.0}}]
    lines = table("T", runs).splitlines()
    assert lines[0] == "| T | x | y |"
    assert lines[2] == "| a | 2.00 ± 1.41 | 2.00 ± 0.00 |"
