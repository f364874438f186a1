"""Several processes, each with batches of its own, make the curvature of all of them."""

from __future__ import annotations

from pathlib import Path

import torch
from forks import forked
from processes import curvatures, model, problem

import ghostfunc as gf


def test_two_processes_make_one_curvature(tmp_path: Path) -> None:
    running = [forked(curvatures, rank, tmp_path) for rank in range(2)]
    for process in running:
        process.join(400)
    assert [process.exitcode for process in running] == [0, 0]
    params, batches = problem()
    expected = gf.curvature.ekfac(model, params, batches, fisher="empirical").solve(params, 0.1)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert said[1].startswith("NonFiniteLossError: ")
    failed = "looking at its first batches, rank 1 failed with NonFiniteLossError"
    assert said[0].startswith("RankError: gf.curvature.ekfac: while ")
    assert failed in said[0]
    for rank in range(2):
        made = gf.curvature.load(tmp_path / f"{rank}.safetensors", params)
        assert made.samples == 18
        for name, x in made.solve(params, 0.1).items():
            torch.testing.assert_close(x, expected[name], rtol=1e-9, atol=1e-12)
