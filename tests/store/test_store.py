"""Writing, reading, growing and checking a store."""

from __future__ import annotations

import json
import threading
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_params, make_projection, make_store

import ghostfunc as gf
from ghostfunc.store import (
    DamagedRowsError,
    IncompatibleStoreError,
    IncompleteStoreError,
    Store,
    StoreError,
    fingerprint,
)

K = make_projection().k


def rows_of(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, K, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_is_read(tmp_path: Path, dtype: str) -> None:
    store = make_store(tmp_path / "s", 20, dtype=dtype)
    rows = rows_of(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    store.write(order.tolist(), rows[order], "final")
    again = Store.open(tmp_path / "s", projection=make_projection())
    want = rows.to(getattr(torch, dtype)).float()
    assert torch.equal(again.read(range(20), "final"), want)
    assert torch.equal(again.read([17, 3, 9, 3], "final"), want[[17, 3, 9, 3]])
    assert again.dtype == dtype
    assert again.checkpoints == {"final": 0.5}
    assert len(again.missing("final")) == 0
    assert torch.equal(torch.cat([x for _, x in again.chunks("final")]), want)


def test_a_stream_that_is_given_up_waits_for_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector ends such streams, in the middle of anything: where the starting thread
    has a lock of `threading`, waiting for another thread never came to an end."""
    store = make_store(tmp_path / "s", 20)
    store.write(range(20), rows_of(20), "final")
    stream = store.chunks("final")
    next(stream)
    waited: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "join", lambda thread, *args: waited.append(thread))
    stream.close()  # type: ignore[attr-defined]
    assert not waited


def test_a_fsspec_url() -> None:
    url = "memory://ghostfunc-test/store"
    store = make_store(url, 20)
    store.write(range(20), rows_of(20), "final")
    assert torch.equal(Store.open(url).read(range(20), "final"), rows_of(20))


def test_a_file_url_is_a_local_path(tmp_path: Path) -> None:
    url = (tmp_path / "s").as_uri()
    assert url.startswith("file:///")
    make_store(url, 20).write(range(20), rows_of(20), "final")
    assert torch.equal(Store.open(tmp_path / "s").read(range(20), "final"), rows_of(20))
    assert torch.equal(Store.open(url).read(range(20), "final"), rows_of(20))


def test_what_a_store_says_of_itself(tmp_path: Path) -> None:
    notes = {"corpus": "poems", "sizes": [1, 2]}
    make_store(tmp_path / "s", 20, tokenizer="bytes", notes=notes, dtype="bfloat16")
    store = Store.open(tmp_path / "s")
    assert (store.tokenizer, store.notes, store.dtype) == ("bytes", notes, "bfloat16")
    assert store.projection == make_projection()
    meta = json.loads((tmp_path / "s/zarr.json").read_text())["attributes"]["ghostfunc"]
    assert meta["ghostfunc"] == version("ghostfunc")
    assert meta["projection"] == make_projection().spec()
    model = json.loads((tmp_path / "s/checkpoints/final/zarr.json").read_text())
    assert model["attributes"]["ghostfunc"] == {
        "name": "final",
        "lr": 0.5,
        "model": fingerprint(make_params()),
    }


def test_missing_and_whole_chunks(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", 20)
    assert [store.chunk(i) for i in range(store.n_chunks)] == [
        range(8),
        range(8, 16),
        range(16, 20),
    ]
    store.write(store.chunk(1), rows_of(8), "final")
    assert store.missing("final") == [range(8), range(16, 20)]
    assert store.missing("final", [1]) == []
    with pytest.raises(StoreError, match=r"samples 3-7 of the chunk 0-7 would still be missing"):
        store.write(range(3), rows_of(3), "final")
    with pytest.raises(IncompleteStoreError, match=r"samples 0-7 have no row"):
        store.read([9, 2], "final")
    with pytest.raises(IncompleteStoreError, match="project_dataset completes"):
        store.scores(rows_of(1))


def test_growing(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", 20)
    store.write(range(20), rows_of(20), "final")
    assert store.append(7) == range(20, 27)
    store = Store.open(tmp_path / "s", writable=True)
    assert store.missing("final") == [range(20, 27)]
    store.write(range(20, 27), rows_of(7, seed=1), "final")
    whole = torch.cat([rows_of(20), rows_of(7, seed=1)])
    assert torch.equal(store.read(range(27), "final"), whole)
    assert store.check() == []


def test_several_checkpoints(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", 8)
    store.add_checkpoint("early", make_params(3), lr=1.0)
    store.write(range(8), rows_of(8), "early")
    assert store.checkpoints == {"early": 1.0, "final": 0.5}
    assert len(store.missing("early")) == 0
    assert store.missing("final") == [range(8)]
    with pytest.raises(gf.OptionError, match=r"no checkpoint 'late'; the store has \['early'"):
        store.missing("late")
    with pytest.raises(StoreError, match="already"):
        store.add_checkpoint("early", make_params())
    with pytest.raises(gf.OptionError, match=r"'\.\./x' cannot be that of a checkpoint"):
        store.add_checkpoint("../x", make_params())


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", 8)
    with pytest.raises(IncompatibleStoreError, match="differ in seed: 0 and 1"):
        Store.open(tmp_path / "s", projection=make_projection(seed=1))
    with pytest.raises(IncompatibleStoreError, match="differ in kind"):
        Store.open(tmp_path / "s", projection=make_projection(kind="sparse"))
    fewer = gf.kronecker_projection(
        make_params(), rank_total=16, rank_min=2, kind="rademacher", seed=0, layers=["w"]
    )
    with pytest.raises(IncompatibleStoreError, match="differ in blocks"):
        store.check_projection(fewer)
    store.check_model("final", make_params())
    with pytest.raises(IncompatibleStoreError, match="different models"):
        store.check_model("final", make_params(1))


def test_bad_calls(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", 8)
    with pytest.raises(StoreError, match="already"):
        make_store(tmp_path / "s", 8)
    with pytest.raises(StoreError, match="no store"):
        Store.open(tmp_path / "other")
    with pytest.raises(gf.OptionError, match="dtype='float8'"):
        make_store(tmp_path / "t", 8, dtype="float8")
    with pytest.raises(gf.OptionError, match=r"expected \[8, "):
        store.write(range(8), rows_of(8)[:, :2], "final")
    with pytest.raises(gf.OptionError, match="more than once"):
        store.write([0] * 8, rows_of(8), "final")
    with pytest.raises(gf.OptionError, match=r"0 \.\.\. 7; got 1 to 8"):
        store.write(range(1, 9), rows_of(8), "final")
    with pytest.raises(StoreError, match="row 2 of 8 is not finite as float32"):
        store.write(range(8), rows_of(8).index_fill(0, torch.tensor([2]), torch.inf), "final")
    half = make_store(tmp_path / "h", 8, dtype="float16")
    with pytest.raises(StoreError, match="Store float32 or bfloat16"):
        half.write(range(8), rows_of(8) * 1e6, "final")
    with pytest.raises(StoreError, match="writable=True"):
        Store.open(tmp_path / "s").write(range(8), rows_of(8), "final")


# --- damage -----------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)


@pytest.mark.parametrize("array", ["rows", "marks"])
def test_a_flipped_byte_in_any_chunk_is_found_and_mended(tmp_path: Path, array: str) -> None:
    store = make_store(tmp_path / "s", 20)
    store.write(range(20), rows_of(20), "final")
    assert store.check() == []
    random = np.random.default_rng(0)
    for number in range(3):
        path = tmp_path / "s/checkpoints/final" / array / f"c.{number}.0"
        before = path.read_bytes()
        flip(path, int(random.integers(len(before))))
        (damage,) = store.check()
        assert (damage.checkpoint, damage.rows) == ("final", store.chunk(number))
        with pytest.raises(DamagedRowsError) as error:
            store.scores(rows_of(1))
        assert error.value.rows == store.chunk(number)
        store.discard([damage])
        assert store.missing("final") == [store.chunk(number)]
        store.write(store.chunk(number), rows_of(20)[list(store.chunk(number))], "final")
        assert path.read_bytes() == before
        assert store.check() == []


def test_torn_and_lost_chunks_are_found(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", 20)
    store.write(range(20), rows_of(20), "final")
    chunks = tmp_path / "s/checkpoints/final/rows"
    (chunks / "c.0.0").write_bytes((chunks / "c.0.0").read_bytes()[:-100])
    (chunks / "c.2.0").unlink()
    assert [d.rows for d in store.check()] == [range(8), range(16, 20)]
    assert "not there" in store.check()[1].why
    (tmp_path / "s/checkpoints/final/marks/c.1.0").unlink()
    assert store.missing("final", [1]) == store.missing("final") == [range(8, 16)]


@pytest.mark.parametrize("file", ["zarr.json", "checkpoints/final/zarr.json"])
def test_changed_metadata_is_found(tmp_path: Path, file: str) -> None:
    store = make_store(tmp_path / "s", 8)
    path = tmp_path / "s" / file
    meta = json.loads(path.read_text())
    inner = meta["attributes"]["ghostfunc"]
    inner["seed" if "k" in inner else "lr"] = 7
    path.write_text(json.dumps(meta))
    with pytest.raises(StoreError, match="damaged"):
        Store.open(tmp_path / "s").check_model("final", make_params())
    path.write_text(path.read_text().replace("{", "[", 1))
    with pytest.raises(StoreError):
        Store.open(tmp_path / "s").check_model("final", make_params())
    del store
