"""One word per idea: retired words do not come back, and `docs/words.md` knows the ones in use."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

RETIRED = {
    "Meeting": "UseShape", "meetings": "use_shapes", "StaleSites": "StaleOutputs",
    "Seen": "RecordedCall", "Turn": "DeferredGradients", "TurnReader": "DeferredReader",
    "BesideReader": "OneRunReader", "Taken": "RunResult", "Traced": "TracedModel",
    "on_trace": "with_trace", "traced_as": "op_key", "Finder": "FreeTensors",
    "StandIns": "Substitutes", "Surroundings": "RngAndAutocast", "ANEW": "ALWAYS_PROVE",
    "Against": "Targets", "PASS": "OPS_PER_ELEMENT", "memory_budget": "chunk_size",
    "ByPosition": "TwoForms", "grad_is_autograds": "grad_is_returned",
}  # fmt: skip
"""Names that stood for an idea that another name stands for now."""


def test_retired_words_do_not_come_back() -> None:
    pattern = re.compile(r"(?<![\w.])(" + "|".join(RETIRED) + r")(?!\w)")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[1]} is {RETIRED[match[1]]} now"
        for path in sorted((ROOT / "ghostfunc").rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for match in pattern.finditer(line)
    ]
    assert not found, "\n" + "\n".join(found)


def test_no_example_where_a_sample_is_meant() -> None:
    """`Example:` heads a docstring section; everything else with a loss is a sample."""
    pattern = re.compile(r"\b(training|per-|validation) ?examples?\b", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("ghostfunc", "docs")
        for path in sorted((ROOT / folder).rglob("*.[pm][yd]"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line) and "Per-Example Gradient" not in line
    ]
    assert not found, "\n" + "\n".join(found)


def test_every_word_is_explained_once() -> None:
    text = (ROOT / "docs" / "words.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    words = [word for word, _ in rows if word not in ("word", "---")]
    assert len(words) == len(set(words)) > 40
    for word, meaning in rows:
        assert len(meaning.split()) <= 25, word
