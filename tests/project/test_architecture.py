"""The architecture of `ghostfunc/`, stated here once: rooms in order, and habits that stay out.

    _base <- _factors <- {_rules, _quantities} <- _trace <- _taps <- _transforms
        <- {projection, shapley} <- {store, hf, ...};  select stands on _base

A file imports files of its own room and of the rooms below, and no circle runs through any of them.
A rule never imports a quantity, nor a quantity a rule. Every import counts, those inside functions
and under `TYPE_CHECKING` included. Private names of torch stand in `_base/torch_private.py` alone.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "ghostfunc"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("_base",),
    ("_factors", "select"),
    ("_rules", "_quantities"),
    ("_trace",),
    ("_taps",),
    ("_transforms",),
    ("projection", "shapley"),
)
"""Rooms, lowest floor first. Neighbours on one floor do not import each other."""

FLOOR_OF = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
TOP = len(FLOORS)
"""The floor of the rooms that are built on all of these."""

REGISTERS = {"_rules/__init__.py"}
"""Files that import their whole room, so that every rule is registered."""

STRANGERS = {
    ("_rules", "_quantities"): "a rule never imports a quantity",
    ("_quantities", "_rules"): "a quantity never imports a rule",
}


LONGEST = 60
"""Lines of code of a function: what fits on a page. Docstrings and comments do not count."""


@dataclass(frozen=True, order=True)
class Violation:
    """One broken rule: where, the offending source, and why."""

    file: str
    line: int
    source: str
    why: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: `{self.source}`: {self.why}"


@dataclass(frozen=True)
class Import:
    """One import of a file of the package by another.

    Attributes:
        importer, imported: the two files, as `("_rules", "products")`; `()` is the package itself.
    """

    file: str
    line: int
    source: str
    importer: tuple[str, ...]
    imported: tuple[str, ...]

    @property
    def rooms(self) -> tuple[str, str]:
        return self.importer[0], self.imported[0]

    def violation(self, why: str) -> Violation:
        return Violation(self.file, self.line, self.source, why)


def check(package: Path) -> list[Violation]:
    """Every violation in the source tree of `package`, in order of file and line."""
    violations: list[Violation] = []
    imports: list[Import] = []
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package.parent).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=file)
        violations += _habits(file, tree)
        violations += _long_functions(file, tree, path.read_text(encoding="utf-8"))
        if path != package / "_base" / "torch_private.py":
            violations += _private_names_of_torch(file, tree)
        if path == package / "__init__.py":
            violations += _more_than_names(file, tree, package.name)
        else:
            imports += _imports(path, tree, package)
    return sorted({*violations, *_wrong_way(imports), *_cycles(imports)})


def _imports(path: Path, tree: ast.Module, package: Path) -> Iterator[Import]:
    """The imports of the package's own modules in one file."""
    file = path.relative_to(package.parent)
    importer = file.with_suffix("").parts[1:]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = file.parts[: len(file.parts) - node.level] + base
            # `from pkg import x` imports the module x if there is one, else pkg.
            targets = [
                (*base, alias.name) if _is_module(package.parent, (*base, alias.name)) else base
                for alias in node.names
            ]
        else:
            continue
        for target in dict.fromkeys(targets):
            if target[0] == package.name:
                inside = target[1:]
                if _is_package(package.parent, target) and inside:
                    inside = (*inside, "__init__")
                yield Import(file.as_posix(), node.lineno, ast.unparse(node), importer, inside)


def _is_module(root: Path, parts: tuple[str, ...]) -> bool:
    path = root.joinpath(*parts)
    return path.is_dir() or path.with_name(path.name + ".py").is_file()


def _is_package(root: Path, parts: tuple[str, ...]) -> bool:
    return root.joinpath(*parts).is_dir()


def _wrong_way(imports: list[Import]) -> Iterator[Violation]:
    """Imports of a higher floor, of neighbours, and of the package's own front door."""
    for imp in imports:
        if not imp.imported:
            yield imp.violation("import from the file that defines the name, not the package")
            continue
        here, there = (FLOOR_OF.get(room, TOP) for room in imp.rooms)
        if imp.rooms in STRANGERS:
            yield imp.violation(STRANGERS[imp.rooms])
        elif there > here:
            allowed = [room for level in FLOORS[: here + 1] for room in level]
            yield imp.violation(
                f"{imp.rooms[0]} (floor {here}) must not import {imp.rooms[1]} (floor {there}); "
                f"it may import {', '.join(allowed)}. A new low room needs its place in FLOORS"
            )


