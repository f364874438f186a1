"""Command lines on which every option is required and nothing is guessed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import TypeVar

import tyro

C = TypeVar("C")


def parse(config: type[C], description: str | None, args: Sequence[str] | None = None) -> C:
    """The configuration that a command line gives.

    Args:
        config: a dataclass whose fields have no defaults, but for those that say
            `metadata={"optional": True}`.
        description: for `--help`.
        args: instead of those of the process.

    Raises:
        SystemExit: an option is missing (all that are missing are listed), unknown, shortened, or
            has no value.
        TypeError: a field of `config` has a default.
    """
    optional = [
        field.name
        for field in fields(config)  # type: ignore[arg-type]
        if (field.default is not MISSING or field.default_factory is not MISSING)
        and not field.metadata.get("optional")
    ]
    if optional:
        raise TypeError(f"{config.__name__} is to have no defaults; {optional} have one.")
    return tyro.cli(
        config,
        description=description,
        args=args,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )
