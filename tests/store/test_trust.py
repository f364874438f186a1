"""A store checks whatever it takes for true, and a test holds each of its promises."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import Faulty, through
from helpers import fill, make_params, make_projection, make_store

import ghostfunc as gf
from ghostfunc.store import DamagedRowsError, Store, StoreError, _checkpoints, _documents
from ghostfunc.store._files import LocalFiles
from ghostfunc.store._on_disk import StoredChunks

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/guarantees.md"
K = make_projection().k


def rows_of(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, K, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    out = make_store(tmp_path / "s", 20)
    out.write(range(20), rows_of(20), "final")
    return out


# --- one write decides ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"notes": {"x": {1, 2}}}, "notes cannot be written as JSON"),
        ({"notes": {"x": float("nan")}}, "notes cannot be written as JSON"),
        ({"notes": ["x"]}, "must be a dict"),
        ({"tokenizer": b"x"}, "tokenizer=b'x' must be a string"),
        ({"chunk_rows": 0}, "chunk_rows=0 must be a whole number"),
        ({"chunk_rows": 2.5}, r"chunk_rows=2\.5 must be a whole number"),
    ],
)
def test_values_are_checked_before_the_first_write(
    tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(gf.OptionError, match=match):
        make_store(tmp_path / "s", 20, **options)
    assert not (tmp_path / "s").exists()


def test_notes_in_a_circle(tmp_path: Path) -> None:
    notes: dict[str, Any] = {}
    notes["self"] = notes
    with pytest.raises(gf.OptionError, match="notes cannot be written as JSON"):
        make_store(tmp_path / "s", 20, notes=notes)
    with pytest.raises(gf.OptionError, match=r"n_samples=2\.5 must be a whole number"):
        make_store(tmp_path / "s", 2.5)  # type: ignore[arg-type]


def test_a_bad_checkpoint_leaves_nothing(tmp_path: Path, store: Store) -> None:
    for name, lr in (("early", float("nan")), ("early", "x"), ("x" * 300, 1.0), ("zarr.json", 1.0)):
        with pytest.raises(gf.OptionError, match=r"lr=|cannot be that of a checkpoint"):
            store.add_checkpoint(name, make_params(), lr=lr)  # type: ignore[arg-type]
    assert sorted(p.name for p in (tmp_path / "s/checkpoints").iterdir()) == ["final", "zarr.json"]


def test_a_half_made_checkpoint_is_none(tmp_path: Path, store: Store) -> None:
    store.add_checkpoint("early", make_params(1))
    (tmp_path / "s/checkpoints/early/zarr.json").unlink()
    assert store.checkpoints == {"final": 0.5}
    assert store.topk(rows_of(1), 3).ids.shape == (1, 3)  # one checkpoint: no name is needed
    store.add_checkpoint("early", make_params(2))
    store.check_model("early", make_params(2))


def test_rows_without_their_checkpoint_are_never_written_over(tmp_path: Path, store: Store) -> None:
    document = tmp_path / "s/checkpoints/final/zarr.json"
    kept = document.read_bytes()
    document.unlink()
    with pytest.raises(StoreError, match=r"final has rows, but its zarr\.json is not there"):
        store.add_checkpoint("final", make_params())
    for ask in (
        lambda: store.checkpoints,
        lambda: store.topk(rows_of(1), 3),
        lambda: store.append(3),
        lambda: store.check(),
    ):
        with pytest.raises(StoreError, match=r"final/zarr\.json is not there, but rows of"):
            ask()
    (tmp_path / "s/zarr.json").unlink()
    with pytest.raises(StoreError, match=r"holds the checkpoints \['final'\] of a store whose"):
        make_store(tmp_path / "s", 20)
    document.write_bytes(kept)
    with pytest.raises(StoreError, match=r"holds the checkpoints \['final'\] of a store whose"):
        make_store(tmp_path / "s", 20)


def test_a_checkpoint_is_removed(tmp_path: Path, store: Store) -> None:
    before = sorted((tmp_path / "s").rglob("*"))
    store.add_checkpoint("early", make_params(1))
    store.write(range(20), rows_of(20), "early")
    store.remove_checkpoint("early")
    assert store.checkpoints == {"final": 0.5}
    assert sorted((tmp_path / "s").rglob("*")) == before
    with pytest.raises(gf.OptionError, match=r"no checkpoint 'early'; the store has \['final'\]"):
        store.remove_checkpoint("early")
    store.add_checkpoint("early", make_params(1))
    assert store.missing("early") == [range(20)]  # nothing of its rows comes back
    with pytest.raises(StoreError, match="writable=True"):
        Store.open(tmp_path / "s").remove_checkpoint("early")


def test_remote_checkpoints_come_and_go() -> None:
    url = "memory://ghostfunc-test/trust"
    store = make_store(url, 20)
    store.add_checkpoint("early", make_params(1))
    store.write(range(20), rows_of(20), "early")
    assert Store.open(url).checkpoints == {"early": None, "final": 0.5}
    store.remove_checkpoint("early")
    assert Store.open(url).checkpoints == {"final": 0.5}
    fill(store, 20)
    assert store.missing("final") == []
    assert store.check() == []
    with pytest.raises(StoreError, match=r"there is a store at memory:///?ghostfunc-test/trust"):
        make_store(url, 20)


def test_a_damaged_checkpoint_stops_no_other(tmp_path: Path, store: Store) -> None:
    store.add_checkpoint("early", make_params(1))
    (tmp_path / "s/checkpoints/early/zarr.json").write_bytes(b"\0")
    store = Store.open(tmp_path / "s")
    assert "early" in repr(store)
    assert store.topk({"final": rows_of(1)}, 3).ids.shape == (1, 3)
    with pytest.raises(StoreError, match=r"early/zarr\.json is damaged"):
        store.topk({"early": rows_of(1)}, 3)


def test_ids_are_whole_numbers(store: Store) -> None:
    for ids in ([0.5], [[1, 2]], ["x"]):
        with pytest.raises(gf.OptionError, match="ids must be a sequence of whole numbers"):
            store.read(ids, "final")  # type: ignore[arg-type]
    assert store.read([], "final").shape == (0, K)
    assert store.read(np.array([3], np.uint8), "final").shape == (1, K)
    assert store.topk(rows_of(1), np.int64(2)).ids.shape == (1, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["a file", "x" * 300, "in/a file/there"])
def test_places_where_no_store_can_be(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a file").write_text("")
    Path("in").mkdir()
    Path("in/a file").write_text("")
    with pytest.raises(StoreError, match=re.escape(place[:100])):
        make_store(place, 20)
    with pytest.raises(StoreError, match=re.escape(place[:100])):
        Store.open(place)


def test_urls_that_are_none() -> None:
    for url in ("", "nothing-known://x"):
        with pytest.raises(gf.OptionError, match="url="):
            make_store(url, 20)


# --- what is trusted is signed ----------------------------------------------------------------


def test_swapped_chunks_are_found(tmp_path: Path, store: Store) -> None:
    folder = tmp_path / "s/checkpoints/final"
    for part in ("rows", "marks"):
        one, other, kept = (folder / part / name for name in ("c.0.0", "c.1.0", "kept"))
        one.rename(kept)
        other.rename(one)
        kept.rename(other)
        if part == "rows":
            assert [d.rows for d in store.check()] == [range(8), range(8, 16)]
            with pytest.raises(DamagedRowsError, match=r"rows/c\.0\.0 holds other rows than were"):
                store.read([0], "final")
    # Rows and marks changed places together.
    with pytest.raises(DamagedRowsError, match=r"marks/c\.0\.0 is that of another chunk"):
        store.read([0], "final")


def test_chunks_of_another_checkpoint_are_found(tmp_path: Path, store: Store) -> None:
    store.add_checkpoint("early", make_params(1))
    store.write(range(20), rows_of(20, seed=5), "early")
    for part in ("rows", "marks"):
        source = tmp_path / f"s/checkpoints/early/{part}/c.0.0"
        shutil.copy(source, tmp_path / f"s/checkpoints/final/{part}/c.0.0")
    (damage,) = store.check("final")
    assert "of another checkpoint" in damage.why
    shutil.rmtree(tmp_path / "s/checkpoints/early")
    shutil.copytree(tmp_path / "s/checkpoints/final", tmp_path / "s/checkpoints/early")
    with pytest.raises(StoreError, match="it is that of a checkpoint 'final', not of 'early'"):
        Store.open(tmp_path / "s").check_model("early", make_params())


@pytest.mark.parametrize("codecs", [[], ["gzip"], ["crc32c", "crc32c"]])
def test_other_codecs_are_refused(tmp_path: Path, store: Store, codecs: list[str]) -> None:
    """Also signed: a struck-out checksum would hide flipped bytes, a gzip be a bomb."""
    path = tmp_path / "s/checkpoints/final/rows/zarr.json"
    document = json.loads(path.read_text())
    document["codecs"] = [document["codecs"][0], *({"name": name} for name in codecs)]
    path.write_text(json.dumps(_documents._signed(document)))
    with pytest.raises(StoreError, match=r"rows/zarr\.json is damaged: .* differ in codecs"):
        Store.open(tmp_path / "s").read([0], "final")


@pytest.mark.parametrize("column", [0, 7, K - 1])
def test_a_number_that_is_not_finite_is_found_in_every_column(
    tmp_path: Path, store: Store, column: int
) -> None:
    files = LocalFiles(tmp_path / "s")
    chunks = StoredChunks(files, store._meta, _checkpoints.read(files, "final"))
    rows = rows_of(8).numpy()
    rows[3, column] = np.nan
    chunks.write([(1, rows)])  # with right sums
    (damage,) = store.check()
    assert damage.rows == range(8, 16)
    assert "not finite, in row 3 of the chunk" in damage.why
    for ask in (store.topk(rows_of(1), 3, chunks=[0]).ids.tolist,):
        ask()
    with pytest.raises(DamagedRowsError, match=r"rows/c\.1\.0 holds a number that is not finite"):
        store.topk(rows_of(1), 3)


def test_large_finite_numbers_are_no_damage(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", 8)
    store.write(range(8), torch.full((8, K), 3e38), "final")  # their sum is infinite
    assert store.check() == []


def test_a_query_that_is_not_finite_is_refused(store: Store) -> None:
    query = rows_of(2)
    query[1, 3] = torch.nan
    with pytest.raises(gf.OptionError, match="query for checkpoint 'final' holds numbers that"):
        store.topk(query, 3)


def test_a_store_of_another_format_says_so(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "s/zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["ghostfunc"]["format"] = 1
    path.write_text(json.dumps(_documents._signed(document)))
    with pytest.raises(StoreError, match="has format 1; this version reads 2"):
        Store.open(tmp_path / "s")


def test_rows_are_read_while_they_are_written_over(tmp_path: Path, store: Store) -> None:
    """A reader between the two writes sees the chunk missing, never a mixture."""
    new = rows_of(20, seed=1)
    reader, seen = Store.open(tmp_path / "s"), []

    class Watching(LocalFiles):
        def write_all(self, items: Iterable[tuple[str, bytes]]) -> None:
            super().write_all(items)
            seen.append(reader.missing("final", [0]))

    writer = Store(Watching(tmp_path / "s"), store._meta, writable=True)
    writer.write(range(8), new[:8], "final")
    assert seen == [[range(8)], []]
    assert torch.equal(reader.read(range(8), "final"), new[:8])


def test_two_processes_that_write_one_file_at_once_are_told(tmp_path: Path, store: Store) -> None:
    partial = tmp_path / "s/checkpoints/final/rows/c.0.0.partial"
    store.write(range(8), rows_of(8), "final")
    number = Faulty()
    with through(number):
        store.write(range(8), rows_of(8), "final")
    at = number.done.index("replace")
    with (
        through(Faulty(at, "before", partial.unlink)),
        pytest.raises(StoreError, match=r"rows/c\.0\.0 was changed by another process"),
    ):
        store.write(range(8), rows_of(8), "final")


def created(at: Path) -> Store:
    return Store.create(at, projection=make_projection(), n_samples=12, dtype="float32")


@pytest.mark.parametrize("call", ["create", "add_checkpoint"])
def test_the_loser_of_a_race_is_told_the_truth(tmp_path: Path, call: str) -> None:
    """At each rename of a file the other process has been quicker."""

    def act(path: Path) -> None:
        if call == "create":
            created(path)
        else:
            Store.open(path, writable=True).add_checkpoint("final", make_params())

    def folder(number: int) -> Path:
        if call == "add_checkpoint":
            created(tmp_path / str(number))
        return tmp_path / str(number)

    counted = Faulty()
    first = folder(0)
    with through(counted):
        act(first)
    renames = [i for i, name in enumerate(counted.done) if name == "replace"]
    assert len(renames) == {"create": 2, "add_checkpoint": 3}[call]
    for at in renames:
        path = folder(at)

        def quicker(path: Path = path) -> None:
            (partial,) = path.rglob("*.partial")
            partial.unlink()

        said = r"zarr\.json was changed by another process.*One process creates a store"
        with through(Faulty(at, "before", quicker)), pytest.raises(StoreError, match=said):
            act(path)


def test_threads_that_create_one_store_make_it_or_are_told(tmp_path: Path) -> None:
    told = "there is a (store|checkpoint)|changed by another process|holds the checkpoints"

    def attempt(number: int) -> str:
        try:
            created(tmp_path / str(number)).add_checkpoint("final", make_params())
        except StoreError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(attempt, [n for n in range(10) for _ in range(2)]))
    assert [text for text in said if text and not re.search(told, text)] == []


# --- files that are none ----------------------------------------------------------------------


def put(path: Path, kind: str) -> None:
    """Something else in a file's or a folder's place."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        os.mknod(path, 0o600 | (stat.S_IFIFO if kind == "a FIFO" else stat.S_IFSOCK))


