"""Images of rows, made small, for the page."""

from __future__ import annotations

import base64
import io
import os
import warnings
from pathlib import Path
from typing import Any

from ghostfunc._base.errors import OptionError
from ghostfunc._base.regular import check_regular
from ghostfunc.data import Rows

SIDE = 160
"""Pixels of the longer side of an image on the page."""

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
"""What Pillow decodes by itself: for others, such as EPS, it runs programs of the machine."""

PREFIX = "data:image/"


def thumbnail(rows: Rows, row: int, column: str) -> str | None:
    """The image of a row as a `data:` address; None if the row has none.

    Files count only within the folder of the rows: a row is data, and must not bring other files of
    the machine into a page.

    Raises:
        OptionError: the column holds something that is no image, or a file elsewhere.
    """
    value = rows[row].get(column)
    if value is None:
        return None
    try:
        return _small(_content(value, rows))
    except _NoImage as error:
        raise OptionError(f"{rows.where(row)}: the image column {column!r} {error}") from error


class _NoImage(Exception):
    """Says what is wrong with an image."""


def _content(value: Any, rows: Rows) -> bytes:
    if isinstance(value, dict):  # as the `datasets` library stores images
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise _NoImage(
            f"has a {type(value).__name__}; expected bytes, the name of a file, or a data: address."
        )
    if value.startswith(PREFIX):
        try:
            return base64.b64decode(value.partition(",")[2], validate=True)
        except ValueError as error:
            raise _NoImage(f"has a data: address that is not base64: {error}.") from error
    folder = (rows.path if rows.path.is_dir() else rows.path.parent).resolve()
    try:
        path = Path(os.path.realpath(folder / value))
    except ValueError as error:
        raise _NoImage(f"names {value!r}, which is no name of a file.") from error
    if not path.is_relative_to(folder):
        raise _NoImage(f"names {value!r}, which is not within {folder}. Copy it there.")
    try:
        check_regular(path)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise _NoImage(f"names {value!r}, which cannot be read: {error}.") from error


def _small(content: bytes) -> str:
    """A JPEG of it, or a PNG where parts are transparent."""
    try:
        from PIL import Image
    except ImportError as error:
        raise _NoImage("needs Pillow to be shown: pip install pillow.") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                opened.thumbnail((SIDE, SIDE))
                kind = (
                    "PNG" if "A" in opened.getbands() or "transparency" in opened.info else "JPEG"
                )
                small = opened.convert("RGBA" if kind == "PNG" else "RGB")
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise _NoImage(f"has {len(content):,} bytes that Pillow does not read: {error}.") from error
    out = io.BytesIO()
    small.save(out, kind, quality=82)
    return f"{PREFIX}{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
