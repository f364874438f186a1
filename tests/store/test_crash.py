"""A fixed part of the faults of `crash.py`, and proof that its checks can fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import crash
import pytest

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
@pytest.mark.parametrize("what", ["_flush_folder", "_write_flushed"])
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
    write = _files.LocalFiles.write
    waiting: list[tuple[str, bytes]] = []

    def other_way_round(
        self: _files.LocalFiles, key: str, data: bytes, *, shared: bool = False
    ) -> None:
        if "/rows/c." in key:
            waiting.append((key, data))
            return
        write(self, key, data, shared=shared)
        while waiting:
            write(self, *waiting.pop())

    monkeypatch.setattr(_files.LocalFiles, "write", other_way_round)
    with pytest.raises(crash.StoreError, match="holds other rows than were marked as done"):
        crash.full_disks("write over", trial, 1, 0)
