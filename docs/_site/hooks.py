"""Besides the pages: one per public name, and links that stay on the site."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import posixpath
import re
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File, Files

import ghostfunc

LINK = re.compile(r"(?<!!)\[([^\]\n]*(?:\n[^\]\n]+)?)\]\(([^)\s]+)\)")
ENTRY = re.compile(r"^((?:- |\| )\[`([A-Za-z_]+)[^`]*`\])\([^)]+\)", re.M)


def public_names() -> dict[str, str]:
    """Every public name once: its last part -> where it is reached."""
    modules = [ghostfunc]
    for info in pkgutil.iter_modules(ghostfunc.__path__, "ghostfunc."):
        if not info.name.rpartition(".")[2].startswith("_"):
            modules.append(importlib.import_module(info.name))
    seen: set[int] = set()
    names = {}
    for module in modules:
        for name in vars(module).get("__all__", _own(module)):
            value = getattr(module, name)
            if not inspect.ismodule(value) and id(value) not in seen:
                seen.add(id(value))
                # Two modules may have a name in common (Scores): the second keeps its module.
                key = name if name not in names else f"{module.__name__.rpartition('.')[2]}.{name}"
                names[key] = f"{module.__name__}.{name}"
    return names


def _own(module: ModuleType) -> list[str]:
    """The public functions and classes of a module without `__all__`."""
    return [
        name
        for name, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and not name.startswith("_")
        and value.__module__ == module.__name__
    ]


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every public name."""
    for name, path in public_names().items():
        title = path.replace("ghostfunc.", "gf.", 1)
        content = f"---\ntitle: {title}\nsearch: {{boost: 2}}\n---\n\n::: {path}\n"
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to names lead to their pages; links to files that are not on the site become text."""
    here = posixpath.dirname(page.file.src_uri)
    if page.file.src_uri == "api.md":
        known = public_names()

        def to_page(match: re.Match[str]) -> str:
            return f"{match[1]}(reference/{match[2]}.md)" if match[2] in known else match[0]

        markdown = ENTRY.sub(to_page, markdown)

    def kept(match: re.Match[str]) -> str:
        target = match[2].partition("#")[0]
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(here, target))
        return match[0] if files.get_file_from_path(path) else match[1]

    return LINK.sub(kept, markdown)