def _cycles(imports: list[Import]) -> Iterator[Violation]:
    """Imports between files that go round in a circle, and circles between rooms of one floor."""
    edges = [
        imp for imp in imports if imp.imported and "/".join(imp.importer) + ".py" not in REGISTERS
    ]
    for ends in (lambda imp: (imp.importer, imp.imported), lambda imp: imp.rooms):
        graph: dict[object, set[object]] = {}
        for edge in edges:
            here, there = ends(edge)
            if here != there:
                graph.setdefault(here, set()).add(there)
        for edge in edges:
            here, there = ends(edge)
            reached: set[object] = set()
            frontier = [there] if here != there else []
            while frontier:
                place = frontier.pop()
                if place not in reached:
                    reached.add(place)
                    frontier += graph.get(place, ())
            if here in reached:
                names = ["/".join(x) if isinstance(x, tuple) else x for x in (there, here)]
                yield edge.violation(f"{names[0]} imports {names[1]} in its turn")


def _more_than_names(file: str, tree: ast.Module, package: str) -> Iterator[Violation]:
    """Statements of `__init__.py` that are neither docstring, import, nor `__all__` and co."""
    for position, node in enumerate(tree.body):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and position == 0:
            continue
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level or module.split(".")[0] in (package, "__future__"):
                continue
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {t.id for t in ast.walk(targets[0]) if isinstance(t, ast.Name)}
            if names and names <= {"__all__", "__version__", "__getattr__", "__dir__"}:
                continue
        yield Violation(
            file,
            node.lineno,
            ast.unparse(node).splitlines()[0],
            f"the package's __init__ holds only `from {package}... import ...`, __all__, "
            "__version__, __getattr__, __dir__ and a docstring",
        )


def _habits(file: str, tree: ast.Module) -> Iterator[Violation]:
    """`sys.path`, `hasattr` and `getattr` with a default."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="sys"), attr="path"):
                why = "the package never looks at sys.path; import by name"
            case ast.ImportFrom(module="sys", names=names) if "path" in {a.name for a in names}:
                why = "the package never looks at sys.path; import by name"
            case ast.Name(id="hasattr"):
                why = "dispatch on a type instead of probing for an attribute"
            case ast.Call(func=ast.Name(id="getattr"), args=[_, _, _, *_]):
                why = "no silent default; read the attribute, and let a missing one raise"
            case _:
                continue
        yield Violation(file, node.lineno, ast.unparse(node), why)


def _long_functions(file: str, tree: ast.Module, source: str) -> Iterator[Violation]:
    """Functions of more than `LONGEST` lines of code."""
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = set(range(node.lineno, (node.end_lineno or node.lineno) + 1)) & code
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
            if len(lines) > LONGEST:
                why = f"{len(lines)} lines of code; a function has {LONGEST} at most"
                yield Violation(file, node.lineno, f"def {node.name}", why)


def _private_names_of_torch(file: str, tree: ast.Module) -> Iterator[Violation]:
    """`torch._C`, `from torch._ops import ...`, `torch.overrides._f` and their kin."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        for name in names:
            root, *rest = name.split(".")
            private = [x for x in rest if x.startswith("_") and not x.startswith("__")]
            if root == "torch" and private:
                source = ast.unparse(node)
                yield Violation(
                    file,
                    node.lineno,
                    source,
                    f"{private[0]} is a private name of torch: import it from torch_private",
                )


def test_ghostfunc() -> None:
    assert (PACKAGE / "_base" / "types.py").is_file(), f"no package source at {PACKAGE}"
    violations = check(PACKAGE)
    assert not violations, "\n" + "\n".join(map(str, violations))


def write(root: Path, files: dict[str, str]) -> Path:
    """A package `ghostfunc` under `root` with the given sources."""
    for name, source in files.items():
        path = root / "ghostfunc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root / "ghostfunc"


def test_a_clean_tree_has_no_violations(tmp_path: Path) -> None:
    package = write(
        tmp_path,
        {
            "__init__.py": (
                '"""Doc."""\n'
                "from __future__ import annotations\n"
                "from ghostfunc import hf as hf\n"
                "from ghostfunc._base.types import A as A\n"
                "__all__ = ['A', 'hf']\n"
                "__version__ = '0'\n"
            ),
            "_base/__init__.py": "",
            "_base/types.py": "import torch\nA = getattr(torch, 'Tensor')\n",
            "_base/errors.py": "from ghostfunc._base.types import A\n",
            "_base/trees.py": "from . import types\nfrom .errors import A\n",
            "_base/torch_private.py": "import torch\ny = torch._C._functorch\n",
            "_rules/__init__.py": "from ghostfunc._rules import products\n",
            "_rules/products.py": "from .._base.trees import A\nfrom . import registry\n",
            "_rules/registry.py": "",
            "_quantities/quantity.py": (
                "from ghostfunc._factors import factor\nfrom ghostfunc._factors.cost import f\n"
            ),
            "_factors/factor.py": "",
            "_factors/cost.py": "",
            "hf/__init__.py": "from ghostfunc.projection import P\n",
            "projection/__init__.py": "from ghostfunc._transforms.grads import f\n",
            "_transforms/grads.py": "from ghostfunc._base.definition import g\n",
            "_base/definition.py": "",
        },
    )
    assert check(package) == []


