"""What the documentation says is true: code runs, output is the output, links lead somewhere.

The python blocks of a page run from top to bottom in one namespace and an empty directory, and so
do the lines of `sh` blocks that begin with `ghostfunc`. A `text` block after a python block is what
it prints; numbers may differ, words and layout may not. A block after `<!-- not run: why -->` is
left out. `docs/api.md` lists every public name with its signature.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import pkgutil
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ghostfunc as gf
import ghostfunc.cli
from ghostfunc._base.refusals import REFUSED
from ghostfunc._rules.registry import DECOMPOSITIONS, RULES

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

FENCE = re.compile(r"(<!-- not run: .*? -->\n+)?^```(\w+)\n(.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?|[-+]?\binf\b|\bnan\b")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- code -------------------------------------------------------------------------------------


@dataclass
class Block:
    """One block that runs: its first line, its code, and what it is said to print."""

    line: int
    code: str
    output: str | None = None
    language: str = "python"


@dataclass
class Page:
    blocks: list[Block] = field(default_factory=list)


def blocks_of(text: str) -> list[Block]:
    blocks: list[Block] = []
    end = 0
    for match in FENCE.finditer(text):
        skipped, language, body = match.groups()
        directly_after = not text[end : match.start()].strip()
        end = match.end()
        runs = language == "python" or (language == "sh" and body.startswith("ghostfunc "))
        if runs and not skipped:
            blocks.append(Block(text.count("\n", 0, match.start(3)), body, language=language))
        elif language == "text" and blocks and directly_after:
            blocks[-1].output = body
    return blocks


def words(output: str) -> list[str]:
    """Output without its numbers and the widths of its columns."""
    lines = [NUMBER.sub("0", line).split() for line in output.strip().splitlines()]
    return ["--" if set(" ".join(line)) == {"-"} else " ".join(line) for line in lines]


@pytest.fixture
def own_rules() -> Iterator[None]:
    """Pages may register rules."""
    before = [(registry, dict(registry)) for registry in (RULES, REFUSED, DECOMPOSITIONS)]
    yield
    for registry, content in before:
        registry.clear()
        registry.update(content)  # type: ignore[arg-type]


@pytest.mark.usefixtures("own_rules")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    for block in blocks_of(page.read_text(encoding="utf-8")):
        printed = io.StringIO()
        if block.language == "sh":
            for line in block.code.splitlines():
                assert ghostfunc.cli.main(shlex.split(line)[1:]) == 0, line
            continue
        code = compile("\n" * block.line + block.code, str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if block.output is not None:
            where = f"{name_of(page)}:{block.line} prints something else:\n{printed.getvalue()}"
            assert words(printed.getvalue()) == words(block.output), where


def test_blocks_are_told_apart() -> None:
    text = (
        "a\n```python\nx = 1\n```\n\n```text\n1\n```\n```text\nno output\n```\n"
        "<!-- not run: slow -->\n```python\ny\n```\n\n```text\nof y\n```\n```sh\nls\n```\n"
        "```sh\nghostfunc --help\n```\n"
    )
    block, command = blocks_of(text)
    assert (block.line, block.code) == (2, "x = 1\n")
    assert (command.language, command.code) == ("sh", "ghostfunc --help\n")


def test_words() -> None:
    assert words("a.b   64x20  2.3e-07 \n-----\n") == words("a.b 8x2 0.0e+00\n--------")
    assert words("exact") != words("NOT EXACT")


def test_no_merge_is_left_half_made() -> None:
    """A page with both sides of a conflict still builds."""
    folders = (ROOT / name for name in ("docs", "ghostfunc", "examples", "benchmarks", "tests"))
    files = [*ROOT.glob("*.*"), *(path for folder in folders for path in folder.rglob("*.*"))]
    sides = re.compile(rb"^(<{7}|>{7}) ", re.M)
    left = [name_of(path) for path in files if path.is_file() and sides.search(path.read_bytes())]
    assert not left


# --- links ------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead, f"{name_of(page)} links to nothing: {dead}"


# --- the list of public names -----------------------------------------------------------------


def public_modules() -> Iterator[ModuleType]:
    yield gf
    for info in pkgutil.iter_modules(gf.__path__, "ghostfunc."):
        if not info.name.rpartition(".")[2].startswith("_"):
            yield importlib.import_module(info.name)


def exported(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The public names of a module; those defined in it if it has no `__all__`."""
    listed = "__all__" in vars(module)
    # Some names of `__all__` are imported when they are asked for.
    for name in module.__all__ if listed else tuple(vars(module)):
        value = getattr(module, name)
        local = inspect.isfunction(value) or inspect.isclass(value)
        own = local and not name.startswith("_") and value.__module__ == module.__name__
        if (listed or own) and not inspect.ismodule(value):
            yield name, value


def spellings(name: str, value: Any) -> list[str]:
    """How `docs/api.md` may write a name: with its arguments, classes also without."""
    bare = f"`{name}`"
    if inspect.isclass(value) and issubclass(value, Exception):
        return [bare]
    signature = inspect.signature(value)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    call = str(signature.replace(parameters=parameters, return_annotation=signature.empty))
    full = f"`{name}{call}`".replace("'", '"')
    return [full, bare] if inspect.isclass(value) else [full]


def listed() -> set[str]:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    return set(re.findall(r"^(?:- |\| )\[(`[^`]+`)\]", page, re.M))


def public() -> dict[str, list[str]]:
    """Every public name once, where it is exported first."""
    known: dict[int, tuple[str, list[str]]] = {}
    for module in public_modules():
        for name, value in exported(module):
            known.setdefault(id(value), (f"{module.__name__}.{name}", spellings(name, value)))
    return dict(known.values())


@pytest.mark.parametrize("name", public())
def test_every_public_name_is_listed(name: str) -> None:
    allowed = public()[name]
    assert listed() & set(allowed), f"docs/api.md must have an entry - [{allowed[0]}](its file)"


def test_every_public_name_has_its_page_on_the_site() -> None:
    pytest.importorskip("mkdocs")
    path = ROOT / "docs" / "_site" / "hooks.py"
    spec = importlib.util.spec_from_file_location("site_hooks", path)
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    assert sorted(hooks.public_names().values()) == sorted(public())
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    files = {"which_number.md": object()}
    lookup = type("Files", (), {"get_file_from_path": lambda _, path: files.get(path)})()
    page = type("Page", (), {"file": type("File", (), {"src_uri": "index.md"})()})()
    shown = hooks.on_page_markdown(text, page, None, lookup)
    assert "(which_number.md)" in shown
    assert "(sharp_edges.md)" not in shown
    assert "sharp edges" in shown


def test_nothing_else_is_listed() -> None:
    known = {text for allowed in public().values() for text in allowed}
    assert listed() <= known, f"docs/api.md lists what is not there: {listed() - known}"
