"""Costs that do not grow with the store, and a query over several processes."""

from __future__ import annotations

import os
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Faulty, through
from forks import FORKS, forked
from helpers import make_projection, make_store

import ghostfunc as gf
from benchmarks.live_bytes import LiveBytes
from ghostfunc.store import IncompleteStoreError, Store, TopK, merge_topk

K = make_projection().k


def rows_of(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, K, generator=torch.Generator().manual_seed(seed))


class Counting(Faulty):
    """Counts what is asked of the operating system, listing folders too."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        out = super().__getattr__(name)
        if callable(out):
            self.counts[name] += 1
        return out


def mark_many(path: Path, count: int) -> None:
    """Marks of other chunks, as far as names go."""
    for number in range(10, 10 + count):
        (path / f"checkpoints/final/marks/c.{number}.0").touch()


@pytest.mark.parametrize("others", [0, 3000])
def test_writing_a_chunk_looks_at_no_other(tmp_path: Path, others: int) -> None:
    store = make_store(tmp_path / "s", 100_000)
    store.write(range(8), rows_of(8), "final")
    mark_many(tmp_path / "s", others)
    counting = Counting()
    with through(counting):
        store.write(range(8, 16), rows_of(8), "final")
    assert counting.counts["scandir"] == 0
    assert counting.done == ["open", "write", "fsync", "replace", "open", "fsync"] * 2


def test_a_store_of_a_billion_samples(tmp_path: Path) -> None:
    """Writes and memory do not depend on the number of samples."""
    written = []
    for n in (10**5, 10**9):
        path = tmp_path / str(n)
        counting = Counting()
        tracemalloc.start()
        with through(counting):
            store = make_store(path, n, chunk_rows=1000)
            store.write(store.chunk(7), rows_of(1000), "final")
            store = Store.open(path, writable=True)
            assert store.append(2500) == range(n, n + 2500)
            store.write(store.chunk(store.n_chunks - 1), rows_of(500), "final")
            assert store.missing("final") == [range(7000), range(8000, n + 2000)]
            with pytest.raises(IncompleteStoreError, match="samples 0-6999, 8000-"):
                store.topk(rows_of(2), 5)
            best = store.topk(rows_of(2), 5, chunks=[7, store.n_chunks - 1])
            assert best.ids.max() >= n
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20e6
        written.append(counting.done)
    assert written[0] == written[1]


def test_missing_reads_names_and_the_marks_that_appending_cut(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", 20)
    store.write(range(20), rows_of(20), "final")
    for _ in range(3):
        store.append(7)  # 27, 34, 41: the chunks 2, 3 and 4 are cut
    assert store.missing("final") == [range(20, 41)]
    store.write(range(24, 32), rows_of(8), "final")
    assert store.missing("final") == [range(20, 24), range(32, 41)]
    store.write(range(20, 24), rows_of(4), "final")
    store.write(range(32, 41), rows_of(9), "final")
    assert Store.open(tmp_path / "s").missing("final") == []
    counting = Counting()
    with through(counting):
        store.missing("final")
    assert counting.counts["scandir"] == 1
    assert counting.counts["fstat"] == 3  # marks that are read


def test_many_chunks_are_looked_up_together(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", 1604, chunk_rows=4)  # 401 chunks
    some = [i for i in range(400) if i % 3]
    for number in some[:8]:  # those of which marks are read
        store.write(store.chunk(number), rows_of(4), "final")
    for number in some[8:]:
        (tmp_path / f"s/checkpoints/final/marks/c.{number}.0").touch()
    store.write(range(1600, 1604), rows_of(4), "final")
    store.append(2)  # whole chunks: none is cut
    store.append(5)  # the last but one is
    everything = [i for run in store.missing("final") for i in run]
    odd = list(range(1, store.n_chunks, 2))
    for chunks in (odd, odd[:5], odd[::-1]):
        ids = [i for run in store.missing("final", chunks) for i in run]
        assert ids == [i for i in everything if i // 4 in set(chunks)]
    assert [i for i in range(1611) if i // 4 not in {*some, 400}] == everything


def query() -> torch.Tensor:
    return rows_of(5, seed=1).round()


def part(path: Path, rank: int, out: Any) -> None:
    torch.set_num_threads(1)
    store = Store.open(path)
    found = store.topk(query(), 20, chunks=range(rank, store.n_chunks, 4))
    out.put((rank, os.getpid(), found.scores.tolist(), found.ids.tolist()))


def test_four_processes_answer_as_one(tmp_path: Path) -> None:
    """Rows and queries are small whole numbers: many scores are equal, and ids decide."""
    store = make_store(tmp_path / "s", 300)
    store.write(range(300), (rows_of(300) / 2).round().clamp(-1, 1), "final")
    out = FORKS.SimpleQueue()
    processes = [forked(part, tmp_path / "s", r, out) for r in range(4)]
    answers = [out.get() for _ in processes]
    for process in processes:
        process.join()
    assert len({pid for _, pid, _, _ in answers}) == 4
    parts = [TopK(torch.tensor(scores), torch.tensor(ids)) for _, _, scores, ids in answers]
    one, four = store.topk(query(), 20), merge_topk(parts, 20)
    assert torch.equal(one.ids, four.ids)
    assert torch.equal(one.scores, four.scores)
    scores = store.scores(query())
    assert len(scores[0].unique()) < 150  # there are ties
    order = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(one.ids, order.indices[:, :20])


def test_bad_parts(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", 20)
    store.write(range(20), rows_of(20), "final")
    best = store.topk(rows_of(2), 5, chunks=[0])
    with pytest.raises(gf.OptionError, match="hold a sample twice"):
        merge_topk([best, store.topk(rows_of(2), 5, chunks=[0, 1])], 5)
    with pytest.raises(gf.OptionError, match="answers to one query"):
        merge_topk([best, store.topk(rows_of(3), 5, chunks=[1])], 5)
    with pytest.raises(gf.OptionError, match="at least one"):
        merge_topk([], 5)
    with pytest.raises(gf.OptionError, match="k=0"):
        merge_topk([best], 0)
    with pytest.raises(gf.OptionError, match="no chunk 3; the store has 3"):
        store.topk(rows_of(2), 5, chunks=[3])
    assert store.topk(rows_of(2), 5, chunks=[]).ids.shape == (2, 0)
    assert torch.equal(merge_topk([best, store.topk(rows_of(2), 5, chunks=[])], 5).ids, best.ids)


def test_scores_are_held_once(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", 1000, chunk_rows=25)
    store.write(range(1000), rows_of(1000), "final")
    q = rows_of(500)
    with LiveBytes() as log:
        scores = store.scores(q)
    assert log.peak < 1.3 * scores.numel() * 4
