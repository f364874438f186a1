"""A large store: written by two processes, searched by a third, beside what the disk itself does.

Rows are synthetic. The disk's own figures are those of one plain file of the same size, written and
flushed, then dropped from the page cache and read; the store is flushed and dropped likewise.

    python benchmarks/store.py --dir outputs/bench_store
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def asked() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dir", type=Path, required=True, help="where to write; removed afterwards"
    )
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    return parser.parse_args()


if __name__ == "__main__":
    asked()  # before torch is imported: --help and mistakes are answered at once

import torch

import ghostfunc as gf
from ghostfunc.store import Store

PARAMS = {"w": torch.zeros(4096, 4096)}
PIECE = 8 << 20


def settle(files: list[Path]) -> None:
    """Everything on disk, and nothing of it in the page cache."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def files_of(path: Path) -> list[Path]:
    return [p for p in path.rglob("*") if p.is_file()]


def write_plain(path: Path, size: int) -> None:
    piece = os.urandom(PIECE)
    with path.open("wb", buffering=0) as file:
        for _ in range(size // PIECE):
            file.write(piece)


def read_plain(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(PIECE):
            pass


def write_rows(path: Path, rank: int, ranks: int) -> None:
    store = Store.open(path, writable=True)
    rows = torch.randn(store.chunk_rows, store.projection.k)
    for number in range(rank, store.n_chunks, ranks):
        ids = store.chunk(number)
        store.write(ids, rows[: len(ids)].roll(number, 1), "final")


def search(path: Path, queries: int) -> None:
    store = Store.open(path)
    q = torch.randn(queries, store.projection.k)
    best = store.topk(q, 100, normalize="cosine")
    assert best.ids.shape == (queries, 100)


def child(out: Any, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    start = time.perf_counter()
    function(*arguments)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    out.put((seconds, peak))


def in_processes(calls: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> tuple[float, float]:
    """Each call in a process of its own, all at once: the longest one's seconds, without its
    imports, and the largest peak memory in GiB."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    processes = [context.Process(target=child, args=(out, *call)) for call in calls]
    for process in processes:
        process.start()
    results = [out.get() for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return max(s for s, _ in results), max(p for _, p in results) / 2**30


def main() -> None:
    args = asked()
    args.dir.mkdir(parents=True)
    try:
        for dtype in args.dtypes:
            run(args, dtype)
    finally:
        shutil.rmtree(args.dir)


def run(args: argparse.Namespace, dtype: str) -> None:
    size = args.samples * args.k * (4 if dtype == "float32" else 2)
    print(f"\n{args.samples} samples x k={args.k}, {dtype}: {size / 1e9:.2f} GB")

    def line(what: str, seconds: float, rest: str = "") -> None:
        print(
            f"  {what:<36} {seconds:6.1f} s  {size / 1e6 / seconds:7.0f} MB/s  {rest}", flush=True
        )

    plain = args.dir / "plain"
    start = time.perf_counter()
    write_plain(plain, size)
    settle([plain])
    line("disk: one file written and flushed", time.perf_counter() - start)
    start = time.perf_counter()
    read_plain(plain)
    line("disk: the file read", time.perf_counter() - start)
    plain.unlink()

    path = args.dir / dtype
    projection = gf.kronecker_projection(
        PARAMS, rank_total=args.k, rank_min=1, kind="rademacher", seed=0
    )
    store = Store.create(path, projection=projection, n_samples=args.samples, dtype=dtype)
    store.add_checkpoint("final", PARAMS)
    seconds, peak = in_processes([(write_rows, (path, rank, 2)) for rank in (0, 1)])
    start = time.perf_counter()
    settle(files_of(path))
    seconds += time.perf_counter() - start
    line("store: two processes, and flushed", seconds, f"peak {peak:.2f} GiB each")
    for cache in ("from disk", "again, from the page cache"):
        seconds, peak = in_processes([(search, (path, args.queries))])
        line(f"store: top-100, {cache}", seconds, f"peak {peak:.2f} GiB")


if __name__ == "__main__":
    main()
