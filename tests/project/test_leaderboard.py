"""The leaderboard's own arithmetic: truth, intervals, tables. Nothing is timed here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

BOARD = Path(__file__).resolve().parents[2] / "benchmarks" / "leaderboard"
NAMES = ("tasks", "retrain", "methods", "peers", "measure", "report", "run")


@pytest.fixture(scope="module")
def board() -> Iterator[SimpleNamespace]:
    """The leaderboard's modules, which are scripts beside each other and no package."""
    before = set(sys.modules)
    paths = [str(BOARD), str(BOARD.parents[1] / "examples")]
    sys.path[:0] = paths
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in NAMES})
    finally:
        for path in paths:
            sys.path.remove(path)
        for name in set(sys.modules) - before:
            file = str(getattr(sys.modules[name], "__file__", ""))
            if any(file.startswith(path) for path in paths):
                del sys.modules[name]


def small(board: SimpleNamespace, key: str) -> Any:
    """A task of three steps."""
    import dataclasses

    task = board.tasks.TASKS[key](0, quick=True)
    return dataclasses.replace(task, steps=task.steps[:3], subsets=4)


@pytest.mark.parametrize("key", ["mlp", "conv", "gpt2"])
def test_models_trained_together_are_those_trained_alone(board: SimpleNamespace, key: str) -> None:
    import ghostfunc as gf

    task = small(board, key)
    kept = board.retrain.subsets(task, 0.5, seed=0)[:2]
    assert kept.sum(1).tolist() == [task.n - task.n // 2] * 2
    together = board.retrain.retrained(task, kept.float())
    training = gf.unrolled.Training(
        task.model_fn, task.params, task.steps, optimizer=task.optimizer, weights=kept[1].float()
    )
    alone = gf.unrolled.train(training, keep_every=3).params
    for name, x in alone.items():
        torch.testing.assert_close(together[name][1], x, rtol=1e-3, atol=1e-4)
    found = board.retrain.query_losses(task, together)[1]
    torch.testing.assert_close(found, task.model_fn(alone, task.queries), rtol=1e-3, atol=1e-4)


def test_a_datamodeling_score_is_a_rank_correlation(board: SimpleNamespace) -> None:
    kept = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=torch.bool)
    scores = torch.tensor([[3.0, 3.0], [2.0, 2.0], [1.0, 1.0]])
    losses = torch.tensor([[0.1, 3.0], [0.2, 2.0], [0.3, 1.0]])  # 0 helps most; 0 hurts most
    assert board.retrain.datamodeling_scores(scores, kept, losses) == pytest.approx([1.0, -1.0])
    assert board.retrain.datamodeling_scores(torch.zeros(3, 2), kept, losses) == [0.0, 0.0]


@pytest.mark.parametrize(
    "name", ["EK-FAC", "dot product", "cosine", "in-run Shapley", "plain loss"]
)
def test_methods_score_every_sample_for_every_query(board: SimpleNamespace, name: str) -> None:
    import ghostfunc as gf

    task = small(board, "mlp")
    trained = gf.unrolled.train(task.training(), keep_every=3)
    scores = board.methods.METHODS[name](task, trained)
    assert scores.shape == (task.n, len(task.queries["y"]))
    assert bool(scores.isfinite().all())


def test_an_interval_is_drawn_over_seeds_and_queries(board: SimpleNamespace) -> None:
    assert board.measure.interval([[0.5] * 4] * 3) == pytest.approx((0.5, 0.5, 0.5))
    mean, low, high = board.measure.interval([[0.0, 1.0] * 10, [0.2, 0.6] * 10])
    assert mean == pytest.approx(0.45)
    assert low < mean < high
    assert (low, high) == board.measure.interval([[0.0, 1.0] * 10, [0.2, 0.6] * 10])[1:]


def test_a_method_is_measured_in_a_process_of_its_own(board: SimpleNamespace) -> None:
    def grows() -> torch.Tensor:
        # Larger than what an allocator may have at hand from tests that ran before.
        return torch.ones(30, 2**20).cumsum(0)[:, :2]

    got = board.measure.measured(grows, limit=60)
    assert got.scores.shape == (30, 2)
    assert got.peak > 100 * 2**20  # bytes, of 126 MB and their sums
    assert got.seconds > 0

    def fails() -> torch.Tensor:
        raise RuntimeError("not today")

    assert "not today" in board.measure.measured(fails, limit=60).error


