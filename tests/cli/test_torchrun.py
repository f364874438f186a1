"""`ghostfunc score` in several processes of torchrun: the files of one process."""

from __future__ import annotations

import runpy
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ghostfunc.cli import _torchrun
from ghostfunc.data import _score

from .torchrun_ranks import Line, together

Run = Callable[..., tuple[int, str]]
LINE = "score MODEL --pool pool.jsonl --target target.jsonl --top 7 --token-budget 256"


def test_processes_share_a_run(
    run: Run, files: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failed and killed runs leave what was done, and another number of processes goes on."""
    monkeypatch.setattr(_score, "PART", 8)
    assert run(f"{LINE} --out one.jsonl --scores one.parquet")[0] == 0

    def line(more: str, trouble: str = "") -> Line:
        words = f"{LINE} {more}".split()
        return Line([str(model) if x == "MODEL" else x for x in words], trouble)

    first = [
        line("--out two.jsonl --scores two.parquet --report two.html --bad-rows set-aside"),
        line("--out sel.jsonl --resume"),
        line("--out sel.jsonl --scores sel.parquet", "not finite"),
        line("--out sel.jsonl --scores sel.parquet --resume", "killed"),
    ]
    (shared, silent), bad, failed, killed = together(first, 2, files)

    assert (shared.code, silent.code, silent.text) == (0, 0, ""), shared.text + silent.text
    assert "7 of 40 rows written to two.jsonl" in shared.text
    assert "scoring: 100%" in shared.text
    assert (files / "two.html").exists()
    assert not (files / "two.run").exists()

    assert [x.code for x in bad] == [2, 2]
    assert [x.text.count("there is no stopped run") for x in bad] == [1, 0]

    assert [x.code for x in failed] == [1, 1]
    assert "rank 1 failed with NonFiniteLossError: a loss is not finite" in failed[0].text
    assert failed[1].text == ""
    assert failed[0].parts <= 1  # nobody took more than the one that was begun

    assert [x.code for x in killed] == [1, None]
    assert "no answer comes from rank 1 of 2" in killed[0].text
    assert killed[0].parts == 4  # all but the one it had taken
    assert not (files / "sel.jsonl").exists()

    ((first_of_four, *others),) = together(
        [line("--out sel.jsonl --scores sel.parquet --resume")], 4, files
    )
    assert first_of_four.code == 0, first_of_four.text
    assert [(x.code, x.text) for x in others] == [(0, "")] * 3
    assert not (files / "sel.run").exists()
    for name in ("two", "sel"):
        assert (files / f"{name}.jsonl").read_bytes() == (files / "one.jsonl").read_bytes()
        assert pq.read_table(files / f"{name}.parquet") == pq.read_table(files / "one.parquet")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"{LINE} --out sel.jsonl --score influence", "--score influence makes its curvature"),
        (f"{LINE} --out sel.jsonl --dry-run", "--dry-run tells what one process"),
        (f"{LINE} --out sel.jsonl --verify 2", "--verify is for one process"),
        ("project MODEL --pool pool.jsonl --store s", "would each run all of `ghostfunc project`"),
        (f"{LINE} --out sel.jsonl", "found no way to each other"),  # without RANK
    ],
)
def test_what_processes_do_not_share_is_refused(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    before = sorted(files.iterdir())
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, text = run(line)
    assert code in (1, 2)
    assert said in text
    assert "2 processes" in text
    monkeypatch.setenv("RANK", "1")  # the first one says so
    if "no way" not in said:
        assert run(line) == (2, "")
    assert sorted(files.iterdir()) == before


def test_a_process_that_is_alone_gives_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others never began. Once all have met, they wait for each other much longer."""
    monkeypatch.setattr(_torchrun, "MEETING", timedelta(seconds=1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in places.items():
        monkeypatch.setenv(name, str(value))
    code, text = run(f"{LINE} --out sel.jsonl")
    assert (code, "2 processes of torchrun (WORLD_SIZE) found no way" in text) == (1, True), text


def test_a_world_of_no_size_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    code, text = run(f"{LINE} --out sel.jsonl")
    assert (code, "WORLD_SIZE='two'" in text) == (2, True)


def test_a_process_has_a_card_of_its_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "99")
    code, text = run(f"{LINE} --out sel.jsonl --device cuda")
    assert (code, "--device cuda:99: " in text) == (2, True), text


def test_torchrun_starts_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ghostfunc", "score"])
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("ghostfunc", run_name="__main__")
    assert ended.value.code == 2
