"""The metadata of a store: the signed attributes of its root, in ranges that make sense."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from numbers import Integral
from typing import Any

from ghostfunc._base.errors import GhostError, OptionError
from ghostfunc.projection import Projection, projection_from_spec
from ghostfunc.projection._projection import OF_TENSORS
from ghostfunc.store import _documents, _dtypes
from ghostfunc.store._errors import IncompatibleStoreError, StoreError
from ghostfunc.store._files import Files

FORMAT = 2
ROOT = "zarr.json"
MOST = 2**48
"""No store has more samples, and no chunk more bytes."""


@dataclass(frozen=True)
class Meta:
    """The root's metadata.

    Attributes:
        projection: the operator that makes the rows.
        n_samples: how many there are; sample ids are `0 ... n_samples - 1`.
        dtype: what rows are stored as.
        chunk_rows: samples per chunk.
        tokenizer, notes: as given at creation.
        edges: earlier numbers of samples that cut a chunk in two: only these chunks can be done in
            part.
        made_by: version of ghostfunc.
    """

    projection: Projection
    n_samples: int
    dtype: str
    chunk_rows: int
    tokenizer: str | None
    notes: dict[str, Any]
    edges: tuple[int, ...] = ()
    made_by: str = version("ghostfunc")

    @cached_property
    def identity(self) -> str:
        """A hash of what all rows of the store have in common."""
        return _documents.digest([self.projection.spec(), self.dtype, self.chunk_rows])

    def grown(self, count: int) -> Meta:
        """The metadata with room for `count` more samples."""
        cut = (self.n_samples,) if self.n_samples % self.chunk_rows else ()
        return replace(self, n_samples=self.n_samples + count, edges=self.edges + cut)

    def write(self, files: Files) -> None:
        """Replace the root's metadata."""
        content = {
            "format": FORMAT,
            "ghostfunc": self.made_by,
            "projection": self.projection.spec(),
            "k": self.projection.k,
            "n_samples": self.n_samples,
            "dtype": self.dtype,
            "chunk_rows": self.chunk_rows,
            "tokenizer": self.tokenizer,
            "notes": self.notes,
            "edges": list(self.edges),
        }
        _documents.write(files, ROOT, _documents.group({"ghostfunc": content}))

    @classmethod
    def read(cls, files: Files, given: Projection | None = None) -> Meta:
        """The root's metadata; `StoreError` unless it is that of a store. A projection that is made
        of tensors has to be `given`."""
        attributes = _documents.read_group(files, ROOT)
        if attributes is None:
            raise StoreError(
                f"there is no store at {files}: it has no {ROOT}. Make one with Store.create."
            )
        content = attributes.get("ghostfunc")
        name = f"{files}/{ROOT}"
        if not isinstance(content, dict):
            raise StoreError(f"{name} is not the metadata of a store: it has no 'ghostfunc'.")
        if content.get("format") != FORMAT:
            raise StoreError(
                f"{name} has format {content.get('format')!r}; this version reads {FORMAT}. Make "
                "the store anew."
            )
        for key, what, holds in FIELDS:
            if not (key in content and holds(content[key])):
                raise StoreError(f"{name} is damaged: {key}={content.get(key)!r} is not {what}.")
        try:
            projection = _projection_of(content["projection"], given, files)
        except IncompatibleStoreError:
            raise
        except GhostError as error:
            raise StoreError(f"{name} is damaged: its projection is none. {error}") from error
        row_bytes = projection.k * _dtypes.BYTES[content["dtype"]]
        if projection.k != content["k"] or content["chunk_rows"] * row_bytes > MOST:
            raise StoreError(
                f"{name} is damaged: k={content['k']} and chunk_rows={content['chunk_rows']} do "
                f"not fit its projection to {projection.k} columns."
            )
        return cls(
            projection=projection,
            n_samples=content["n_samples"],
            dtype=content["dtype"],
            chunk_rows=content["chunk_rows"],
            tokenizer=content["tokenizer"],
            notes=content["notes"],
            edges=tuple(content["edges"]),
            made_by=content["ghostfunc"],
        )


def _projection_of(spec: dict[str, Any], given: Projection | None, files: Files) -> Projection:
    """What made the rows: of a seed, or the one that is given."""
    kind = spec["kind"]
    if not kind.startswith(OF_TENSORS):
        return projection_from_spec(spec)
    if given is None:
        raise IncompatibleStoreError(
            f"{files} holds rows of kind {kind!r}, which no seed makes. Open it with "
            "projection=curvature.rows(...), of the curvature and the damping that made them."
        )
    if given.spec() != spec:
        raise IncompatibleStoreError(
            f"{files} holds rows of kind {kind!r}; the given projection is {given.kind!r}. Rows of "
            "another curvature or damping cannot be compared."
        )
    return given


def _natural(x: object) -> bool:
    return type(x) is int and 1 <= x <= MOST


def _naturals(x: object) -> bool:
    return isinstance(x, list) and all(map(_natural, x))


def _dtype(x: object) -> bool:
    return isinstance(x, str) and x in _dtypes.TORCH


def _block(x: object) -> bool:
    if not isinstance(x, dict) or set(x) != {"path", "shape", "k_o", "k_i"}:
        return False
    if not (isinstance(x["path"], str) and _naturals(x["shape"])):
        return False
    if not (_natural(x["k_o"]) and _natural(x["k_i"])):
        return False
    return max(math.prod(x["shape"]), x["k_o"] * x["k_i"]) <= MOST


def _projection(x: object) -> bool:
    keys = {"format", "kind", "seed", "compress", "blocks"}
    if not isinstance(x, dict) or set(x) != keys:
        return False
    if not (isinstance(x["kind"], str) and type(x["seed"]) is int):
        return False
    if not (x["compress"] is None or _natural(x["compress"])):
        return False
    blocks = x["blocks"]
    return isinstance(blocks, list) and bool(blocks) and all(map(_block, blocks))


_FIELD = tuple[str, str, Callable[[Any], bool]]
FIELDS: tuple[_FIELD, ...] = (
    ("ghostfunc", "a version", lambda x: isinstance(x, str)),
    ("projection", "the specification of a projection", _projection),
    ("k", "a number of columns", _natural),
    ("n_samples", "a number of samples", _natural),
    ("dtype", f"one of {', '.join(_dtypes.TORCH)}", _dtype),
    ("chunk_rows", "a number of samples", _natural),
    ("tokenizer", "a string or null", lambda x: x is None or isinstance(x, str)),
    ("notes", "an object", lambda x: isinstance(x, dict)),
    ("edges", "a list of numbers of samples", _naturals),
)


def json_of(name: str, value: object) -> Any:
    """`value` as JSON keeps it; `OptionError` for what JSON cannot hold."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(
            f"{name} cannot be written as JSON: {error}. Use dicts with string keys, lists, "
            "strings, finite numbers, booleans and None."
        ) from error


def check_count(name: str, value: object) -> int:
    """`value` as a number of samples; `OptionError` if it is none."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not 1 <= int(value) <= MOST:  # type: ignore[call-overload]
        raise OptionError(f"{name}={value!r} must be a whole number of at least 1.")
    return int(value)  # type: ignore[call-overload]
