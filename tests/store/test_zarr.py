"""Other readers: what is on disk is zarr 3, and reads as what was written."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_projection, make_store

K = make_projection().k


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_zarr_reads_a_store(tmp_path: Path, dtype: str) -> None:
    zarr = pytest.importorskip("zarr")
    store = make_store(tmp_path / "s", 20, dtype=dtype)
    store.write(range(20), torch.arange(20.0)[:, None].expand(20, K), "final")
    store.append(7)
    group = zarr.open_group(tmp_path / "s", mode="r")
    rows, marks = group["checkpoints/final/rows"], group["checkpoints/final/marks"]
    assert list(group["checkpoints"].group_keys()) == ["final"]
    assert sorted(group["checkpoints/final"].array_keys()) == ["marks", "rows"]
    assert (rows.shape, rows.chunks, marks.shape) == ((27, K), (8, K), (4, 44))
    values = np.asarray(rows[:])
    if dtype == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(values[:20], np.broadcast_to(np.arange(20.0)[:, None], (20, K)))
    assert np.isnan(values[20:].astype(np.float32)).all()
    assert np.asarray(marks[:])[:, 0].tolist() == [8, 8, 4, 0]
    assert group.attrs["ghostfunc"]["n_samples"] == 27


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_documents_are_those_that_zarr_writes(tmp_path: Path, dtype: str) -> None:
    zarr = pytest.importorskip("zarr")
    make_store(tmp_path / "s", 20, dtype=dtype)
    for part in ("rows", "marks"):
        ours = json.loads((tmp_path / "s/checkpoints/final" / part / "zarr.json").read_text())
        place = zarr.storage.MemoryStore()
        zarr.create_array(
            place,
            shape=tuple(ours["shape"]),
            chunks=tuple(ours["chunk_grid"]["configuration"]["chunk_shape"]),
            dtype=ours["data_type"],
            fill_value=float("nan") if ours["fill_value"] == "NaN" else ours["fill_value"],
            serializer=zarr.codecs.BytesCodec(
                endian="little" if ours["data_type"] != "uint8" else None
            ),
            compressors=[zarr.codecs.Crc32cCodec()],
            chunk_key_encoding={"name": "default", "separator": "."},
        )
        prototype = zarr.core.buffer.default_buffer_prototype()
        # In a thread: other tests may have an event loop running in this one.
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit(asyncio.run, place.get("zarr.json", prototype)).result()
        theirs = json.loads(read.to_bytes())
        assert {**ours, "attributes": {}} == theirs
