"""What means harm, or is broken: a line with a reason, nothing lost, nothing run."""

from __future__ import annotations

import base64
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ghostfunc._base.whole_files import write_whole
from ghostfunc.cli import _score

from .conftest import chat, lines

Run = Callable[..., tuple[int, str]]
LINE = "score MODEL --pool pool.jsonl --target target.jsonl --top 7 --out sel.jsonl"


def refused(found: tuple[int, str], *said: str) -> None:
    code, text = found
    assert code == 2, text
    assert "Traceback" not in text
    assert all(words in text for words in said), text


def test_a_folder_that_is_no_run_keeps_what_is_in_it(run: Run, files: Path) -> None:
    """The folder of a run is removed at its end, but for what is not of the run."""
    for place in (files / "sel.run", files / "sel.run" / "curvature"):
        place.mkdir()
        (place / "notes.txt").write_text("mine")
    (files / "pool.jsonl").rename(files / "sel.run" / "pool.jsonl")
    line = LINE.replace("pool.jsonl", "sel.run/pool.jsonl") + " --scores sel.run/s.parquet"
    assert run(line)[0] == 0
    kept = {x.relative_to(files / "sel.run").as_posix() for x in (files / "sel.run").rglob("*.*")}
    assert kept == {"notes.txt", "curvature/notes.txt", "pool.jsonl", "s.parquet"}


@pytest.mark.parametrize(
    ("make", "more", "said"),
    [
        (lambda x: (x / "sel.run").touch(), "", "sel.run: it is no folder"),
        (lambda x: (x / "sel.config.json").mkdir(), "", "sel.config.json is a folder"),
        (lambda x: (x / "loop").symlink_to("loop"), "--out loop/sel.jsonl", "loop is no folder"),
        (bool, "--out pool.jsonl/a/b/sel.jsonl", "pool.jsonl is no folder"),
        (bool, f"--pool {'p' * 300}.jsonl", "File name too long"),
    ],
)
def test_places_where_nothing_can_be(
    run: Run, files: Path, make: Callable[[Path], object], more: str, said: str
) -> None:
    make(files)
    refused(run(f"{LINE} {more}"), said)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ [].pop() }}",
        "{{ 'x' * 10**15 }}",
        "{% for %}",
    ],
)
def test_templates_that_fail(run: Run, files: Path, model: Path, template: str) -> None:
    shutil.copytree(model, files / "m")
    (files / "m" / "chat_template.jinja").write_text(template)
    refused(run(LINE.replace("MODEL", "m")), "line 1: the chat template does not take it")


def test_code_of_a_models_folder_is_not_run_and_nobody_is_asked(
    run: Run, files: Path, model: Path
) -> None:
    shutil.copytree(model, files / "m")
    config = json.loads((files / "m" / "config.json").read_text())
    own = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    (files / "m" / "config.json").write_text(
        json.dumps({**config, "auto_map": own, "model_type": "own"})
    )
    (files / "m" / "own.py").write_text(f"open({str(files / 'ran')!r}, 'w')\n")
    code, said = run(LINE.replace("MODEL", "m"))
    assert code == 2
    assert "[y/N]" not in said
    assert not (files / "ran").exists()


class Harm:
    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.ran),)


def test_pickled_code_is_not_run(run: Run, files: Path, model: Path) -> None:
    shutil.copytree(model, files / "m")
    (files / "m" / "model.safetensors").unlink()
    torch.save({"x": Harm(files / "ran")}, files / "m" / "pytorch_model.bin")
    assert pickle.dumps(Harm(files / "ran"))  # it is harm: unpickled, it would run
    refused(run(LINE.replace("MODEL", "m")), "transformers cannot load")
    assert not (files / "ran").exists()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_program_is_started_for_an_image(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow hands EPS to Ghostscript, whatever the address says of it."""
    pytest.importorskip("PIL.Image")
    ghostscript = files / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {files}/ran\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{files}:{os.environ['PATH']}")
    address = "data:image/png;base64," + base64.b64encode(EPS).decode()
    (files / "pool.jsonl").write_text(lines({**chat(i), "image": address} for i in range(9)))
    refused(run(LINE + " --report r.html --image image"), "line 1: the image column 'image'")
    assert not (files / "ran").exists()


@pytest.mark.parametrize("name", ["fifo.png", "loop.png", "a\0b.png"])
def test_images_that_are_no_files(run: Run, files: Path, name: str) -> None:
    os.mkfifo(files / "fifo.png")
    (files / "loop.png").symlink_to("loop.png")
    (files / "pool.jsonl").write_text(lines({**chat(i), "image": name} for i in range(9)))
    refused(run(LINE + " --report r.html --image image"), "line 1: the image column 'image' names")


GOOD = {"id": list(range(40)), "dot_higher_helps": [1.0] * 40}
TABLES: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "nulls": ({**GOOD, "dot_higher_helps": [None] * 39 + [1.0]}, None, "has 39 nulls"),
    "words": ({**GOOD, "dot_higher_helps": ["a"] * 40}, None, "has the type string"),
    "NaN": ({**GOOD, "dot_higher_helps": [float("nan")] * 40}, None, "must be finite"),
    "one row twice": ({**GOOD, "id": [0, *range(39)]}, None, "has the id 0 twice"),
    "ids that are no numbers": ({"id": [True], "dot_higher_helps": [1.0]}, None, "the id True"),
    "no rows": ({"id": [], "dot_higher_helps": []}, None, "has no rows"),
    "broken facts": (GOOD, "{", "metadata 'ghostfunc' are damaged"),
    "a list of facts": (GOOD, "[]", "metadata 'ghostfunc' are no object"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_scores_that_make_no_sense(run: Run, files: Path, kind: str) -> None:
    columns, facts, said = TABLES[kind]
    table = pa.table(columns)
    if facts is not None:
        table = table.replace_schema_metadata({"ghostfunc": facts})
    pq.write_table(table, files / "s.parquet")
    refused(run("select s.parquet --pool pool.jsonl --top 1 --out x.jsonl"), said)
    assert not (files / "x.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 100_000, "recursion"),
        ('{"model": "m\\u0000", "pool": "p", "target": "t", "out": "o"}', "no name of a file"),
        ('{"model": "m", "pool": "p", "target": "t", "out": "o", "top": 1e999}', "inf is no int"),
    ],
)
def test_configs_that_make_no_sense(run: Run, files: Path, content: str, said: str) -> None:
    (files / "bad.json").write_text(content)
    refused(run("score --config bad.json"), said)


def test_what_a_death_left_half_written_goes_with_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "sel.run"
    left: list[Path] = []
    for name in ("config.json", "part-000003.npz", "curvature/state.safetensors"):
        write_whole(folder / name, lambda aside: (aside.touch(), left.append(aside)))
    for path in left:
        path.touch()
    _score._remove(folder)
    assert not folder.exists()
