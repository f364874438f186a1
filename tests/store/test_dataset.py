"""From a dataset to a store: complete, resumable after kill -9, shared by processes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import weakref
from collections import OrderedDict, UserDict
from pathlib import Path
from typing import Any

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
from transformers import BatchEncoding

import ghostfunc as gf
from benchmarks.live_bytes import LiveBytes
from ghostfunc.projection import adam_scaled
from ghostfunc.store import Damage, IncompatibleStoreError, Store, project_dataset

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
    (tmp_path / "s/checkpoints/final/rows/c.1.0").write_bytes(b"torn")
    store.discard(store.check())
    assert fill(store, 30) == 8
    torch.testing.assert_close(store.read(range(30), "final"), expected(30), rtol=1e-4, atol=1e-5)


def test_shards_are_disjoint_and_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "s", 21)
    assert fill(store, 21, shard=(1, 2)) == 8
    assert store.missing("final") == [range(8), range(16, 21)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(gf.OptionError, match=r"WORLD_SIZE=2 .* init_process_group\(\) first"):
        fill(store, 21)
    assert fill(store, 21, shard=(0, 2)) == 13
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert fill(store, 21) == 0
    with pytest.raises(gf.OptionError, match=r"shard=\(2, 2\)"):
        fill(store, 21, shard=(2, 2))


@pytest.mark.parametrize("kind", [UserDict, OrderedDict, BatchEncoding])
def test_batches_may_be_mappings_of_any_kind(tmp_path: Path, kind: Any) -> None:
    store = make_store(tmp_path / "s", 21)
    assert fill(store, 21, collate=lambda samples: kind(collate(samples))) == 21
    torch.testing.assert_close(store.read(range(21), "final"), expected(21), rtol=1e-4, atol=1e-5)


def test_a_batch_has_a_row_for_every_sample(tmp_path: Path) -> None:
    """A single row would be written for all of them."""
    store = make_store(tmp_path / "s", 21)
    with pytest.raises(gf.BatchError, match="what collate returned holds 1 samples, made of 3"):
        fill(store, 21, collate=lambda samples: collate(samples[:1]))
    assert len(store.finished("final")) == 0


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


def run(*command: str | Path) -> str:
    """Run Python on one thread, next to this file; its output."""
    places = [str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    command = (sys.executable, *map(str, command))
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=120
    ).stdout


def files(root: Path) -> dict[Path, bytes]:
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_killed_at_random_moments_it_resumes_to_the_same_bits(tmp_path: Path) -> None:
    n, kills = 480, 8
    whole, store = make_store(tmp_path / "whole", n), make_store(tmp_path / "s", n)
    assert fill(whole, n) == n
    ends = run(HERE / "kill_server.py", tmp_path / "s", str(n), str(kills), "0").split()
    assert ends == ["killed"] * kills
    left = sum(map(len, store.missing("final")))
    assert 0 < left < n  # they did get to work
    assert fill(store, n) == left
    assert store.check() == []
    assert files(tmp_path / "s") == files(tmp_path / "whole")  # and nothing is left behind


def test_what_a_killed_write_left_is_swept_up(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", 9)
    fill(store, 9)
    before = files(tmp_path / "s")
    rows = tmp_path / "s/checkpoints/final/rows"
    (rows / "c.0.0.partial").write_bytes(b"half a ch")
    store.discard([Damage("final", store.chunk(0), "")])
    assert fill(store, 9) == 8
    assert files(tmp_path / "s") == before


def test_a_flipped_byte_in_every_chunk_file_is_found_and_its_rows_made_again(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path / "s", 21)
    fill(store, 21)
    before = files(tmp_path / "s")
    chunks = [p for p in before if p.name.startswith("c.")]
    assert len(chunks) == 6  # rows and marks of three chunks
    chance = random.Random(0)
    for path in chunks:
        data = bytearray(before[path])
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        (tmp_path / "s" / path).write_bytes(data)
        damage = store.check()
        assert [d.rows for d in damage] == [store.chunk(int(path.name.split(".")[1]))]
        store.discard(damage)
        assert fill(store, 21) == len(damage[0].rows)
        assert files(tmp_path / "s") == before


def test_ranks_of_torchrun_share_the_work(tmp_path: Path) -> None:
    out = run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(HERE / "torchrun_worker.py", tmp_path / "s"),
    )
    written = json.loads(out.splitlines()[-1])
    store = Store.open(tmp_path / "s")
    assert written == [[list(store.chunk(i)) for i in own] for own in ((0, 4), (2,))]
    assert store.check() == []
    torch.testing.assert_close(store.read(range(40), "final"), expected(40), rtol=1e-4, atol=1e-5)


class Lazy:
    """A dataset that makes a sample when asked, and counts how many are alive."""

    def __init__(self, n: int) -> None:
        self._data = make_data(n)
        self.alive = self.most = 0

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> torch.Tensor:
        sample = self._data[i].clone()
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(sample, self._free)
        return sample

    def _free(self) -> None:
        self.alive -= 1


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    peaks = []
    for n in (40, 200):
        store, data = make_store(tmp_path / f"{n}", n), Lazy(n)
        arguments = {"checkpoint": "final", "collate": collate, "length": len, "batch_size": 3}
        with LiveBytes() as log:
            project_dataset(
                model_fn, make_params(), data, make_projection(), store, progress=False, **arguments
            )
        assert data.most <= 12  # this batch, the next, and one whose length is being read
        peaks.append(log.peak)
    assert peaks[1] < 1.5 * peaks[0]  # of a corpus five times as large, read ahead by a thread


def test_samples_of_like_length_share_a_batch(tmp_path: Path) -> None:
    batches: list[list[int]] = []

    def noted(samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        batches.append([len(s) for s in samples])
        return collate(samples)

    store = make_store(tmp_path / "s", 24, chunk_rows=24)
    fill(store, 24, collate=noted)
    lengths = [x for batch in batches for x in batch]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 4


def test_the_progress_bar_counts_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "s", 21)
    fill(store, 21, shard=(1, 3), progress=True)
    assert capsys.readouterr().err == ""  # only rank 0 shows one
    fill(store, 21, progress=True)
    assert "13/13" in capsys.readouterr().err
