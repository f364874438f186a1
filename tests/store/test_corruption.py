"""A fixed part of the cases of `corruption.py`."""

from __future__ import annotations

from pathlib import Path

import corruption


def test_a_spoilt_file_gives_the_right_answer_or_an_error_that_names_it(tmp_path: Path) -> None:
    counts = corruption.run(cases=90, seed=0, work=tmp_path)
    assert counts["errors"] > 200  # they do hit what is asked for
    assert counts["right"] > 200
