"""Files to samples, and rows that cannot be used to a file beside the output."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ghostfunc._base.types import PyTree
from ghostfunc._base.whole_files import write_whole
from ghostfunc.cli._errors import CommandError
from ghostfunc.cli._model import Loaded
from ghostfunc.cli._options import Loading
from ghostfunc.cli._say import say
from ghostfunc.data import Encoded, Fault, Rows, batches, encode
from ghostfunc.data._progress import Progress
from ghostfunc.data._select import KEY
from ghostfunc.report._images import thumbnail


def read(
    path: Path,
    model: Loaded,
    options: Loading,
    aside: Path | None,
    *,
    quiet: bool,
    writes: bool = True,
) -> tuple[Rows, Encoded]:
    """The rows of a file, and their tokens. With `--bad-rows set-aside`, rows that cannot be used
    are written to `aside`, by the process that `writes`."""
    rows = Rows.open(path)
    faults: list[Fault] | None = [] if options.bad_rows == "set-aside" else None
    encoded = encode(
        rows, model.tokenizer, max_length=model.max_length, faults=faults, progress=not quiet
    )
    if faults:
        if aside is None:
            raise CommandError("\n".join(f"{fault.where}: {fault.why}" for fault in faults[:10]))
        if writes:
            _set_aside(faults, aside)
        say(f"{len(faults):,} of {len(rows):,} rows of {path} cannot be used: see {aside}")
    if not len(encoded):
        raise CommandError(f"{path}: no row can be used.")
    for row, tokens in zip(encoded.rows, encoded.tokens, strict=True):
        if int(tokens.max()) >= model.vocabulary:
            raise CommandError(
                f"{rows.where(row)}: the tokenizer makes the token {int(tokens.max())}, and the "
                f"model knows {model.vocabulary:,}: it is another model's tokenizer, or tokens "
                "were added without model.resize_token_embeddings."
            )
    if encoded.truncated:
        say(f"{encoded.truncated:,} rows of {path} are cut to {model.max_length:,} tokens")
    return rows, encoded


def check_kept(path: Path, *inputs: Path) -> None:
    """Raise if writing there would overwrite what is read."""
    if os.path.realpath(path) in map(os.path.realpath, inputs):
        raise CommandError(f"{path} is one of the inputs; it would be lost. Choose another name.")


def check_new(rows: Rows, used: Iterable[int], image: str | None) -> None:
    """Raise before anything is computed where what was chosen could not be written, or not be
    shown."""
    for row in used:
        if KEY in rows[row]:
            raise CommandError(
                f"{rows.where(row)} has a key {KEY!r} already: it was chosen by an earlier run. "
                "Remove the key, or choose from the first file."
            )
        if image is not None:
            thumbnail(rows, row, image)


def check_columns(rows: Rows, used: Iterable[int], path: Path, **columns: str | None) -> None:
    """Raise unless some of the rows has each of the columns that options name."""
    used = list(used)
    for option, column in columns.items():
        if column is not None and not any(column in rows[i] for i in used):
            raise CommandError(f"--{option} {column}: no row of {path} has such a column.")


def _set_aside(faults: list[Fault], path: Path) -> None:
    lines = [json.dumps({"where": f.where, "row": f.row, "why": f.why}) + "\n" for f in faults]
    write_whole(path, lambda temporary: temporary.write_text("".join(lines), encoding="utf-8"))


def batch_of(model: Loaded, samples: Encoded, count: int) -> PyTree:
    """The first samples as one batch, on the model's device."""
    device = next(iter(model.params.values())).device
    batch = model.collate([samples[i] for i in range(min(count, len(samples)))])
    return {name: x.to(device) for name, x in batch.items()}


def target_batches(model: Loaded, target: Encoded, bar: Progress | None = None) -> Iterator[PyTree]:
    """The batches of the target, on the model's device. A bar is told when the next one is asked
    for."""
    device = next(iter(model.params.values())).device
    bar = Progress() if bar is None else bar
    for batch in batches(target, collate=model.collate, length=target.length):
        rows, longest = batch["input_ids"].shape
        bar.begin(f"{rows} of up to {longest:,} tokens")
        yield {name: x.to(device) for name, x in batch.items()}
        bar.advance(rows, rows * longest)


def content_of(path: Path) -> str:
    """SHA-256 of a file, or of the files in a folder."""
    sha = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    sha.update(block)
    return sha.hexdigest()


def check_out(path: Path, endings: tuple[str, ...], *inputs: Path) -> None:
    """Raise unless a file of that kind can be written there, without a loss of what is read."""
    check_kept(path, *inputs)
    if path.suffix not in endings:
        raise CommandError(f"{path}: expected a name that ends with {' or '.join(endings)}.")
    folder = next(x for x in path.absolute().parents if os.path.lexists(x))
    if not folder.is_dir():
        raise CommandError(f"{path}: {folder} is no folder.")
    if path.is_dir():
        raise CommandError(f"{path} is a folder; expected a file to write.")
