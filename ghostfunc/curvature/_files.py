"""Tensors and a JSON text in one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ghostfunc._base.errors import GhostError
from ghostfunc._base.regular import check_regular
from ghostfunc._base.whole_files import write_whole
from ghostfunc.curvature._errors import CurvatureError

FORMAT = 1


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    about: Any,
    raised: type[GhostError] = CurvatureError,
) -> None:
    """Write a file, which appears whole or not at all; `raised` where no folder can be."""
    from safetensors.torch import save_file

    text = {"ghostfunc": json.dumps({"format": FORMAT, **about})}
    whole = {k: x.contiguous() for k, x in tensors.items()}
    folder = Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise raised(
            f"{os.fspath(path)!r} cannot be written: {error}. Is one of its folders a file?"
        ) from error
    write_whole(Path(path), lambda aside: save_file(whole, aside, text))


def read(
    path: str | os.PathLike[str], raised: type[GhostError] = CurvatureError
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and its JSON text; `raised` if it is no such file or is cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies begin where torch's own tensors do: where they lie in the file, products have
            # other bits on some processors.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise raised(f"there is no file {os.fspath(path)!r}.") from error
    except OSError as error:
        raise raised(f"{os.fspath(path)!r} cannot be read: {error}.") from error
    except SafetensorError as error:
        raise raised(
            f"{os.fspath(path)!r} is no whole safetensors file ({error}): it was cut short, or is "
            "something else. Copy it again, or delete it and make it again."
        ) from error
    if "ghostfunc" not in metadata:
        raise raised(
            f"{os.fspath(path)!r} was not written by ghostfunc: it has no entry "
            f"'ghostfunc' in its metadata {sorted(metadata)}."
        )
    try:
        about = json.loads(metadata["ghostfunc"])
    except ValueError as error:
        raise raised(f"{os.fspath(path)!r} is damaged: its entry 'ghostfunc': {error}.") from error
    found = about.get("format") if isinstance(about, dict) else about
    if found != FORMAT:
        raise raised(f"{os.fspath(path)!r} has format {found!r}; this version reads {FORMAT}.")
    return tensors, about


def check_entries(
    path: str | os.PathLike[str],
    found: Mapping[str, Any],
    names: Iterable[str],
    raised: type[GhostError] = CurvatureError,
) -> None:
    """Raise unless all `names` are there."""
    lacking = [name for name in names if name not in found]
    if lacking:
        raise raised(
            f"{os.fspath(path)!r} is damaged: it lacks {', '.join(map(repr, lacking))}. Copy it "
            "again, or delete it and make it again."
        )
