"""A table of scores: ranking, files, notebook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import ghostfunc as gf

SCORES = gf.Scores(
    ["a", "b", "c", "d"],
    {"loss": torch.arange(4.0), "dot_higher_helps": torch.tensor([0.5, -1.0, 2.0, 0.5])},
    {"token_budget": 64},
)


def test_best_and_worst() -> None:
    assert SCORES.ranking == "dot_higher_helps"
    assert SCORES.top(3).ids == ["c", "a", "d"]
    assert SCORES.bottom(2).ids == ["b", "a"]
    assert SCORES.top(1, by="loss").ids == ["d"]
    assert SCORES.top(2)["loss"].tolist() == [2, 0]


def test_the_sign_is_that_of_a_step() -> None:
    w = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    pool, target = torch.randn(2, 6, 2, dtype=torch.float64)

    def model_fn(p: Any, x: torch.Tensor) -> torch.Tensor:
        return (x @ p["w"]).sin()

    scores = gf.score_dataset(model_fn, w, pool, val=target)
    lr = 1e-6
    before = model_fn(w, target).mean()
    for i in range(len(pool)):
        (g,) = gf.per_sample_grads(model_fn, w, pool[i : i + 1])["w"]
        change = model_fn({"w": w["w"] - lr * g}, target).mean() - before
        assert change.item() == pytest.approx(scores.loss_change(lr)[i].item(), rel=1e-3, abs=1e-12)
        assert (scores["dot_higher_helps"][i] > 0) == (change < 0)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "scores.parquet"
    SCORES.to_parquet(path)
    table = pq.read_table(path)
    assert table.column_names == ["id", "loss", "dot_higher_helps"]
    assert table["id"].to_pylist() == ["a", "b", "c", "d"]
    assert json.loads(table.schema.metadata[b"ghostfunc"]) == {"token_budget": 64}
    assert [p.name for p in path.parent.iterdir()] == ["scores.parquet"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    SCORES.to_parquet(path)
    before = path.read_bytes()
    broken = gf.Scores([object()], {"dot_higher_helps": torch.zeros(1)})
    with pytest.raises(Exception, match="object"):
        broken.to_parquet(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_pandas() -> None:
    pytest.importorskip("pandas")
    frame = SCORES.to_pandas()
    assert frame.loc["c", "dot_higher_helps"] == 2
    assert list(frame.columns) == ["loss", "dot_higher_helps"]


def test_a_picture() -> None:
    from matplotlib.figure import Figure

    axes = SCORES.plot(axes=Figure().subplots())
    assert sum(patch.get_height() for patch in axes.patches) == 4  # type: ignore[attr-defined]
    assert axes.get_xlabel() == "dot higher helps"
    assert axes.get_title(loc="left") == "4 samples, 75% above zero"


def test_in_a_notebook() -> None:
    assert repr(SCORES) == (
        "Scores(4 samples; loss, dot_higher_helps; dot_higher_helps from -1 to 2)"
    )
    many = gf.Scores(
        [f"<b>{i}</b>" for i in range(9999)], {"dot_higher_helps": torch.linspace(-1, 1, 9999)}
    )
    page = many._repr_html_()
    assert page.count("<tr>") == 1 + 5 + 1 + 5
    assert "<b>" not in page
    assert "&lt;b&gt;9998&lt;/b&gt;" in page
    assert len(page) < 1500
    assert SCORES.take([])._repr_html_().startswith("Scores(0 samples")
    assert SCORES.take([0])._repr_html_().count("<tr>") == 2


def test_errors() -> None:
    with pytest.raises(gf.OptionError, match="no column 'dots'; there are"):
        SCORES["dots"]
    with pytest.raises(gf.OptionError, match="between 1 and all 4"):
        SCORES.top(5)
    with pytest.raises(gf.OptionError, match="no column ranks"):
        gf.Scores(["a"], {"loss": torch.zeros(1)}).top(1)
    with pytest.raises(gf.OptionError, match="shape"):
        gf.Scores(["a"], {"loss": torch.zeros(2)})
    with pytest.raises(gf.OptionError, match="changes by dot products"):
        SCORES.loss_change(0.1, by="loss")
