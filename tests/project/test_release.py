"""What goes with a release: citation, forms for issues, the smallest test, the range of torch."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import release, smoke

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_the_citation_is_of_this_version() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    for key in ("cff-version", "message", "title", "authors", "version", "license"):
        assert found[key], key
    assert found["authors"][0]["name"]
    for key in ("version", "license"):
        (own,) = re.findall(rf'^{key} = "(.+)"$', PROJECT, re.M)
        assert found[key] == own


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_for_issues(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert set(form) <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(set(ids)) == len(ids) > 0
    for field in form["body"]:
        assert field["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        kind = "value" if field["type"] == "markdown" else "label"
        assert field["attributes"][kind]


def test_the_smallest_test_passes(capsys: Any) -> None:
    """What runs beside the oldest torch runs here, too."""
    smoke.main()
    assert capsys.readouterr().out.count("are those of the loop") == 3


def test_the_smallest_test_needs_the_core_alone() -> None:
    text = (ROOT / "tests" / "smoke.py").read_text(encoding="utf-8")
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.M))
    assert imported <= {*sys.stdlib_module_names, "torch", "ghostfunc"}


def test_the_oldest_torch_is_that_of_the_project() -> None:
    assert f'"torch>={release.requirement("oldest")[len("torch==") : -len(".*")]}"' in PROJECT
    assert release.requirement("newest") == "torch"


def test_builds_for_cards_are_not_installed() -> None:
    def report(*packages: tuple[str, str]) -> str:
        return json.dumps(
            {"install": [{"metadata": {"name": n, "version": v}} for n, v in packages]}
        )

    assert release.check_plan(report(("torch", "2.7.1+cpu"), ("sympy", "1")), "x") == "2.7.1+cpu"
    with pytest.raises(release.NotInstallable, match=r"2\.7\.0 is a build for cards"):
        release.check_plan(report(("torch", "2.7.0"), ("nvidia-cublas-cu12", "12")), "torch==2.7.*")


def test_a_python_that_leads_to_nothing_is_left_out(tmp_path: Path) -> None:
    shim = tmp_path / "python3.99"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    assert not release.runs(str(shim))
    assert not release.runs("no-such-python")
    assert release.runs(sys.executable)
