"""The bench's own arithmetic: ratios, floors, slopes, verdicts. Nothing is timed here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = (
    "shapes", "exact", "flops", "measure", "rows", "scaling", "verdict", "recorded", "report",
)  # fmt: skip


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The bench's modules, which are scripts beside each other and no package."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in NAMES})
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def line(bench: SimpleNamespace, mine: dict[str, Any], base: dict[str, Any], **options: Any) -> Any:
    row = bench.rows.Row("work", "step", "256", "step", "plain", **{"target": 1.2, **options})
    return bench.verdict.judge(row, {"step/256": {"step": mine, "plain": base}})


def test_a_ratio_is_the_median_of_rounds(bench: SimpleNamespace) -> None:
    """The last round, in which the machine was slow for both, counts as one."""
    got = line(bench, {"times": [3.0, 4.0, 12.0]}, {"times": [2.0, 2.0, 8.0]})
    assert (got.value, got.spread, got.met) == (1.5, (1.5, 1.75), "not met")
    assert line(bench, {"times": [2.4] * 3}, {"times": [2.0] * 3}).met == "met"


def test_a_floor_divides_by_the_operations(bench: SimpleNamespace) -> None:
    mine, base = {"times": [3.0] * 3, "flops": 40}, {"times": [2.0] * 3, "flops": 20}
    got = line(bench, mine, base, figure="floor")
    assert (got.value, got.met) == (0.75, "met")
    assert "2.00 of the plain step" in got.note


def test_peaks(bench: SimpleNamespace) -> None:
    got = line(bench, {"peak": 3_000_000}, {"peak": 2_000_000}, figure="peak")
    assert (got.value, got.note) == (1.5, "3 MB against 2 MB")


def test_fast_and_wrong_is_called_wrong(bench: SimpleNamespace) -> None:
    times = {"times": [1.0] * 3}
    assert line(bench, {**times, "error": 0.1}, times).met == "wrong"
    got = line(bench, times, {**times, "error": 0.2})
    assert (got.met, got.note) == ("met", "the peer's numbers are wrong")
    assert "2e-01" in bench.report.text(got)


def test_what_cannot_be_had_says_why(bench: SimpleNamespace) -> None:
    times = {"times": [1.0] * 3}
    got = line(bench, {"fails": "TypeError: no"}, times)
    assert (got.value, got.met, got.note) == (None, "-", "step fails: TypeError: no")
    row = bench.rows.ROWS[0]
    assert bench.verdict.judge(row, {}).note == "not run"
    assert bench.verdict.judge(row, {row.process: {"fails": "killed"}}).note == "fails: killed"


@pytest.mark.parametrize(("exponent", "met"), [(1.0, "met"), (0.5, "met"), (1.3, "not met")])
def test_growth(bench: SimpleNamespace, exponent: float, met: str) -> None:
    sizes = [2, 4, 8, 16]
    run = {"sizes": sizes, "step": [s**exponent for s in sizes], "plain": [3.0 * s for s in sizes]}
    row = next(x for x in bench.rows.ROWS if x.key == "scaling/n/step/slope")
    got = bench.verdict.judge(row, {"scaling/n": run})
    assert got.value == pytest.approx(exponent)
    assert (got.met, got.note) == (met, "plain step 1.00")


def test_regressions(bench: SimpleNamespace) -> None:
    times = {"times": [1.0] * 3}
    slower, gone = line(bench, {"times": [1.2] * 3}, times), line(bench, {"fails": "x"}, times)
    key = slower.row.key
    regressions = bench.verdict.regressions
    assert regressions([slower], {key: 1.1}) == []
    assert regressions([slower], {key: 1.0}) == [f"{key}: 1.00 recorded, now 1.20"]
    assert regressions([gone], {key: 1.0}) == [f"{key}: 1.00 recorded, now step fails: x"]
    assert regressions([slower], {}) == []


def test_ratios_are_those_of_a_processor(bench: SimpleNamespace, tmp_path: Path) -> None:
    recorded, path = bench.recorded, tmp_path / "recorded.json"
    assert recorded.processor()
    assert recorded.ratios(path, "Some 100") == {}
    recorded.record(path, "Some 100", {"a": 1.0, "b": 2.0})
    recorded.record(path, "Some 100 rev 2", {"b": 3.0})
    recorded.record(path, "Other", {"a": 5.0})
    assert recorded.ratios(path, "Some 100") == {"a": 1.0, "b": 3.0}
    assert recorded.ratios(path, "Other") == {"a": 5.0}
    assert recorded.ratios(path, "Third") == {}


def test_every_row_has_a_name_a_process_and_a_place_in_the_page(bench: SimpleNamespace) -> None:
    rows = bench.rows.ROWS
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        known = bench.scaling.SIZES if row.job == "scaling" else bench.shapes.SHAPES
        assert row.job in {*bench.rows.JOBS, "scaling"}
        assert row.shape in known
    page = bench.report.markdown(
        [bench.verdict.judge(row, {}) for row in rows], 2, onednn="ours", memory_kept=True
    )
    assert page.count("not run") == len(rows)


def test_measuring(bench: SimpleNamespace) -> None:
    a, b = torch.ones(4, 5), torch.ones(5, 6)
    contestant = bench.measure.Contestant

    def failing() -> None:
        raise ValueError("not\nthis")

    found = bench.measure.measure(
        {
            "product": contestant(lambda: a @ b, torch.full((4, 6), 5.0), counted=True),
            "wrong": contestant(lambda: 2 * (a @ b), torch.full((4, 6), 5.0)),
            "failing": contestant(failing),
        },
        seconds=0.0,
    )
    assert found["failing"] == {"fails": "ValueError: not this"}
    assert found["product"]["flops"] == 2 * 4 * 5 * 6

    assert found["product"]["peak"] == 4 * 4 * 6
    assert (found["product"]["error"], found["wrong"]["error"]) == (0.0, 1.0)
    assert len(found["product"]["times"]) == len(found["wrong"]["times"]) == bench.measure.LEAST


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_products_of_onednn_are_counted(bench: SimpleNamespace) -> None:
    x, w = torch.randn(4, 5), torch.randn(6, 5)
    with bench.flops.CountFlops() as flops:
        torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    assert flops.total == 2 * 4 * 5 * 6


def test_what_is_exact(bench: SimpleNamespace) -> None:
    """Against ghostfunc, on the tied model and on the untied one."""
    import ghostfunc as gf

    shapes = bench.shapes
    ids = shapes.TINY.ids()
    train, val = ids[:3], ids[3:]
    for make, loss in ((shapes.gpt2, shapes.gpt2_loss), (shapes.untied_gpt, shapes.untied_loss)):
        module = make(shapes.TINY)
        right = bench.exact.exact(module, loss, train, val)
        args = gf.from_module(module, loss)
        error = bench.exact.error
        assert error(gf.ghost_dot_prod(*args, train, val), right.scores) < 1e-5
        assert error(gf.ghost_norm(*args, train), right.norms) < 1e-5
        clipped = gf.ghost_clipped_grad(*args, train, max_norm=bench.exact.MAX_NORM)
        assert error(clipped.grads, right.clipped) < 1e-5
