"""A fixed part of the faults of `crash.py`, and proof that its checks can fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import crash
import pytest
from faults import Faulty, through
from helpers import make_store

from ghostfunc.store import _files

HERE = Path(__file__).parent


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_faults_leave_the_store_as_before_or_as_afterwards() -> None:
    places = [str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    out = subprocess.run(
        [sys.executable, str(HERE / "crash.py"), "--every", "17", "--kills", "0"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    counts = dict(re.findall(r"(\w+)=(\d+)", out.splitlines()[-1]))
    assert counts.keys() == {"deaths", "full_disks", "power_cuts"}
    assert min(map(int, counts.values())) >= 8


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be flushed there")
@pytest.mark.parametrize("chunks", [1, 3, 20])
def test_flushes_of_a_write(chunks: int, tmp_path: Path) -> None:
    """One for each file, and two for every sixteen chunks: their names come to stay together."""
    store = make_store(tmp_path / "s", 8 * chunks)
    counted = Faulty()
    with through(counted):
        store.write(range(8 * chunks), crash.rows_of(8 * chunks, 0), "final")
    assert counted.done.count("fsync") == 2 * chunks + 2 * -(-chunks // 16)


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be flushed there")
@pytest.mark.parametrize("what", ["flush_folder", "_write_flushed"])
def test_a_missing_flush_is_found(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = crash.Trial(crash.SCENARIOS["write over"], tmp_path)

    def not_flushed(path: Path, data: bytes = b"") -> None:
        if what == "_write_flushed":
            handle = _files.os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            _files.os.write(handle, data)
            _files.os.close(handle)

    monkeypatch.setattr(_files, what, not_flushed)
    with pytest.raises((AssertionError, crash.StoreError)):
        crash.power_cuts("write over", trial, 1, 0)


def test_the_mark_before_the_rows_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that marked rows first would be caught by the faults."""
    trial = crash.Trial(crash.SCENARIOS["write over"], tmp_path)
    write_all = _files.LocalFiles.write_all
    waiting: list[tuple[str, bytes]] = []

    def other_way_round(self: _files.LocalFiles, items: Iterable[tuple[str, bytes]]) -> None:
        given = list(items)
        if "/rows/c." in given[0][0]:
            waiting.extend(given)
            return
        write_all(self, given)
        write_all(self, waiting)
        waiting.clear()

    monkeypatch.setattr(_files.LocalFiles, "write_all", other_way_round)
    with pytest.raises(crash.StoreError, match="holds other rows than were marked as done"):
        crash.full_disks("write over", trial, 1, 0)
