"""The checkpoints of a store: names, what each is, how one comes and goes.

    checkpoints/<name>/rows/zarr.json, marks/zarr.json     the two arrays
    checkpoints/<name>/zarr.json                           what the checkpoint is; written last

The last one decides: a folder without it is no checkpoint. A folder that has marks but has lost it
is never written over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ghostfunc._base.errors import OptionError
from ghostfunc.store import _chunk, _documents, _dtypes
from ghostfunc.store._errors import StoreError
from ghostfunc.store._files import Files
from ghostfunc.store._meta import Meta

FOLDER = "checkpoints"
DOCUMENT = "zarr.json"


@dataclass(frozen=True)
class Checkpoint:
    """The identity of a checkpoint.

    Attributes:
        name: its name, also of its folder.
        lr: learning rate, or None.
        model: fingerprint of its parameters.
    """

    name: str
    lr: float | None
    model: str

    def owner(self, meta: Meta) -> str:
        """A hash of what the rows belong to."""
        return _documents.digest([meta.identity, self.name, self.model])


def prepare(files: Files) -> None:
    """Write the document of the folder of checkpoints, for other readers of zarr."""
    _documents.write(files, f"{FOLDER}/{DOCUMENT}", _documents.group({}))


def folder_of(name: str) -> str:
    """The folder of a checkpoint."""
    return f"{FOLDER}/{name}"


def _key(name: str) -> str:
    return f"{folder_of(name)}/{DOCUMENT}"


def names(files: Files) -> list[str]:
    """Names of the checkpoints, sorted; nothing else of them is read."""
    found = [name for name in files.names(FOLDER) if _is_name(name)]
    return sorted(name for name in found if files.exists(_key(name)))


def bereft(files: Files) -> list[str]:
    """Names of folders that have marks of rows but no document."""
    found = [name for name in files.names(FOLDER) if _is_name(name)]
    return sorted(n for n in found if not files.exists(_key(n)) and _has_marks(files, n))


def _has_marks(files: Files, name: str) -> bool:
    return any(x.startswith("c.") for x in files.names(f"{folder_of(name)}/marks"))


def _is_name(name: object) -> bool:
    if not isinstance(name, str) or not 0 < len(name) <= 200:
        return False
    plain = name.isascii() and all(c.isalnum() or c in "._-" for c in name)
    return plain and not name.startswith((".", DOCUMENT))


def check_name(name: object) -> None:
    """Raise `OptionError` for what cannot be the name of a checkpoint."""
    if not _is_name(name):
        raise OptionError(
            f"name={name!r} cannot be that of a checkpoint: use at most 200 letters a-z and A-Z, "
            "digits, '.', '_', '-'; not '.' at the start, and not 'zarr.json'."
        )


def check_rate(lr: object) -> float | None:
    """A learning rate, or None; `OptionError` for what is none."""
    if lr is None:
        return None
    if not _is_rate(lr):
        raise OptionError(f"lr={lr!r} must be a finite number, or None.")
    return float(lr)  # type: ignore[arg-type]


def _is_rate(lr: object) -> bool:
    return isinstance(lr, int | float) and not isinstance(lr, bool) and math.isfinite(lr)


def read(files: Files, name: str) -> Checkpoint:
    """The checkpoint of a name; `OptionError` if there is none, `StoreError` if it is damaged."""
    attributes = _documents.read_group(files, _key(name)) if _is_name(name) else None
    if attributes is None:
        lost = (
            f" {files}/{folder_of(name)} has rows, but its {DOCUMENT} is not there: put that file "
            "back, or call store.remove_checkpoint."
            if _is_name(name) and _has_marks(files, name)
            else ""
        )
        raise OptionError(
            f"there is no checkpoint {name!r}; the store has {names(files) or 'none'}. Make it "
            f"with store.add_checkpoint.{lost}"
        )
    content = attributes.get("ghostfunc")
    where = f"{files}/{_key(name)}"
    if not isinstance(content, dict) or set(content) != {"name", "lr", "model"}:
        raise StoreError(f"{where} is damaged: it does not describe a checkpoint.")
    lr, model = content["lr"], content["model"]
    if content["name"] != name or not isinstance(model, str):
        raise StoreError(
            f"{where} is damaged: it is that of a checkpoint {content['name']!r}, not of {name!r}."
        )
    if lr is not None and not _is_rate(lr):
        raise StoreError(f"{where} is damaged: lr={lr!r} is no learning rate.")
    return Checkpoint(name, lr, model)


def add(files: Files, meta: Meta, checkpoint: Checkpoint) -> None:
    """Make room for a checkpoint's rows; killed before the last write, there is none."""
    name = checkpoint.name
    if files.exists(_key(name)):
        raise StoreError(
            f"there is a checkpoint {name!r} at {files} already. Choose another name, or remove it "
            "first (store.remove_checkpoint)."
        )
    if _has_marks(files, name):
        raise StoreError(
            f"{files}/{folder_of(name)} has rows, but its {DOCUMENT} is not there. Put that file "
            "back, or call store.remove_checkpoint, which removes these rows."
        )
    files.delete_tree(folder_of(name))
    write_documents(files, meta, name)
    content = {"name": name, "lr": checkpoint.lr, "model": checkpoint.model}
    _documents.write(files, _key(name), _documents.group({"ghostfunc": content}))


def remove(files: Files, name: str) -> None:
    """Remove a checkpoint, or what is left of one; gone with the first write."""
    folder = folder_of(name)
    if not _is_name(name) or name not in files.names(FOLDER):
        raise OptionError(
            f"there is no checkpoint {name!r}; the store has {names(files) or 'none'}."
        )
    files.delete(_key(name))
    files.delete_tree(f"{folder}/marks")
    files.delete_tree(folder)


def _documents_of(meta: Meta, n: int) -> dict[str, dict[str, Any]]:
    """The documents of both arrays for n samples."""
    rows, k = meta.chunk_rows, meta.projection.k
    stored, fill = _dtypes.STORED[meta.dtype], _dtypes.UNWRITTEN[meta.dtype]
    return {
        "rows": _documents.array((n, k), (rows, k), stored, fill),
        "marks": _documents.array(
            (-(-n // rows), _chunk.MARK_BYTES), (1, _chunk.MARK_BYTES), "uint8", 0
        ),
    }


def write_documents(files: Files, meta: Meta, name: str) -> None:
    """Write the documents of both arrays, for as many samples as the store has."""
    for part, document in _documents_of(meta, meta.n_samples).items():
        _documents.write(files, f"{folder_of(name)}/{part}/{DOCUMENT}", document)


def check_documents(files: Files, meta: Meta, name: str) -> None:
    """Raise `StoreError` unless both arrays are what the store says, and long enough.

    They may be longer: appending was killed before the root said so.
    """
    for part in ("rows", "marks"):
        key = f"{folder_of(name)}/{part}/{DOCUMENT}"
        found = _documents.read(files, key)
        if found is None:
            raise StoreError(f"{files}/{key} is not there. Put it back from a copy of the store.")
        shape = found.get("shape")
        expected = _documents_of(meta, meta.n_samples)[part]
        length = shape[0] if isinstance(shape, list) and shape else None
        if type(length) is int and length > expected["shape"][0]:
            n = length if part == "rows" else length * meta.chunk_rows
            expected = _documents_of(meta, n)[part]
        if found != expected:
            wrong = [k for k in expected if found.get(k) != expected[k]] or sorted(found)
            raise StoreError(
                f"{files}/{key} is damaged: it is not the array that the store describes; they "
                f"differ in {', '.join(wrong)}."
            )