@pytest.mark.skipif(sys.platform == "win32", reason="no such files there")
@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device"])
@pytest.mark.parametrize(
    "key",
    ["zarr.json", "checkpoints/final/zarr.json", "checkpoints/final/marks/zarr.json",
     "checkpoints/final/rows/c.0.0", "checkpoints/final/marks/c.0.0"],
)  # fmt: skip
def test_what_is_no_file_is_named_at_once(
    tmp_path: Path, store: Store, key: str, kind: str
) -> None:
    store.write(range(12), rows_of(12), "final")
    put(tmp_path / "s" / key, kind)

    def read_all() -> None:
        again = Store.open(tmp_path / "s", writable=True)
        again.read(range(12), "final")
        again.append(1)  # reads the documents of arrays

    with pytest.raises(StoreError, match=rf"{re.escape(key)}: it is {kind}, and no file"):
        read_all()


@pytest.mark.skipif(sys.platform == "win32", reason="no such files there")
@pytest.mark.parametrize("key", ["checkpoints", "checkpoints/final/marks"])
def test_what_is_no_folder_is_named(tmp_path: Path, store: Store, key: str) -> None:
    store.write(range(12), rows_of(12), "final")
    put(tmp_path / "s" / key, "a FIFO")
    again = Store.open(tmp_path / "s")
    with pytest.raises(StoreError, match=f"{key}: it is no folder|{key}/zarr.json is not there"):
        again.missing("final") if "marks" in key else again.checkpoint_names


