"""A simulated store of a billion samples: what every call costs as the number of samples grows.

Only names are there: an empty file stands for the mark of every chunk, and nothing for its rows. A
call that looked at more than it needs to would show.

    python benchmarks/store_large.py --dir outputs/bench_large
"""

from __future__ import annotations

import argparse
import shutil
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
    parser.add_argument("--samples", type=int, nargs="+", default=[10**6, 10**7, 10**8, 10**9])
    return parser.parse_args()


if __name__ == "__main__":
    asked()  # before torch is imported: --help and mistakes are answered at once

import torch

import ghostfunc as gf
from ghostfunc.store import Store, _query

PARAMS = {"w": torch.zeros(16, 16)}
CHUNK_ROWS = 4096


def timed(function: Callable[[], Any], repeats: int = 5) -> tuple[float, Any]:
    """The fastest of a few runs, in milliseconds, and what came out last."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = function()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3, out


def measure(path: Path, samples: int) -> dict[str, float]:
    """Milliseconds of every call on a store in which every chunk but the last ones is marked."""
    projection = gf.kronecker_projection(
        PARAMS, rank_total=16, rank_min=1, kind="rademacher", seed=0
    )

    def create() -> Store:
        shutil.rmtree(path, ignore_errors=True)
        store = Store.create(
            path,
            projection=projection,
            n_samples=samples,
            dtype="float32",
            chunk_rows=CHUNK_ROWS,
        )
        store.add_checkpoint("final", PARAMS)
        return store

    out = {}
    out["create, add_checkpoint"], store = timed(create)
    marks = path / "checkpoints/final/marks"
    for number in range(store.n_chunks - 2):
        (marks / f"c.{number}.0").touch()
    out["open"], store = timed(lambda: Store.open(path, writable=True))
    ids = store.chunk(store.n_chunks - 2)
    rows = torch.randn(len(ids), projection.k)
    out["write one chunk"], _ = timed(lambda: store.write(ids, rows, "final"))
    out["read one chunk"], _ = timed(lambda: store.read(ids, "final"))
    out["missing()"], missing = timed(lambda: store.missing("final"), 3)
    assert missing == [store.chunk(store.n_chunks - 1)]

    def plan() -> Any:
        return _query.plan(
            store,
            torch.randn(10, projection.k),
            normalize="cosine",
            layers=None,
            precondition=None,
            weights=None,
        )

    last = store.chunk(store.n_chunks - 1)
    store.write(last, torch.randn(len(last), projection.k), "final")
    out["plan of a query"], _ = timed(plan, 3)
    out["append"], _ = timed(lambda: store.append(CHUNK_ROWS), 3)
    return out


def main() -> None:
    args = asked()
    args.dir.mkdir(parents=True)
    try:
        columns = {n: measure(args.dir / str(n), n) for n in args.samples}
    finally:
        shutil.rmtree(args.dir)
    print("milliseconds".ljust(26), *(f"{n:>14,}" for n in columns))
    print("chunks".ljust(26), *(f"{-(-n // CHUNK_ROWS):>14,}" for n in columns))
    for name in columns[args.samples[0]]:
        print(name.ljust(26), *(f"{column[name]:>14.2f}" for column in columns.values()))


if __name__ == "__main__":
    main()
