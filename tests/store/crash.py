"""A process dies, a disk is full, the power goes, at every write of a store.

    python tests/store/crash.py                 all of it: some minutes
    python tests/store/crash.py --every 11      a fixed part, as the tests run it

After each fault the store is as before or as afterwards, chunk by chunk, and the same call again
makes it the same bit for bit as without the fault.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import DIED, WHENS, Disk, Faulty, die, disk_full, in_a_child, through
from helpers import fill, make_params, make_projection, make_store

from ghostfunc.store import Damage, Store, StoreError

N, MORE = 20, 7
K = make_projection().k


def rows_of(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, K, generator=torch.Generator().manual_seed(seed))


def opened(path: Path) -> Store:
    return Store.open(path, writable=True)


def empty(path: Path) -> None:
    path.mkdir()


def one(path: Path) -> None:
    """A store with one checkpoint, all of whose rows are there."""
    store = make_store(path, N)
    store.write(range(N), rows_of(N, 0), "final")


def two(path: Path) -> None:
    one(path)
    opened(path).add_checkpoint("early", make_params(1), lr=1.0)
    opened(path).write(range(N), rows_of(N, 1), "early")


def bare(path: Path) -> None:
    make_store(path, N)


def grown(path: Path) -> None:
    """Filled, then appended to: the last chunk is done in part."""
    make_store(path, N)
    fill(opened(path), N)
    opened(path).append(MORE)


def create(path: Path) -> None:
    if not (path / "zarr.json").exists():
        Store.create(path, projection=make_projection(), n_samples=N, dtype="float32", chunk_rows=8)


def add(path: Path) -> None:
    if "early" not in opened(path).checkpoint_names:
        opened(path).add_checkpoint("early", make_params(1), lr=1.0)


def append(path: Path) -> None:
    if opened(path).n_samples == N:
        opened(path).append(MORE)


def remove(path: Path) -> None:
    if (path / "checkpoints/early").exists():
        opened(path).remove_checkpoint("early")


def write_over(path: Path) -> None:
    opened(path).write(range(N), rows_of(N, 2), "final")


def discard(path: Path) -> None:
    store = opened(path)
    store.discard([Damage("final", store.chunk(1), "torn")])


def damaged(path: Path) -> None:
    one(path)
    (path / "checkpoints/final/rows/c.1.0").write_bytes(b"torn")


@dataclass(frozen=True)
class Scenario:
    """A call that writes, on a store that something prepared; called again, it finishes.

    `lossy`: a chunk may be missing in between. `stray`: so may the document of a checkpoint that
    goes. `hurt`: there is damage from the start.
    """

    prepare: Callable[[Path], None]
    act: Callable[[Path], Any]
    lossy: bool = False
    stray: bool = False
    hurt: bool = False


SCENARIOS = {
    "create": Scenario(empty, create),
    "add_checkpoint": Scenario(one, add),
    "fill": Scenario(bare, lambda path: fill(opened(path), N)),
    "append": Scenario(two, append),
    "fill after append": Scenario(grown, lambda path: fill(opened(path), N + MORE)),
    "remove_checkpoint": Scenario(two, remove, stray=True),
    "write over": Scenario(one, write_over, lossy=True),
    "discard": Scenario(damaged, discard, lossy=True, hurt=True),
}


@dataclass(frozen=True)
class State:
    """A store's answers: its size and checkpoints, and the rows of every chunk that are done."""

    said: Any
    chunks: dict[tuple[str, int], bytes]

    @classmethod
    def of(cls, path: Path, *, hurt: bool = False) -> State:
        try:
            store = Store.open(path)
        except StoreError as error:
            if "there is no store" not in str(error):
                raise
            return cls(None, {})
        chunks = {}
        bad = {damage.rows for damage in store.check()} if hurt else set()
        rates = {name: store.learning_rate(name) for name in store.checkpoint_names}
        for name in rates:
            missing = {i for run in store.missing(name) for i in run}
            for number in range(store.n_chunks):
                ids = [i for i in store.chunk(number) if i not in missing]
                if ids and store.chunk(number) not in bad:
                    chunks[name, number] = store.read(ids, name).numpy().tobytes()
        return cls((store.n_samples, rates), chunks)


def tree(root: Path) -> dict[Path, bytes]:
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