@pytest.mark.skipif(sys.platform == "win32", reason="no such files there")
@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device"])
def test_nothing_is_written_into_what_is_no_file(tmp_path: Path, store: Store, kind: str) -> None:
    """What a killed process left is written over, but not what is no file."""
    put(tmp_path / "s/checkpoints/final/rows/c.0.0.partial", kind)
    with pytest.raises(StoreError, match=r"rows/c\.0\.0"):
        store.write(range(8), rows_of(8), "final")
    store.write(range(8), rows_of(8), "final")  # it was removed
    assert torch.equal(store.read(range(8), "final"), rows_of(8))


# --- the page ---------------------------------------------------------------------------------


def test_every_test_that_the_guarantees_name_is_there() -> None:
    page = PAGE.read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", page)
    assert len(named) > 15
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_every_promise_names_its_test() -> None:
    """Points and rows of tables outside the limits; rows may leave it to the line below."""
    text = PAGE.read_text(encoding="utf-8")
    lacking = []
    for part in re.split(r"\n(?=#)", text):
        if part.startswith("### Limits"):
            continue
        for point in re.findall(r"^- .*(?:\n  .*)*", part, re.M):
            if "::test_" not in point:
                lacking.append(point)
        for table in re.findall(r"(?:^\|.*\n)+", part, re.M):
            rows = table.splitlines()[2:]
            below = part[part.index(table) + len(table) :]
            if not ("Held by" in below or "::test_" in part[: part.index(table)]):
                lacking += [
                    row for row in rows if "::test_" not in row and "the same test" not in row
                ]
    assert not lacking, "\n".join(lacking)
