"""Scores change nothing, processes change nothing, and neither does being killed."""

from __future__ import annotations

import json
import random
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    distance,
    make_config,
    run_alone,
    run_together,
    scores,
    start,
    weights,
    write_tokens,
)

from examples.graddotprod_lm import atomic
from examples.graddotprod_lm.config import Config
from examples.graddotprod_lm.log import read_metrics
from examples.graddotprod_lm.scores import ScoreLog, Table


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pile")
    write_tokens(folder)
    return folder


@pytest.fixture(scope="module")
def alone(pile: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """50 steps of one process, with scores."""
    config = make_config(pile, tmp_path_factory.mktemp("alone"))
    run_alone(config)
    return config


@pytest.fixture(scope="module")
def together(pile: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The same of two processes."""
    config = make_config(pile, tmp_path_factory.mktemp("together"))
    run_together(config, 2)
    return config


def test_scores_do_not_change_the_weights(alone: Config, pile: Path, tmp_path: Path) -> None:
    plain = make_config(pile, tmp_path, method="Regular")
    run_alone(plain)
    assert distance(weights(alone), weights(plain)) <= 1e-6
    assert not list((plain.run_dir / "scores").iterdir())


def test_scores_do_not_change_the_weights_of_two_processes(
    together: Config, pile: Path, tmp_path: Path
) -> None:
    plain = make_config(pile, tmp_path, method="Regular")
    run_together(plain, 2)
    assert distance(weights(together), weights(plain)) <= 1e-6


def test_two_processes_are_one(alone: Config, together: Config) -> None:
    """Each rank has its own rows; the validation direction and the gradient are averaged."""
    one, two = scores(alone), scores(together)
    for column in ("step", "domain", "sample", "learning_rate"):
        np.testing.assert_array_equal(vars(one)[column], vars(two)[column])
    np.testing.assert_allclose(two.loss, one.loss, rtol=1e-6, atol=1e-6)
    scale = np.abs(one.dot_prod).max()
    np.testing.assert_allclose(two.dot_prod, one.dot_prod, atol=1e-6 * scale, rtol=0)
    assert distance(weights(alone), weights(together)) <= 1e-6
    first, second = (read_metrics(c.run_dir / "metrics.jsonl") for c in (alone, together))
    assert [m["step"] for m in first] == [m["step"] for m in second]
    log = (together.run_dir / "log-rank1.jsonl").read_text("utf-8").splitlines()
    assert json.loads(log[0])["rank"] == 1
    assert json.loads(log[0])["level"] == "INFO"


def assert_whole(config: Config) -> None:
    """Every file that has its name can be read."""
    for path in config.run_dir.rglob("*"):
        if path.is_dir() or path.name.endswith(atomic.PARTIAL):
            continue
        match path.suffix:
            case ".pt":
                torch.load(path, weights_only=True)
            case ".npz":
                assert len(Table.read(path)) > 0
            case ".json":
                json.loads(path.read_text("utf-8"))
            case ".jsonl":
                for line in path.read_text("utf-8").splitlines():
                    json.loads(line)
            case other:
                pytest.fail(f"what is {other}?")


def known(config: Config) -> list[dict[str, float]]:
    """The metrics that do not depend on the clock."""
    lines = read_metrics(config.run_dir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def await_steps(process: BaseProcess, config: Config) -> None:
    """Wait until the run is past what it was begun with, or over."""
    path = config.run_dir / "metrics.jsonl"
    before = len(read_metrics(path))
    while len(read_metrics(path)) <= before and process.exitcode is None:
        process.join(0.01)


def test_killed_and_resumed(pile: Path, tmp_path: Path) -> None:
    """Kill -9 at random moments; the run that is left ends like one that nobody killed."""
    settings = {"max_steps": 60, "dot_prod_save_interval": 2, "eval_interval": 10}
    whole = make_config(pile, tmp_path / "whole", **settings)
    run_alone(whole)
    config = make_config(pile, tmp_path / "killed", **settings)
    rng = random.Random(0)
    reached: list[int] = []
    for _ in range(8):
        process = start(config)
        if rng.random() < 0.8:
            await_steps(process, config)
        process.join(rng.uniform(0, 0.2))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        if config.run_dir.exists():
            assert_whole(config)
            pieces = ScoreLog(config.run_dir).pieces()
            reached.append(max((last for _, last, _ in pieces), default=0))
    run_alone(config)
    # The kills came at different places of the run, not all before it began.
    assert len(set(reached)) >= 3, reached

    assert not list(config.run_dir.rglob("*" + atomic.PARTIAL))
    assert_whole(config)
    ours, theirs = scores(config), scores(whole)
    for column, values in vars(theirs).items():
        np.testing.assert_array_equal(vars(ours)[column], values)
    assert distance(weights(config), weights(whole)) == 0
    assert known(config) == known(whole)
    results = [json.loads((c.run_dir / "results.json").read_text("utf-8")) for c in (config, whole)]
    assert {**results[0], "config": None} == {**results[1], "config": None}
