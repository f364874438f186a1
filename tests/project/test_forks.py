"""The server of the tests' processes has imported their files, which takes seconds a process."""

from __future__ import annotations

from forks import FORKS, WORKERS, forked, preloaded


def test_a_process_need_not_import_the_files_of_workers() -> None:
    found = FORKS.SimpleQueue()
    process = forked(_say, found)
    assert found.get() == WORKERS
    process.join()


def _say(found: object) -> None:
    found.put(preloaded())