class Trial:
    """One scenario: the state and the files before and after it, and the checks of a fault."""

    def __init__(self, scenario: Scenario, work: Path) -> None:
        self.scenario, self.work = scenario, work
        self.before, self.after, self.hit = (work / x for x in ("before", "after", "hit"))
        scenario.prepare(self.before)
        shutil.copytree(self.before, self.after)
        counting = Faulty()
        with through(counting):
            scenario.act(self.after)
        self.operations = counting.done
        self.states = [State.of(p, hurt=scenario.hurt) for p in (self.before, self.after)]
        self.files = tree(self.after)

    def fresh(self) -> Path:
        shutil.rmtree(self.hit, ignore_errors=True)
        shutil.copytree(self.before, self.hit)
        return self.hit

    def judge(self, what: str) -> str:
        """Check the store after a fault; whether it was as before, as afterwards, or in between."""
        found = State.of(self.hit, hurt=self.scenario.hurt)
        before, after = self.states
        assert found.said in (before.said, after.said), f"{what}: {found.said}"
        for key in found.chunks.keys() | after.chunks.keys() | before.chunks.keys():
            if found.said is None or key[0] not in found.said[1]:
                continue
            options = [before.chunks.get(key), after.chunks.get(key)]
            if self.scenario.lossy:
                options.append(None)
            assert found.chunks.get(key) in options, f"{what}: chunk {key}"
        if found.said is not None and not (self.scenario.stray or self.scenario.hurt):
            damage = Store.open(self.hit).check()
            assert damage == [], f"{what}: {damage}"
        self.scenario.act(self.hit)
        assert tree(self.hit) == self.files, f"{what}: other files after the same call again"
        return "before" if found == before else "after" if found == after else "between"


def faults(trial: Trial) -> Iterator[tuple[int, str, str]]:
    """Every place where a process can die: before, in the middle of and after each operation."""
    for number, name in enumerate(trial.operations):
        for when in WHENS:
            if when != "middle" or name == "write":
                yield number, when, name


def deaths(name: str, trial: Trial, every: int, offset: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    for number, when, operation in list(faults(trial))[offset % every :: every]:
        path = trial.fresh()

        def act(number: int = number, when: str = when, path: Path = path) -> None:
            with through(Faulty(number, when, die)):
                trial.scenario.act(path)

        assert in_a_child(act) == DIED
        counts[trial.judge(f"{name}: died {when} {operation} {number}")] += 1
    return counts


def full_disks(name: str, trial: Trial, every: int, offset: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    places = [(i, op) for i, op in enumerate(trial.operations) if op not in ("unlink", "rmdir")]
    for number, operation in places[offset % every :: every]:
        for when in ("before", "middle") if operation == "write" else ("before",):
            path = trial.fresh()
            faulty = through(Faulty(number, when, disk_full))
            with pytest.raises(StoreError, match=f"{path}/.*No space left"), faulty:
                trial.scenario.act(path)
            left = [p for p in tree(path) if p.name.endswith(".partial")]
            assert not left, f"{name}: {left} is left"
            counts[trial.judge(f"{name}: disk full {when} {operation} {number}")] += 1
    return counts


def power_cuts(name: str, trial: Trial, every: int, offset: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    path = trial.fresh()
    disk = Disk(path)
    with through(disk):
        trial.scenario.act(path)
    for number in range(offset % every, len(disk.moments), every):
        shutil.rmtree(path)
        path.mkdir()
        for key, content in disk.moments[number].items():
            if content is None:
                (path / key).mkdir()
            else:
                (path / key).write_bytes(content)
        counts[trial.judge(f"{name}: power cut {number}")] += 1
    return counts


def kills(count: int, seed: int, work: Path) -> Counter[str]:
    """A process that projects a dataset is killed at random moments; then it is let finish."""
    n = 60 * count
    whole, path = work / "whole", work / "killed"
    make_store(path, n)
    fill(make_store(whole, n), n)
    server = Path(__file__).parent / "kill_server.py"
    command = [sys.executable, str(server), str(path), str(n), str(count), str(seed)]
    ends = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    assert ends == ["killed"] * count, Counter(ends)
    left = sum(map(len, opened(path).missing("final")))
    assert 0 < left < n, "the processes did not get to work"
    assert fill(opened(path), n) == left
    assert opened(path).check() == []
    assert tree(path) == tree(whole)
    return Counter(between=count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="take every n-th fault only")
    parser.add_argument("--kills", type=int, default=50, help="random kills at the end")
    parser.add_argument("--seed", type=int, default=0, help="of the random kills")
    args = parser.parse_args()
    torch.set_num_threads(1)
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for offset, (name, scenario) in enumerate(SCENARIOS.items()):
            work = Path(folder, name.replace(" ", "_"))
            work.mkdir()
            trial = Trial(scenario, work)
            for kind in (deaths, full_disks, power_cuts):
                start = time.perf_counter()
                counts = kind(name, trial, args.every, offset)
                total[kind.__name__] += counts.total()
                print(
                    f"{name:<18} {kind.__name__:<11} {counts.total():4} "
                    f"{dict(sorted(counts.items()))} {time.perf_counter() - start:.1f} s",
                    flush=True,
                )
        if args.kills:
            total["kills"] += kills(args.kills, args.seed, Path(folder)).total()
    print(" ".join(f"{kind}={count}" for kind, count in total.items()))


if __name__ == "__main__":
    main()
