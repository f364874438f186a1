"""Rows in the eigenbasis against the directions, in float64; stores of them; which way is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from dense import sample_grads
from torch import Tensor

import ghostfunc as gf
from ghostfunc.curvature import EKFAC
from ghostfunc.curvature._rows import RowReader
from ghostfunc.store import IncompatibleStoreError, Store, project_dataset

Params = dict[str, Tensor]
Problem = tuple[Callable[[Params, Any], Tensor], Params, Any]
DAMPING = 0.05


def weights(**shapes: tuple[int, ...]) -> Params:
    return {name: 0.6 * torch.randn(s, dtype=torch.float64) for name, s in shapes.items()}


def energy(out: Tensor) -> Tensor:
    return (out.flatten(1) - 1).square().mean(1)


def linear() -> Problem:
    def model(p: Params, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, p["w"], p["b"]))
        return energy(F.linear(h, p["v"]) * p["scale"])

    return model, weights(w=(5, 4), b=(5,), v=(3, 5), scale=()), torch.randn(9, 6, 4).double()


def convolutions() -> Problem:
    def model(p: Params, x: Tensor) -> Tensor:
        h = torch.tanh(F.conv2d(x, p["w"], groups=2))
        return energy(F.conv_transpose2d(h, p["v"], p["b"], stride=2))

    params = weights(w=(4, 2, 2, 2), v=(4, 3, 2, 2), b=(3,))
    return model, params, torch.randn(7, 4, 4, 4).double()


def tied() -> Problem:
    def model(p: Params, ids: Tensor) -> Tensor:
        h = torch.tanh(F.embedding(ids, p["e"], padding_idx=2).cumsum(1))
        return energy(F.linear(h, p["e"]))

    return model, weights(e=(6, 4)), torch.randint(6, (8, 5))


def derived() -> Problem:
    def model(p: Params, x: Tensor) -> Tensor:
        w = p["v"].tanh() + p["up"] @ p["down"]
        return energy(torch.tanh(x @ w @ w.T + p["table"][: x.shape[1]]))

    params = weights(v=(4, 5), up=(4, 2), down=(2, 5), table=(8, 4), idle=(2, 2))
    return model, params, torch.randn(8, 6, 4).double()


PROBLEMS = [linear, convolutions, tied, derived]


def parts(problem: Problem) -> tuple[EKFAC, Any, Any]:
    model, params, batch = problem
    made = gf.curvature.ekfac(model, params, [batch], fisher="empirical")
    return made, batch, batch[:3]


@pytest.mark.parametrize("make", PROBLEMS)
def test_inner_products_of_rows_are_scores_along_directions(make: Callable[[], Problem]) -> None:
    problem = make()
    model, params, _ = problem
    made, train, queries = parts(problem)
    options: Any = {"curvature": made, "damping": DAMPING}
    for sides in ((train, queries), (queries, train)):
        along = gf.influence(model, params, *sides, way="directions", **options)
        found = gf.influence(model, params, *sides, way="rows", chunk_size=4, **options)
        torch.testing.assert_close(found, along, rtol=1e-8, atol=1e-10)
    split = gf.influence(model, params, train, queries, way="rows", per_param=True, **options)
    expected = gf.influence(
        model, params, train, queries, way="directions", per_param=True, **options
    )
    torch.testing.assert_close(split, expected, rtol=1e-8, atol=1e-10)
    rows = made.rows(DAMPING)
    assert rows.approximation.startswith("exact")
    grads = sample_grads(model, params, train)
    torch.testing.assert_close(
        gf.ghost_project(model, params, train, rows), rows.apply(grads), rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("make", [linear, convolutions, tied])
def test_a_truncation_keeps_the_directions_that_hold_most(make: Callable[[], Problem]) -> None:
    problem = make()
    model, params, batch = problem
    made, *_ = parts(problem)
    whole = gf.ghost_project(model, params, batch, made.rows(DAMPING))
    few = made.rows(DAMPING, columns=7)
    # Where the labels are those of the losses, the mean square of a column is L / (L + damping).
    held = whole.square().mean(0)
    kept = held.topk(7).indices.sort().values
    torch.testing.assert_close(gf.ghost_project(model, params, batch, few), whole[:, kept])
    assert few.share == pytest.approx(float(held[kept].sum() / held.sum()))
    assert f"7 of {whole.shape[1]} eigendirections" in repr(few)
    assert f"{few.share:.2%}" in few.approximation


@pytest.mark.parametrize("columns", [0, 1000, 2.0, True])
def test_there_are_so_many_columns(columns: Any) -> None:
    made, *_ = parts(linear())
    with pytest.raises(gf.OptionError, match="columns"):
        made.rows(DAMPING, columns=columns)


class Samples:
    def __init__(self, batch: Tensor) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, i: int) -> Tensor:
        return self.batch[i]


def test_a_store_of_rows_answers_with_influences(tmp_path: Path) -> None:
    problem = linear()
    model, params, batch = problem
    made, train, queries = parts(problem)
    rows = made.rows(DAMPING)
    store = Store.create(tmp_path / "s", projection=rows, n_samples=len(batch), dtype="float32")
    store.add_checkpoint("final", params)
    options: Any = {"collate": torch.stack, "batch_size": 4, "progress": False}
    project_dataset(
        model, params, Samples(batch), rows, store, checkpoint="final", **options
    )  # fmt: skip
    made.save(tmp_path / "c.safetensors")
    again = gf.curvature.load(tmp_path / "c.safetensors", params).rows(DAMPING)
    opened = Store.open(tmp_path / "s", projection=again)
    found = opened.scores(gf.ghost_project(model, params, queries, again))
    expected = gf.influence(model, params, train, queries, curvature=made, damping=DAMPING)
    torch.testing.assert_close(found.double(), expected.mT, rtol=1e-5, atol=1e-6)
    for other in (made.rows(0.1), made.rows(DAMPING, columns=9)):
        with pytest.raises(IncompatibleStoreError, match="another curvature"):
            Store.open(tmp_path / "s", projection=other)
    with pytest.raises(IncompatibleStoreError, match=r"projection=curvature\.rows"):
        Store.open(tmp_path / "s")


class Loader:
    batches: ClassVar[list[Tensor]] = [torch.randn(2, 6, 4).double()]

    def __iter__(self) -> Any:
        return iter(self.batches)


def test_the_cheaper_way_is_counted() -> None:
    model, params, batch = linear()
    made = gf.curvature.ekfac(model, params, [batch], fisher="empirical")

    def plan(n: int, m: int, **options: Any) -> gf.curvature.InfluencePlan:
        sides = batch[:1].expand(n, -1, -1), batch[:1].expand(m, -1, -1)
        return gf.curvature.influence_plan(model, params, *sides, **{"curvature": made, **options})

    few, many = plan(50, 1), plan(200, 100)
    assert few.way == "directions"
    assert many.way == "rows"
    for made_plan in (few, many):
        assert made_plan.rows is not None
        assert made_plan.directions is not None
        assert (made_plan.rows < made_plan.directions) == (made_plan.way == "rows")
        assert made_plan.way in str(made_plan)
        assert f"{made_plan.rows:.3e}" in str(made_plan)
    # n + m samples are rotated, n m numbers are inner products.
    assert plan(400, 100).rows < 4 * (many.rows or 0)
    assert plan(200, 100, way="directions").why == "as asked"
    assert plan(200, 100, per_position=True).way == "directions"
    assert plan(200, 100, curvature=None).way == "directions"
    loader = gf.curvature.influence_plan(model, params, Loader(), batch, curvature=made)
    assert loader.way == "directions"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"way": "row"}, "way"),
        ({"way": "rows", "curvature": None, "damping": None}, "EKFAC"),
        ({"way": "rows", "per_position": True}, "per_position"),
    ],
)
def test_ways_that_do_not_exist(options: dict[str, Any], said: str) -> None:
    problem = linear()
    made, train, queries = parts(problem)
    given = {"curvature": made, "damping": DAMPING, **options}
    with pytest.raises(gf.OptionError, match=said):
        gf.influence(problem[0], problem[1], train, queries, **given)


def test_a_fault_in_a_row_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = linear()
    model, params, batch = problem
    made, *_ = parts(problem)
    right = RowReader.read

    def wrong(self: RowReader, factor: Any) -> Tensor:
        x = right(self, factor)
        return x if type(factor).__name__ == "Dense" else x * 1.01

    monkeypatch.setattr(RowReader, "read", wrong)
    with pytest.raises(gf.GhostError):
        gf.ghost_project(model, params, batch, made.rows(DAMPING))
