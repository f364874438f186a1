from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings
from problems import CASES, Problem

from ghostfunc._factors import cost

torch.set_num_threads(1)  # the tests run side by side

settings.register_profile(
    "ghostfunc",
    deadline=None,
    max_examples=20,
    derandomize=True,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
settings.load_profile("ghostfunc")


FIRST = {
    "distributed/test_fsdp.py",
    "transforms/test_compile.py",
    "transforms/test_packed.py",
    "hf/test_settings.py",
    "cli/test_influence.py",
    "project/test_runs.py",
}
"""The files that take longest come first: no process begins one of them when the others end."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "/".join(item.path.parts[-2:]) not in FIRST)


def pytest_collection_finish() -> None:
    """What is there before the first test stays until the last: full collections, of which every
    training run of transformers makes several, need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    # What torch.vmap says of fused attention and weight norm: slow, and right.
    config.addinivalue_line("filterwarnings", "ignore:There is a performance drop:UserWarning")


@pytest.fixture(params=CASES, scope="module")
def problem(request: pytest.FixtureRequest) -> Problem:
    """A problem of `CASES`. The tests of a file share it, and so its traces."""
    return CASES[request.param]()


@pytest.fixture(params=[True, False], ids=["factored", "dense"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form that every validation gradient is kept in. Other tests leave it to the cost."""
    monkeypatch.setattr(cost, "keep_direction_factored", lambda *_, **__: request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where pictures of pages and figures go: GHOSTFUNC_PICTURES, to be looked at, or nowhere."""
    folder = Path(os.environ.get("GHOSTFUNC_PICTURES", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
