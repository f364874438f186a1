"""Files of rows: what is read, and what is said of what cannot be."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import torch

import ghostfunc as gf
from ghostfunc.data import Rows, RowsError, write_rows

ROWS = [{"text": "é\u2028"}, {"text": "b", "n": 2}, {"text": "<b>"}]
TABLE = pa.table({"text": [row["text"] for row in ROWS], "n": [None, 2, None]})


def jsonl(path: Path, rows: Any = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path) -> Path:
    pq.write_table(TABLE, path)
    return path


def folder(path: Path, filename: str = "data-0.arrow", **state: Any) -> Path:
    """What `datasets.Dataset.save_to_disk` writes."""
    path.mkdir()
    with pyarrow.ipc.new_stream(str(path / "data-0.arrow"), TABLE.schema) as stream:
        stream.write_table(TABLE)
    found = {"_data_files": [{"filename": filename}], **state}
    (path / "state.json").write_text(json.dumps(found))
    return path


def test_every_kind_of_file_has_the_same_rows(tmp_path: Path) -> None:
    paths = [jsonl(tmp_path / "a.jsonl"), parquet(tmp_path / "a.parquet"), folder(tmp_path / "a")]
    for path in paths:
        rows = Rows.open(path)
        assert list(rows) == ROWS
        assert len(rows) == 3
        assert repr(rows) == f"Rows({str(path)!r}, 3 rows)"
    assert Rows.open(paths[0]).where(2) == f"{paths[0]}, line 3"
    assert Rows.open(paths[1]).where(2) == f"{paths[1]}, row 2"


def test_blank_lines_and_marks_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\r\n\r\n   \n{"text": "b"}')
    rows = Rows.open(path)
    assert [row["text"] for row in rows] == ["a", "b"]
    assert rows.where(1).endswith("line 4")


LINES: dict[str, tuple[bytes, str]] = {
    "broken": (b'{"text": "a"', "no valid JSON: .* at column"),
    "wrong encoding": ('{"text": "é"}'.encode("latin-1"), r"byte 11 \(0xe9\) is not UTF-8"),
    "a list": (b"[1]", "a JSON list; expected an object"),
    "a number": (b"7", "a JSON int"),
    "null": (b"null", "a JSON NoneType"),
    "deep": (b"[" * 100_000, "JSON that cannot be read|no valid JSON"),
    "a long number": (b'{"n": ' + b"9" * 10_000 + b"}", "JSON that cannot be read"),
    "zeros": (b"\0\0\0", "no valid JSON"),
    "no number": (b'{"text": "a", "n": NaN}', "JSON that cannot be read: the number NaN is not"),
    "infinite": (b'{"text": "a", "n": [-1e999]}', "JSON that cannot be read: the number -1e999"),
    "a key twice": (b'{"text": "a", "text": "b"}', "JSON that cannot be read: the key 'text'"),
}


@pytest.mark.parametrize("kind", LINES)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, kind: str) -> None:
    bad, said = LINES[kind]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' * 70_000 + bad + b'\n{"text": "last"}\n')
    rows = Rows.open(path)
    assert rows[70_001]["text"] == "last"
    with pytest.raises(RowsError, match=rf"a\.jsonl, line 70001: ({said})"):
        rows[70_000]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"text\n", "ends with '.csv'; expected .jsonl"),
        ("a", b"", "ends with 'nothing'"),
        ("a.jsonl", b"\n \n", "no rows"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16"),
        ("a.parquet", b"PAR1 no", "no readable Parquet file"),
        ("a.parquet", b"", "no readable Parquet file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RowsError, match=said):
        Rows.open(tmp_path / name)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RowsError, match=r"without state\.json"):
        Rows.open(tmp_path)
    chosen = folder(tmp_path / "chosen", _indices_data_files=[{"filename": "i.arrow"}])
    with pytest.raises(RowsError, match="flatten_indices"):
        Rows.open(chosen)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(RowsError, match=r"name the folder of one, .*train"):
        Rows.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("state.json", "{", r"state\.json: cannot be read"),
        ("state.json", "[" * 100_000, r"state\.json: cannot be read"),
        ("state.json", "[]", r"state\.json: has no '_indices_data_files'"),
        ("state.json", "{}", r"state\.json: has no '_data_files'"),
        ("state.json", '{"_data_files": [7]}', r"state\.json: has no '_data_files'"),
        ("dataset_dict.json", '{"splits": []}', r"dataset_dict\.json: has no 'splits'"),
    ],
)
def test_documents_of_folders_that_make_no_sense(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RowsError, match=said):
        Rows.open(tmp_path)


def test_names_that_are_too_long(tmp_path: Path) -> None:
    with pytest.raises(RowsError, match="File name too long"):
        Rows.open(tmp_path / ("a" * 300 + ".jsonl"))


def test_a_date_that_python_has_not(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "day": pa.array([2**62], pa.timestamp("us"))})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(RowsError, match="row 0: a value that cannot be read"):
        Rows.open(tmp_path / "a.parquet")[0]


def test_a_folder_reads_its_own_files_alone(tmp_path: Path) -> None:
    outside = folder(tmp_path / "outside")
    sly = folder(tmp_path / "sly", filename="../outside/data-1.arrow")
    (outside / "data-0.arrow").rename(outside / "data-1.arrow")
    with pytest.raises(RowsError, match="no readable Arrow files"):
        Rows.open(sly)


# --- chosen rows ------------------------------------------------------------------------------


def chosen(*ids: int) -> gf.Scores:
    return gf.Scores(list(ids), {"dot_higher_helps": torch.linspace(1, 0.5, len(ids))})


def test_chosen_rows_keep_what_they_were(tmp_path: Path) -> None:
    rows = Rows.open(jsonl(tmp_path / "a.jsonl", [*ROWS, {"text": "\ud800"}]))
    write_rows(tmp_path / "out.jsonl", rows, chosen(2, 0, 3))
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [row["ghostfunc"]["rank"] for row in found] == [1, 2, 3]
    assert [row["ghostfunc"]["row"] for row in found] == [2, 0, 3]
    assert found[0]["ghostfunc"]["dot_higher_helps"] == 1
    assert [row["text"] for row in found] == ["<b>", "é\u2028", "\ud800"]


def test_values_that_json_has_not(tmp_path: Path) -> None:
    day = datetime.date(2024, 2, 29)
    no = float("nan")
    table = pa.Table.from_pylist([{"text": "a", "day": day, "image": b"\xff", "n": {"m": [no]}}])
    pq.write_table(table, tmp_path / "a.parquet")
    write_rows(tmp_path / "out.jsonl", Rows.open(tmp_path / "a.parquet"), chosen(0))
    found = json.loads((tmp_path / "out.jsonl").read_text())
    assert (found["day"], found["image"]) == ("2024-02-29", "/w==")
    assert found["n"] == {"m": [None]}


def test_what_cannot_be_written(tmp_path: Path) -> None:
    rows = Rows.open(jsonl(tmp_path / "a.jsonl", [{"text": "a", "ghostfunc": {}}]))
    with pytest.raises(gf.OptionError, match=r"line 1 has a key 'ghostfunc' already"):
        write_rows(tmp_path / "out.jsonl", rows, chosen(0))
    with pytest.raises(gf.OptionError, match="ends with"):
        write_rows(tmp_path / "out.csv", rows, chosen(0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]
