"""From a dataset to a store: complete, resumable after kill -9, shared by processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optree
import pytest
import torch
from helpers import (
    collate,
    expected,
    fill,
    make_data,
    make_params,
    make_projection,
    make_store,
    model_fn,
)

import ghostfunc as gf
from ghostfunc.projection import adam_scaled
from ghostfunc.store import IncompatibleStoreError, Store, project_dataset

HERE = Path(__file__).parent


def test_every_row_is_its_samples_projected_gradient(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", 21)
    assert fill(store, 21) == 21
    torch.testing.assert_close(store.read(range(21), "final"), expected(21), rtol=1e-4, atol=1e-5)
    assert fill(store, 21) == 0


def test_append_and_damage_are_completed(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", 21)
    fill(store, 21)
    store.append(9)
    assert fill(store, 30) == 9
    store.discard(store.check())
    (tmp_path / "s/checkpoints/final/rows/c/1/0").write_bytes(b"torn")
    store.discard(store.check())
    assert fill(store, 30) == 8
    torch.testing.assert_close(store.read(range(30), "final"), expected(30), rtol=1e-4, atol=1e-5)


def test_shards_are_disjoint_and_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "s", 21)
    assert fill(store, 21, shard=(1, 2)) == 8
    assert store.missing("final").tolist() == [*range(8), *range(16, 21)]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert fill(store, 21) == 13
    monkeypatch.delenv("RANK")
    with pytest.raises(gf.OptionError, match="only one of"):
        fill(store, 21)
    with pytest.raises(gf.OptionError, match=r"shard=\(2, 2\)"):
        fill(store, 21, shard=(2, 2))


def test_mismatches_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", 21)
    with pytest.raises(gf.OptionError, match="20 samples, the store room for 21"):
        fill(store, 20)
    arguments = {"checkpoint": "final", "collate": collate, "batch_size": 2, "progress": False}
    with pytest.raises(IncompatibleStoreError, match="different models"):
        project_dataset(
            model_fn, make_params(5), make_data(21), make_projection(), store, **arguments
        )
    with pytest.raises(IncompatibleStoreError, match="differ in seed"):
        project_dataset(
            model_fn, make_params(), make_data(21), make_projection(5), store, **arguments
        )


def test_gradients_may_be_transformed_first(tmp_path: Path) -> None:
    params = make_params()
    m = optree.tree_map(lambda x: 0.1 * torch.ones_like(x), params)
    v = optree.tree_map(lambda x: 0.2 * torch.ones_like(x), params)
    transform = adam_scaled(m, v, step=9, betas=(0.9, 0.99), eps=1e-8)
    store = make_store(tmp_path / "s", 9)
    assert fill(store, 9, transform=transform) == 9
    x = make_data(9)[4]
    grads = gf.per_sample_grads(model_fn, params, collate([x]))
    steps = {
        name: (
            ((0.9 * m[name] + 0.1 * g) / (1 - 0.9**10))
            / (((0.99 * v[name] + 0.01 * g**2) / (1 - 0.99**10)).sqrt() + 1e-8)
        )
        for name, g in grads.items()
    }
    torch.testing.assert_close(
        store.read([4], "final"), make_projection().apply(steps), rtol=1e-4, atol=1e-5
    )


def start(path: Path, n: int, shard: str = "0 1") -> subprocess.Popen[bytes]:
    code = (
        "import torch; torch.set_num_threads(1); import sys; sys.path.insert(0, sys.argv[1])\n"
        "from helpers import fill; from ghostfunc.store import Store\n"
        "print('ready', flush=True)\n"
        "fill(Store.open(sys.argv[2], writable=True), int(sys.argv[3]),"
        " shard=tuple(map(int, sys.argv[4].split())))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(HERE), str(path), str(n), shard],
        stdout=subprocess.PIPE,
        env=environment,
    )


def test_killed_at_any_moment_it_resumes_to_the_same_bits(tmp_path: Path) -> None:
    n = 400
    whole, store = make_store(tmp_path / "whole", n), make_store(tmp_path / "s", n)
    fill(whole, n)
    for chunks, jitter in ((1, 0.003), (25, 0.0)):
        process = start(tmp_path / "s", n)
        while len(store.missing("final")) > n - 8 * chunks:
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(jitter)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    left = len(store.missing("final"))
    assert 0 < left < n
    assert fill(store, n) == left
    assert store.check() == []
    for part in ("rows", "done"):
        chunks = list((tmp_path / "whole/checkpoints/final" / part / "c").rglob("*"))
        for path in filter(Path.is_file, chunks):
            twin = tmp_path / "s" / path.relative_to(tmp_path / "whole")
            assert twin.read_bytes() == path.read_bytes()


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", 40)
    processes = [start(tmp_path / "s", 40, f"{rank} 2") for rank in (0, 1)]
    assert [p.communicate() and p.returncode for p in processes] == [0, 0]
    assert store.check() == []
    torch.testing.assert_close(
        Store.open(tmp_path / "s").read(range(40), "final"), expected(40), rtol=1e-4, atol=1e-5
    )
