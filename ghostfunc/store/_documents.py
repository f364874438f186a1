"""The `zarr.json` of groups and arrays: zarr 3, each with a checksum over all of it.

    {"zarr_format": 3, "node_type": "group", "attributes": {..., "ghostfunc_sha256": "..."}}

Everything that a store relies on stands in such a document, and is what it was when it was written,
or the document is refused.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ghostfunc.store._errors import StoreError
from ghostfunc.store._files import Files

MOST_BYTES = 64 << 20
"""No document is larger: a projection of 100,000 parameters takes a fifth of it."""
SUM = "ghostfunc_sha256"


def digest(content: Any) -> str:
    """SHA-256 of anything that is JSON."""
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def group(attributes: dict[str, Any]) -> dict[str, Any]:
    """The document of a group."""
    return _signed({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def array(
    shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str, fill: object
) -> dict[str, Any]:
    """The document of an array: little-endian chunks, each followed by its crc32c.

    Random numbers do not compress; the checksum is the only codec.
    """
    endian = {} if dtype == "uint8" else {"configuration": {"endian": "little"}}
    return _signed(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": fill,
            "codecs": [{"name": "bytes", **endian}, {"name": "crc32c"}],
            "attributes": {},
            "storage_transformers": [],
        }
    )


def _signed(document: dict[str, Any]) -> dict[str, Any]:
    attributes = {k: v for k, v in document["attributes"].items() if k != SUM}
    unsigned = {**document, "attributes": attributes}
    return {**document, "attributes": {**attributes, SUM: digest(unsigned)}}


def write(files: Files, key: str, document: dict[str, Any], *, shared: bool = False) -> None:
    """Replace a document."""
    files.write(key, json.dumps(document, indent=2).encode(), shared=shared)


def read(files: Files, key: str) -> dict[str, Any] | None:
    """A document as it was written, None if there is none; `StoreError` if it was changed."""
    data = files.read(key, MOST_BYTES)
    if data is None:
        return None
    name = f"{files}/{key}"
    try:
        document = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{name} is damaged: it is no JSON ({error}).") from error
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if not isinstance(attributes, dict) or attributes.get(SUM) is None:
        raise StoreError(f"{name} is damaged: it has no checksum {SUM} among its attributes.")
    try:
        expected = _signed(document)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{name} is damaged: {error}.") from error
    if expected != document:
        raise StoreError(f"{name} is damaged: its checksum does not hold.")
    return dict(document)


def read_group(files: Files, key: str) -> dict[str, Any] | None:
    """The attributes of a group, as they were written; None if there is no document."""
    document = read(files, key)
    if document is None:
        return None
    attributes = {k: v for k, v in document["attributes"].items() if k != SUM}
    if document != group(attributes):
        raise StoreError(f"{files}/{key} is damaged: it is not the document of a zarr 3 group.")
    return attributes


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")