def row(mean: float, seconds: float, **rest: Any) -> dict[str, Any]:
    values = [mean - 0.05, mean + 0.05] * 5
    lds = dict.fromkeys(("0.05", "0.1", "0.5"), values)
    return {"lds": lds, "seconds": seconds, "peak": 2**20, "load": 1.0, **rest}


def test_tables_say_what_is_not_met(board: SimpleNamespace) -> None:
    rows = {
        "metagradients": row(0.95, 3.0),
        "EK-FAC": row(0.6, 1.0, agreement=0.8),
        "kronfluence EK-FAC": row(0.7, 9.0),
        "bergson": {"error": "no module"},
        "dot product": row(0.7, 1.0),
        "cosine": row(0.3, 1.0),
    }
    run = {"seed": 0, "rows": rows, "n": 4, "m": 2, "parameters": 1000}
    results = {
        "quick": True,
        "seconds": 60,
        "processors": 2,
        "versions": {"torch": "2"},
        "tasks": {k: {"name": k, "subsets": 3, "runs": [run]} for k in ("mlp", "gpt2")},
    }
    text = board.report.tables(results)
    lines = text.splitlines()
    assert "| bergson | not run: no module | | | | | |" in lines
    assert "| mlp: metagradients at least 0.9 (half) | 0.95 | met |" in lines
    assert "| gpt2: EK-FAC above dot and cosine (half) | 0.60 against 0.70 | NOT met |" in lines
    assert "| mlp: EK-FAC never slower than kronfluence | 1.0 s against 9.0 s | met |" in lines
    bad = [x for x in lines if "within its interval" in x]
    assert len(bad) == 6
    assert all(x.endswith("| NOT met |") for x in bad)
    assert any(x.startswith("| EK-FAC | 0.60 [0.5") and x.endswith("| 0.80 |") for x in lines)


def test_what_is_not_measured_anew_stays(board: SimpleNamespace) -> None:
    """Seed by seed and method by method; methods that are no more fall away."""

    def results(rows: dict[str, Any], torch_version: str, seeds: tuple[int, ...]) -> dict[str, Any]:
        runs = [{"seed": seed, "rows": dict(rows)} for seed in seeds]
        tasks = {"mlp": {"name": "mlp", "subsets": 3, "runs": runs}}
        versions = {"torch": torch_version, "bergson": "not installed"}
        return {"quick": False, "versions": versions, "tasks": tasks}

    before = results({"EK-FAC": row(0.6, 1.0), "gone": row(0.1, 1.0)}, "2.12", (0, 1))
    before["versions"]["bergson"] = "2.5.1"
    before["tasks"]["gpt2"] = before["tasks"]["mlp"]
    now = results({"metagradients": row(0.9, 1.0)}, "2.13", (1,))
    found = board.run.added(before, now)
    assert found["versions"] == {"torch": "2.13", "bergson": "2.5.1"}
    rows = [list(run["rows"]) for run in found["tasks"]["mlp"]["runs"]]
    assert rows == [["EK-FAC"], ["metagradients", "EK-FAC"]]
    assert found["tasks"]["gpt2"]["runs"][0]["rows"].keys() == {"EK-FAC"}
    assert board.run.added(None, now) is now
    with pytest.raises(ValueError, match="no table in common"):
        board.run.added({**before, "quick": True}, now)


def test_scores_at_mean_weights_depend_on_the_share(board: SimpleNamespace) -> None:
    task = small(board, "mlp")
    scores = board.methods.METHODS["metagradients, mean weights"](task, None)
    met = len(torch.cat([micro.ids for micro in task.steps]).unique())
    assert scores.shape == (len(board.methods.LEFT_OUT), met, len(task.queries["y"]))
    assert not torch.allclose(scores[0], scores[2], rtol=1e-3)


def test_the_figure_of_what_was_recorded(
    board: SimpleNamespace, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its colours differ in lightness, whatever eyes see; intervals are of few draws here."""
    from matplotlib.colors import to_rgb

    light = [sum(to_rgb(colour)) / 3 for colour in board.report.BLUES]
    assert all(a - b > 0.15 for a, b in pairwise(light))
    monkeypatch.setattr(board.report, "interval", partial(board.measure.interval, draws=40))
    recorded = json.loads((BOARD / "recorded.json").read_text())
    board.report.draw(recorded, pictures / "leaderboard.png")
    assert (pictures / "leaderboard.png").stat().st_size > 10_000
