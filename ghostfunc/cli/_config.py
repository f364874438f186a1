"""`--config run.json`: the options of an earlier run, which later options on the line replace."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ghostfunc.cli._errors import CommandError

C = TypeVar("C")


def split(arguments: list[str]) -> tuple[list[str], Path | None]:
    """The arguments without `--config`, and its value."""
    rest, config = [], None
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name != "--config":
            rest.append(argument)
            continue
        found = value if equals else next(waiting, None)
        if not found:
            raise CommandError("--config needs the name of a file.")
        config = Path(found)
    return rest, config


def read(cls: type[C], path: Path) -> C:
    """An instance of the options' class from a file.

    Raises:
        CommandError: no such file, no JSON, options that do not exist or are missing.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CommandError(f"--config {path}: {error}.") from error
    return _made(cls, found, f"--config {path}")


def _made(cls: type[C], found: Any, where: str) -> C:
    if not isinstance(found, dict):
        raise CommandError(f"{where}: expected an object of options.")
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(found.keys() - known.keys()):
        raise CommandError(f"{where}: there is no option {unknown}; there are {sorted(known)}.")
    required = [
        name
        for name, field in known.items()
        if field.default is MISSING and field.default_factory is MISSING and name not in found
    ]
    if required:
        raise CommandError(f"{where}: the options {required} are missing.")
    hints = get_type_hints(cls)
    return cls(**{name: _value(hints[name], x, f"{where}, {name}") for name, x in found.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is Annotated:  # how tyro marks options
        hint = get_args(hint)[0]
    if is_dataclass(hint):
        return _made(hint, value, where)  # type: ignore[arg-type]
    if "Path" in str(hint) and isinstance(value, str):
        if "\0" in value:
            raise CommandError(f"{where}: {value!r} is no name of a file.")
        return Path(value)
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise CommandError(f"{where}: {value!r} is none of {', '.join(get_args(hint))}.")
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise CommandError(f"{where}: {value!r} is no list of strings.")
        return tuple(value)
    kinds = {int: (int,), float: (float, int), str: (str,), bool: (bool,)}.get(hint)
    if kinds is None:
        return value
    if not isinstance(value, kinds) or (hint is not bool and isinstance(value, bool)):
        raise CommandError(f"{where}: {value!r} is no {hint.__name__}.")
    return value
