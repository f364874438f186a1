"""The demo's figure shows the numbers it names."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

import ghostfunc as gf

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def demo() -> Any:
    """The demo's module, imported as the script finds its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("demo")
    for name in ("demo", "demo_report", "demo_corpus"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def results(demo: Any) -> Any:
    """All that a demo of a very small model finds out, and what it was asked of."""
    config = demo.Config(width=16, layers=1, chunk_bytes=24)
    torch.manual_seed(0)
    domains = sys.modules["demo_corpus"].DOMAINS
    pool = demo.Pool.of({domain: torch.randint(256, (4, 24)) for domain in domains})
    batches = [{"input_ids": chunks} for chunks in pool.chunks.split(5)]
    vals = {domain: {"input_ids": torch.randint(256, (3, 24))} for domain in domains}
    model_fn, params = gf.hf.causal_lm(demo.build_model(config).eval())
    with demo.progress_bars() as progress:
        dots, norms, val_norms = demo.score_every_domain(model_fn, params, batches, vals, progress)
    found = sys.modules["demo_report"].Results(
        target="manual",
        pool=pool,
        losses=[1.0] * 20,
        n_params=1,
        scores=dots["manual"],
        dots=dots,
        norms=norms,
        val_norms=val_norms,
        verification=None,
        seconds={},
        n_timed=1,
        n_val=3,
    )
    return found, model_fn, params, vals


def test_cosines_are_cosines(results: Any) -> None:
    found, model_fn, params, vals = results
    train = {"input_ids": found.pool.chunks}
    for domain, val in vals.items():
        expected = gf.ghost_cosine(model_fn, params, train, val)
        torch.testing.assert_close(found.cosines(domain), expected, rtol=1e-4, atol=1e-5)


def test_the_figure_shows_cosines(demo: Any, results: Any) -> None:
    found = results[0]
    axes = Figure().subplots()
    sys.modules["demo_report"].draw_domains(axes, found)
    (image,) = axes.images
    shown = torch.as_tensor(image.get_array().data)
    order = [label.get_text() for label in axes.get_yticklabels()]
    assert sorted(order) == sorted(found.dots)
    members = [found.pool.members(domain) for domain in order]
    expected = [[found.cosines(target)[m].mean() for m in members] for target in order]
    torch.testing.assert_close(shown, torch.tensor(expected).to(shown))
    assert shown.abs().max() <= 1
    assert [float(text.get_text()) for text in axes.texts] == [
        round(x, 2) for x in shown.flatten().tolist()
    ]


def test_both_panels_have_the_domains_in_one_order(demo: Any, results: Any, pictures: Path) -> None:
    found = results[0]
    report = sys.modules["demo_report"]
    report.plot_scores(found, pictures / "demo.png")
    left, right = Figure().subplots(1, 2)
    report.draw_distributions(left, found)
    report.draw_domains(right, found)
    rows = [label.get_text() for label in left.get_yticklabels()]
    assert rows[::-1] == [label.get_text() for label in right.get_yticklabels()]
    assert len(left.collections) == len(rows)  # a cloud of dots per domain
