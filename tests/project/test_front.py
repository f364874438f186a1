"""The package's front: one list of names, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import ghostfunc as gf

ROOT = Path(__file__).resolve().parents[2]
STUB = ast.parse((ROOT / "ghostfunc" / "__init__.pyi").read_text(encoding="utf-8"))
HOMES = [
    (node.module, alias.name, alias.asname)
    for node in STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
]

WITHOUT = """
import sys

class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "datasets", "numpy", "sklearn"):
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Refuses())
"""
"""Makes the import of a heavy library an error."""


def without_heavy(program: str) -> str:
    """What a program prints in a process of its own, where nothing heavy can be imported."""
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT + textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_a_stub_line_is_a_name_that_its_home_has() -> None:
    """Type checkers take what the stub says for true."""
    for home, name, known_as in HOMES:
        assert known_as == name
        value = getattr(gf, name)
        if home == "ghostfunc":
            assert inspect.ismodule(value)
            assert value is importlib.import_module(f"ghostfunc.{name}")
        else:
            assert value is getattr(importlib.import_module(home or ""), name)


def test_all_and_dir_are_the_stub() -> None:
    names = [name for _, name, _ in HOMES]
    assert gf.__all__ == names
    assert len({*names}) == len(names) > 60
    assert {*names, "__version__"} <= {*dir(gf)}
    scope: dict[str, object] = {}
    exec("from ghostfunc import *", scope)
    assert {*scope} - {"__builtins__"} == {*names}


def test_names_that_are_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'ghostfunc' has no attribute 'ghost_dots'"):
        gf.ghost_dots  # noqa: B018
    assert pickle.loads(pickle.dumps(gf.ghost_norm)) is gf.ghost_norm


def test_help_and_names_wait_for_nothing_heavy() -> None:
    said = without_heavy(
        """
        import ghostfunc
        from ghostfunc.cli import main

        assert len(dir(ghostfunc)) > 60 and ghostfunc.__version__
        assert not hasattr(ghostfunc, "nothing")
        commands = ("score", "select", "report", "verify", "explain", "project", "query")
        for line in ("--help", *(f"{command} --help" for command in commands)):
            try:
                main(line.split())
            except SystemExit as ended:
                assert ended.code == 0
        assert main(["--config"]) == 2
        """
    )
    assert said.count("usage: ghostfunc") == 8


def test_help_of_scripts_waits_for_nothing_heavy() -> None:
    """Those that read their command line by argparse do so before they import."""
    scripts = [
        path.relative_to(ROOT).as_posix()
        for folder in ("examples", "benchmarks")
        for path in sorted((ROOT / folder).glob("*.py"))
        if "\n    asked()" in path.read_text(encoding="utf-8")
    ]
    assert len(scripts) >= 12
    said = without_heavy(
        f"""
        import runpy

        for script in {scripts}:
            sys.argv = [script, "--help"]
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as ended:
                assert ended.code == 0
        """
    )
    assert said.count("usage: ") == len(scripts)
