"""Numbers that stand for texts, the same in all processes and all runs."""

from __future__ import annotations

import hashlib


def number_of_text(text: str) -> int:
    """63 bits of the text's SHA-256: a seed, or what processes compare in place of the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
