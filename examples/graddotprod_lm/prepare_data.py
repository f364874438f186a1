"""Turn folders of text, one of every domain, into the token files that `train.py` reads.

    <input_dir>/<domain>/*.txt      cut into documents at blank lines, of 1 KiB or more
                                (from 2 KiB on, at the end of any line)
    <input_dir>/<domain>/*.jsonl    one document a line: the string under "text"

    python -m examples.graddotprod_lm.prepare_data --input_dir texts --pile_dir data \\
        --tokenizer bytes --held_out_one_in 20 --seed 0

The tokenizer is `bytes` (token = byte, 256 ends a document) or the path of a `tokenizer.json` of
the `tokenizers` library, such as GPT-2's. Of every `held_out_one_in` documents in a row, one goes
to val and one to test. Text is streamed; run the same command again to go on after an interruption.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from examples.graddotprod_lm import atomic
from examples.graddotprod_lm.data import SPLITS, TOKEN, SplitName, file_name, token_path
from examples.strict_cli import parse

MIN_DOCUMENT, MAX_DOCUMENT = 1 << 10, 2 << 10
SAVE_EVERY = 4 << 20
"""Bytes of text between two notes of how far we are."""
END_OF_TEXT = "<|endoftext|>"

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Config:
    """Text to tokens."""

    input_dir: Path
    """One folder for each domain; its name is the domain's."""
    pile_dir: Path
    """Where the token files go."""
    tokenizer: str
    """bytes, or the path of a tokenizer.json."""
    held_out_one_in: int
    """Of so many documents in a row, one goes to val and one to test."""
    seed: int
    """Of the choice which."""


def load_tokenizer(name: str) -> Encode:
    """The function that turns a document into tokens, the one that ends it included.

    Raises:
        FileNotFoundError, ValueError: there is no such file; its tokens do not fit 16 bits, or
            none of them ends a document.
    """
    if name == "bytes":
        return lambda text: [*text.encode(), 256]
    if not Path(name).is_file():
        raise FileNotFoundError(f"--tokenizer {name}: neither `bytes` nor a file.")
    tokenizer = Tokenizer.from_file(name)
    size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id(END_OF_TEXT)
    if size > 1 << 16:
        raise ValueError(f"{name} has {size} tokens; files of uint16 hold up to {1 << 16}.")
    if end is None:
        raise ValueError(f"{name} has no token {END_OF_TEXT!r} to end a document with.")
    return lambda text: [*tokenizer.encode(text, add_special_tokens=False).ids, end]


def documents(file: BinaryIO, path: Path) -> Iterator[str]:
    """The documents of an open file from where it stands; after each, it stands at the next."""
    if path.suffix == ".jsonl":
        while line := file.readline():
            start = file.tell() - len(line)
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line at byte {start}: expected a JSON object with a string under "
                    f'"text", got {line[:60]!r}.'
                ) from error
            yield text
        return
    lines: list[bytes] = []
    size = 0
    while line := file.readline():
        lines.append(line)
        size += len(line)
        if size >= (MAX_DOCUMENT if line.strip() else MIN_DOCUMENT):
            yield b"".join(lines).decode()
            lines, size = [], 0
    if lines:
        yield b"".join(lines).decode()


def choose_split(document: int, one_in: int, seed: int) -> SplitName:
    """Where a domain's document goes: the same whenever it is asked."""
    block, place = divmod(document, one_in)
    val, test = np.random.default_rng([seed, block]).choice(one_in, 2, replace=False)
    return "val" if place == val else "test" if place == test else "train"


@dataclass
class Progress:
    """How far a domain is: everything before this place is in the token files.

    Attributes:
        file: which of the domain's text files, in order of their names.
        offset: bytes of it that are done.
        documents: of the domain that are done.
        written: bytes of each token file.
    """

    file: int
    offset: int
    documents: int
    written: dict[str, int]