@pytest.mark.parametrize(
    ("file", "source", "line", "why"),
    [
        ("_base/types.py", "import math\nimport ghostfunc._factors.cost\n", 2, "floor 1"),
        ("_base/definition.py", "from ghostfunc._rules import products\n", 1, "floor 2"),
        ("_base/definition.py", "from ghostfunc._taps.mode import TapMode\n", 1, "floor 4"),
        ("_factors/pairs.py", "def f():\n    from .._rules.products import x\n", 2, "floor 2"),
        ("_factors/cost.py", "from ghostfunc._trace.trace import Trace\n", 1, "floor 3"),
        ("_trace/make.py", "from ghostfunc._taps import mode\n", 1, "floor 4"),
        ("_taps/run.py", "from ghostfunc import _transforms\n", 1, "floor 5"),
        ("_transforms/vjp.py", "from ghostfunc.hf import causal_lm\n", 1, "floor 7"),
        ("_base/x.py", "from ghostfunc._helpers import x\n", 1, "needs its place in FLOORS"),
        ("_rules/products.py", "from .._quantities.readers import Dot\n", 1, "a rule never"),
        ("_rules/deep/er.py", "from ..._quantities.readers import Dot\n", 1, "a rule never"),
        (
            "_quantities/readers.py",
            "import ghostfunc._rules.products as r\n",
            1,
            "a quantity never",
        ),
        ("hf/trainer.py", "import ghostfunc as gf\n", 1, "not the package"),
        ("hf/trainer.py", "from ghostfunc import ghost_norm\n", 1, "not the package"),
        ("__init__.py", "import os\n", 1, "holds only"),
        ("__init__.py", '"""Doc."""\nfrom torch import Tensor\n', 2, "holds only"),
        ("__init__.py", "__all__ = []\nVERBOSE = True\n", 2, "holds only"),
        ("__init__.py", "def helper():\n    return 1\n", 1, "holds only"),
        ("_base/trees.py", "import sys\n\nsys.path.append('x')\n", 3, "sys.path"),
        ("_base/trees.py", "from sys import path\n", 1, "sys.path"),
        ("_base/trees.py", "ok = hasattr(x, 'y')\n", 1, "probing"),
        ("hf/__init__.py", "y = getattr(x, 'y', None)\n", 1, "silent default"),
        ("_taps/tap.py", "from torch._ops import OpOverload\n", 1, "a private name of torch"),
        ("_taps/tap.py", "from torch.overrides import _f\n", 1, "a private name of torch"),
        ("hf/__init__.py", "import torch\nx = torch._C\n", 2, "a private name of torch"),
        ("_taps/tap.py", "def f():\n" + "    x = 1\n" * 60, 1, "61 lines of code"),
    ],
)
def test_a_violation_is_named(tmp_path: Path, file: str, source: str, line: int, why: str) -> None:
    package = write(
        tmp_path,
        {
            "_factors/cost.py": "",
            "_quantities/readers.py": "",
            "_transforms/vjp.py": "",
            "_rules/products.py": "",
            "_rules/norm.py": "",
            "_taps/mode.py": "",
            file: source,
        },
    )
    (violation,) = check(package)
    assert (violation.file, violation.line) == (f"ghostfunc/{file}", line)
    assert why in violation.why
    assert violation.source in source
    assert str(violation).startswith(f"ghostfunc/{file}:{line}: `{violation.source}`: ")


def test_a_circle_is_named_on_every_side(tmp_path: Path) -> None:
    """Within a room, under `TYPE_CHECKING` too, and between rooms of one floor."""
    package = write(
        tmp_path,
        {
            "_trace/trace.py": "from ghostfunc._trace.layout import Layout\n",
            "_trace/layout.py": "from ghostfunc._trace.watch import Mode\n",
            "_trace/watch.py": "if TYPE_CHECKING:\n    from ghostfunc._trace.trace import Trace\n",
            "store/rows.py": "from ghostfunc.hf.files import A\n",
            "store/query.py": "",
            "hf/files.py": "",
            "hf/trainer.py": "from ghostfunc.store.query import Q\n",
        },
    )
    assert [(v.file, v.line) for v in check(package)] == [
        ("ghostfunc/_trace/layout.py", 1),
        ("ghostfunc/_trace/trace.py", 1),
        ("ghostfunc/_trace/watch.py", 2),
        ("ghostfunc/hf/trainer.py", 1),
        ("ghostfunc/store/rows.py", 1),
    ]


def test_every_room_says_what_it_is_for() -> None:
    """The `__init__` of a private room holds a docstring with the order to read its files in."""
    for room in sorted(p.parent for p in PACKAGE.rglob("_*/__init__.py")):
        doc = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
        assert doc, room
        _, _, reading = doc.partition("Read: ")
        files = {p.stem for p in room.glob("*.py")}
        named = [word.strip("`.,;") for word in reading.replace("\n", " ").split()]
        assert len([name for name in named if name in files]) >= 2, room
