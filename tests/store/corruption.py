"""Every kind of file of a store, corrupted in every way: never another answer without an error.

    python tests/store/corruption.py --cases 1000       what is promised: a minute or two
    python tests/store/corruption.py --cases 60         as the tests run it

A case spoils one file (two, if they are swapped), and asks the store all there is to ask. Every
answer is the one of the whole store, or an error of ghostfunc's that names the file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from helpers import collate, expected, make_data, make_params, make_projection, model_fn

import ghostfunc as gf
from ghostfunc.store import Store, _documents, merge_topk, project_dataset

N = 20
MOST_MEMORY = 512 << 20
"""No file of a few bytes makes a process take more than that."""


def make(path: Path) -> None:
    """A store of two checkpoints, one of them projected, with a chunk that is done in part."""
    store = Store.create(
        path,
        projection=make_projection(),
        n_samples=N - 3,
        dtype="float32",
        chunk_rows=8,
        tokenizer="bytes",
        notes={"corpus": ["poems", 1, None]},
    )
    store.add_checkpoint("final", make_params(), lr=0.5)
    store.add_checkpoint("early", make_params(1), lr=1.0)
    project(path, N - 3)
    store.append(3)
    project(path, N)
    g = torch.Generator().manual_seed(0)
    store.write(range(N), torch.randn(N, store.projection.k, generator=g), "early")


def project(path: Path, n: int) -> int:
    return project_dataset(
        model_fn,
        make_params(),
        make_data(n),
        make_projection(),
        Store.open(path, writable=True),
        checkpoint="final",
        collate=collate,
        batch_size=4,
        progress=False,
    )


QUERY = torch.randn(2, make_projection().k, generator=torch.Generator().manual_seed(1))


def of_both(store: Store) -> torch.Tensor:
    return store.scores({"final": QUERY, "early": QUERY}, weights="lr", normalize="cosine")


def parts(store: Store) -> Any:
    query = {"final": QUERY}
    found = [store.topk(query, 4, chunks=[i]) for i in range(store.n_chunks)]
    return [x.tolist() for x in merge_topk(found, 4)]


QUESTIONS: dict[str, Callable[[Store], Any]] = {
    "size": lambda s: (s.n_samples, s.dtype, s.chunk_rows, s.tokenizer, s.notes, s.n_chunks),
    "projection": lambda s: s.projection.spec(),
    "checkpoints": lambda s: s.checkpoints,
    "model": lambda s: s.check_model("final", make_params()),
    "final": lambda s: s.read(range(N), "final").tolist(),
    "early": lambda s: s.read([17, 3, 3], "early").tolist(),
    "scores": lambda s: of_both(s).tolist(),
    "topk": lambda s: [x.tolist() for x in s.topk({"early": QUERY}, 5, normalize="relative")],
    "parts": parts,
    "metric": lambda s: {
        name: x.tolist() for name, x in s.preconditioner("final", damping=0.1).roots.items()
    },
}


class Store_:
    """A whole store, its answers, and its files by kind."""

    def __init__(self, work: Path) -> None:
        self.whole, self.spoilt = work / "whole", work / "spoilt"
        make(self.whole)
        store = Store.open(self.whole)
        torch.testing.assert_close(store.read(range(N), "final"), expected(N), rtol=1e-4, atol=1e-5)
        self.answers = {name: ask(store) for name, ask in QUESTIONS.items()}
        self.kinds: dict[str, list[Path]] = {}
        for path in sorted(self.whole.rglob("*")):
            if path.is_file():
                relative = path.relative_to(self.whole)
                self.kinds.setdefault(kind_of(relative), []).append(relative)

    def fresh(self) -> Path:
        shutil.rmtree(self.spoilt, ignore_errors=True)
        shutil.copytree(self.whole, self.spoilt)
        return self.spoilt


def kind_of(path: Path) -> str:
    """`rows chunk`, `marks array`, `recipe`, `root`, ..."""
    *folders, name = path.parts
    if name.startswith("c."):
        return f"{folders[-1]} chunk"
    if not folders:
        return "root"
    if folders[-1] in ("rows", "marks"):
        return f"{folders[-1]} array"
    return {"recipe": "recipe", "checkpoints": "folder"}.get(folders[-1], "checkpoint")


# --- ways to spoil a file ---------------------------------------------------------------------


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data))])


def zeros(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = chance.randrange(len(data))
    stop = chance.randint(start + 1, len(data))
    data[start:stop] = bytes(stop - start)
    path.write_bytes(data)


def garbage(path: Path, chance: random.Random) -> None:
    path.write_bytes(chance.randbytes(chance.choice([0, 1, 48, path.stat().st_size, 100_000])))


def delete(path: Path, chance: random.Random) -> None:
    path.unlink()


def huge(path: Path, chance: random.Random) -> None:
    """A file of 8 GiB, which takes no place on the disk."""
    with path.open("r+b") as file:
        file.truncate(8 << 30)


def a_folder(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


def a_fifo(path: Path, chance: random.Random) -> None:
    """Whoever opens it for reading waits for a writer, unless told not to."""
    path.unlink()
    os.mkfifo(path)


def a_socket(path: Path, chance: random.Random) -> None:
    path.unlink()
    os.mknod(path, 0o600 | stat.S_IFSOCK)


def a_device(path: Path, chance: random.Random) -> None:
    """Zeros without end."""
    path.unlink()
    path.symlink_to("/dev/zero")


VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 7, 2**31, 10**12, 2**63, 10**400, 0.5, 1e308, "", "x", "NaN"),
    *([], [0], [[]], {}, {"format": 1}, [10**9, 10**9], "float64", ["gzip"], "../../x"),
]


def places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values stand in a document."""
    if at:
        yield at
    items = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    for key, value in items:
        yield from places(value, (*at, key))