class Domain:
    """The preparation of one domain, under way."""

    def __init__(self, config: Config, folder: Path, encode: Encode, bar: tqdm[None]) -> None:
        self.config, self.folder, self.encode, self.bar = config, folder, encode, bar
        self.note = config.pile_dir / f"progress-{file_name(folder.name)}.json"
        self.at = Progress(0, 0, 0, dict.fromkeys(SPLITS, 0))
        if self.note.exists():
            self.at = Progress(**json.loads(self.note.read_text("utf-8")))
        self.paths = {split: token_path(config.pile_dir, split, folder.name) for split in SPLITS}

    def run(self) -> None:
        files = text_files(self.folder)
        outputs = {split: self._open(split) for split in SPLITS}
        try:
            self.bar.update(sum(f.stat().st_size for f in files[: self.at.file]) + self.at.offset)
            while self.at.file < len(files):
                self._file(files[self.at.file], outputs)
                self.at.file, self.at.offset = self.at.file + 1, 0
                self._save(outputs)
        finally:
            for output in outputs.values():
                output.close()
        for split, path in self.paths.items():
            partial = self._partial(split)
            if partial.exists():
                partial.replace(path)

    def _partial(self, split: SplitName) -> Path:
        path = self.paths[split]
        return path.with_name(path.name + atomic.PARTIAL)

    def _open(self, split: SplitName) -> BinaryIO:
        """The token file at the place that is noted; what was written later is cut off."""
        path = self.paths[split] if self.paths[split].exists() else self._partial(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        output = path.open("r+b")
        output.truncate(self.at.written[split])
        output.seek(self.at.written[split])
        return output

    def _file(self, path: Path, outputs: dict[SplitName, BinaryIO]) -> None:
        with path.open("rb") as file:
            file.seek(self.at.offset)
            start = saved = self.at.offset
            for text in documents(file, path):
                c = self.config
                split = choose_split(self.at.documents, c.held_out_one_in, c.seed)
                outputs[split].write(np.array(self.encode(text), TOKEN).tobytes())
                self.at.documents += 1
                end = file.tell()
                self.bar.update(end - start)
                start = self.at.offset = end
                if end - saved >= SAVE_EVERY:
                    self._save(outputs)
                    saved = end

    def _save(self, outputs: dict[SplitName, BinaryIO]) -> None:
        for split, output in outputs.items():
            output.flush()
            self.at.written[split] = output.tell()
        atomic.write_json(self.note, vars(self.at))


def text_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in (".txt", ".jsonl"))


def prepare(config: Config) -> None:
    """Prepare every domain, in order of their names, and list them in `domains.txt`.

    Raises:
        FileNotFoundError: there is no text.
        ValueError: an option is out of range, or the folder was begun with other options.
    """
    if config.held_out_one_in < 3:
        raise ValueError(f"--held_out_one_in {config.held_out_one_in} has to be at least 3.")
    encode = load_tokenizer(config.tokenizer)
    folders = sorted(p for p in config.input_dir.iterdir() if p.is_dir() and text_files(p))
    if not folders:
        raise FileNotFoundError(
            f"{config.input_dir.absolute()} has no folder with .txt or .jsonl files: it takes one "
            "folder for each domain."
        )
    config.pile_dir.mkdir(parents=True, exist_ok=True)
    begun = config.pile_dir / "prepared.json"
    options = {k: str(v) for k, v in vars(config).items() if k != "pile_dir"}
    if begun.exists() and json.loads(begun.read_text("utf-8")) != options:
        raise ValueError(f"{begun} says that this folder was begun with other options.")
    atomic.write_json(begun, options)
    total = sum(f.stat().st_size for folder in folders for f in text_files(folder))
    with tqdm(total=total, unit="B", unit_scale=True) as bar:
        for folder in folders:
            bar.set_description(folder.name)
            Domain(config, folder, encode, bar).run()
    names = "".join(f"{folder.name}\n" for folder in folders)
    atomic.write(config.pile_dir / "domains.txt", lambda file: file.write(names.encode()))


if __name__ == "__main__":
    prepare(parse(Config, __doc__))