def value(path: Path, chance: random.Random) -> None:
    """A value, a key more or one less in a document; signed as if it belonged there."""
    document = json.loads(path.read_text())
    where = chance.choice([at for at in places(document) if at[-1] != _documents.SUM])
    spoil(document, where, chance)
    if isinstance(document.get("attributes"), dict):
        with contextlib.suppress(ValueError, RecursionError):
            document = _documents._signed(document)
    path.write_text(json.dumps(document))


def unsigned(path: Path, chance: random.Random) -> None:
    """The same, with the checksum that was there."""
    document = json.loads(path.read_text())
    spoil(document, chance.choice(list(places(document))), chance)
    path.write_text(json.dumps(document))


def spoil(document: Any, where: tuple[Any, ...], chance: random.Random) -> None:
    for key in where[:-1]:
        document = document[key]
    if chance.random() < 0.15 and isinstance(document, dict):
        del document[where[-1]]
    elif chance.random() < 0.15 and isinstance(document, dict):
        document["codecs" if chance.random() < 0.5 else "extra"] = chance.choice(VALUES)
    else:
        document[where[-1]] = chance.choice(VALUES)


def deep(path: Path, chance: random.Random) -> None:
    path.write_text('{"attributes":' * 100_000)


ANY = (flip, truncate, zeros, garbage, delete, huge, a_folder, a_fifo, a_socket, a_device)
DOCUMENTS = (value, value, unsigned, deep)


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


# --- cases ------------------------------------------------------------------------------------


def honest(kind: str, way: str, path: Path, before: bytes) -> bool:
    """Whether a signed document still says something sensible, which nobody can know to be a lie.

    Whoever can sign can lie: of values that make sense only the ranges are checked.
    """
    return way == "value" and path.is_file() and path.read_bytes() != before


def case(whole: Store_, kind: str, way: str, chance: random.Random) -> Counter[str]:
    """Spoil a file, ask everything; how many answers were right, and how many errors."""
    spoilt = whole.fresh()
    relative = chance.choice(whole.kinds[kind])
    named = [relative]
    if way == "swap":
        others = [p for group in whole.kinds.values() for p in group if p != relative]
        same = [p for p in whole.kinds[kind] if p != relative]
        other = chance.choice(same if same and chance.random() < 0.7 else others)
        swap(spoilt / relative, spoilt / other)
        named.append(other)
    else:
        way_of = next(f for f in (*ANY, *DOCUMENTS) if f.__name__ == way)
        way_of(spoilt / relative, chance)
    told = f"{kind}, {way} of {' and '.join(map(str, named))}"
    counts: Counter[str] = Counter()
    for name, ask in QUESTIONS.items():
        try:
            answer = ask(Store.open(spoilt))
        except gf.GhostError as error:
            counts["errors"] += 1
            complain(told, name, error, named)
        else:
            counts["right" if answer == whole.answers[name] else "signed lies"] += 1
            lie = honest(kind, way, spoilt / relative, (whole.whole / relative).read_bytes())
            assert answer == whole.answers[name] or lie, f"{told}: another answer to {name!r}"
    checked(told, spoilt, counts)
    return counts


def complain(told: str, question: str, error: gf.GhostError, named: list[Path]) -> None:
    """The error names a file that was spoilt; of a deleted one, the checkpoint that it made."""
    text = str(error)
    names = [str(path) for path in named]
    names += [f"no checkpoint {path.parts[1]!r}" for path in named if len(path.parts) == 3]
    assert any(name in text for name in names), f"{told}: {question!r} says only {text!r}"


def checked(told: str, spoilt: Path, counts: Counter[str]) -> None:
    """`check` finds no fault only in a store whose questions had right answers or whose rows are
    plainly missing."""
    try:
        store = Store.open(spoilt)
        damage = store.check()
        whole = all(not store.missing(name) for name in ("final", "early"))
    except gf.GhostError:
        return
    if not damage and whole:
        assert counts["errors"] == 0, f"{told}: check() finds nothing"


def run(cases: int, seed: int, work: Path) -> Counter[str]:
    """All kinds of files times all ways, in turn, until there are as many cases."""
    chance = random.Random(seed)
    whole = Store_(work)
    pairs = [
        (kind, way)
        for kind in whole.kinds
        for way in dict.fromkeys(
            [
                *(f.__name__ for f in ANY),
                "swap",
                *(f.__name__ for f in DOCUMENTS if "chunk" not in kind),
            ]
        )
    ]
    chance.shuffle(pairs)
    counts: Counter[str] = Counter()
    for number in range(cases):
        kind, way = pairs[number % len(pairs)]
        for name, count in case(whole, kind, way, chance).items():
            counts[name] += count
        counts[way] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        counts = run(args.cases, args.seed, Path(folder))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < MOST_MEMORY, f"took {grown >> 20} MiB"
    print(f"cases={args.cases} MiB={grown >> 20}", *(f"{k}={v}" for k, v in counts.items()))


if __name__ == "__main__":
    main()
