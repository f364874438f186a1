"""The imports of `ghostfunc/` run one way, and a few habits never come in.

The layers, lowest first (a module may import its own layer and those below it):

    {_types, _errors, _cost} <- {_tree, _layout, _module, _memory, _regions, _rerun, _stand_ins,
        _chunks, _products}
        <- {_factors, _bundles, _several, _pairs, _norms} <- {_rules, _quantities}
        <- {_tracked, _tracking, _trace, _recorder, _prober, _tracing, _taps, _owners, _vjp, _remat,
            _positions}
        <- {_oracles, _direction, _cosines, _together, _scores, _transforms, _verify, _book,
            _blocks, _pairwise, _clipping, _explain} <- everything built on them

Every import counts, those inside functions and under `TYPE_CHECKING` included.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ghostfunc"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("_types", "_errors", "_cost"),
    (
        *("_tree", "_functorch", "_layout", "_module", "_memory", "_capture", "_compile"),
        *("_regions", "_rerun", "_stand_ins", "_chunks", "_products"),
    ),
    ("_factors", "_bundles", "_several", "_pairs", "_norms"),
    ("_rules", "_quantities"),
    (
        *(
            "_memo",
            "_purity",
            "_tracked",
            "_tracking",
            "_trace",
            "_recorder",
            "_prober",
            "_tracing",
        ),
        *("_taps", "_owners", "_vjp", "_remat", "_positions"),
    ),
    (
        "_oracles",
        "_direction",
        "_cosines",
        "_against",
        "_together",
        "_scores",
        "_transforms",
        "_verify",
        "_book",
        "_blocks",
        "_pairwise",
        "_clipping",
        "_explain",
    ),
)
LAYER_OF = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
TOP = len(LAYERS)
"""The layer of every module that `LAYERS` does not name."""

STRANGERS = {
    ("_rules", "_quantities"): "a rule never imports a quantity",
    ("_quantities", "_rules"): "a quantity never imports a rule",
}


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
    """One import of one room of the package (`_rules`, say) by another file."""

    file: str
    line: int
    source: str
    importer: str
    imported: str
    """The room, or "" for the package itself."""

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
        if path == package / "__init__.py":
            violations += _more_than_reexports(file, tree, package.name)
        else:
            imports += _imports(path, tree, package)
    return sorted([*violations, *_wrong_way(imports), *_cycles(imports)])


def _imports(path: Path, tree: ast.Module, package: Path) -> Iterator[Import]:
    """The imports of the package's own modules in one file."""
    file = path.relative_to(package.parent)
    importer = file.with_suffix("").parts[1]
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
                room = target[1] if len(target) > 1 else ""
                yield Import(file.as_posix(), node.lineno, ast.unparse(node), importer, room)


def _is_module(root: Path, parts: tuple[str, ...]) -> bool:
    path = root.joinpath(*parts)
    return path.is_dir() or path.with_name(path.name + ".py").is_file()


def _wrong_way(imports: list[Import]) -> Iterator[Violation]:
    """Imports of a higher layer, of strangers, and of the package's own front door."""
    for imp in imports:
        here, there = LAYER_OF.get(imp.importer, TOP), LAYER_OF.get(imp.imported, TOP)
        if not imp.imported:
            yield imp.violation("import from the module that defines the name, not the package")
        elif (imp.importer, imp.imported) in STRANGERS:
            yield imp.violation(STRANGERS[imp.importer, imp.imported])
        elif there > here:
            allowed = [room for level in LAYERS[: here + 1] for room in level]
            yield imp.violation(
                f"{imp.importer} (layer {here}) must not import {imp.imported} (layer {there}); "
                f"it may import {', '.join(allowed)}. A new low-level module needs its place in "
                f"LAYERS"
            )


def _cycles(imports: list[Import]) -> Iterator[Violation]:
    """Imports between modules of one layer that go round in a circle."""
    edges = [
        imp
        for imp in imports
        if imp.imported not in ("", imp.importer)
        and LAYER_OF.get(imp.importer, TOP) == LAYER_OF.get(imp.imported, TOP)
    ]
    graph: dict[str, set[str]] = {}
    for edge in edges:
        graph.setdefault(edge.importer, set()).add(edge.imported)
    for edge in edges:
        reached, frontier = set(), [edge.imported]
        while frontier:
            room = frontier.pop()
            if room not in reached:
                reached.add(room)
                frontier += graph.get(room, ())
        if edge.importer in reached:
            yield edge.violation(f"{edge.imported} imports {edge.importer} in its turn")


def _more_than_reexports(file: str, tree: ast.Module, package: str) -> Iterator[Violation]:
    """Statements of `__init__.py` that are neither docstring, re-export, nor `__all__` and co."""
    for position, node in enumerate(tree.body):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and position == 0:
            continue
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level or module.split(".")[0] in (package, "__future__"):
                continue
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {t.id for t in targets if isinstance(t, ast.Name)}
            if names and names <= {"__all__", "__version__"}:
                continue
        yield Violation(
            file,
            node.lineno,
            ast.unparse(node).splitlines()[0],
            f"the package's __init__ holds only `from {package}... import ...`, __all__, "
            "__version__ and a docstring",
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


def test_ghostfunc() -> None:
    assert (PACKAGE / "_types.py").is_file(), f"no package source at {PACKAGE}"
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
                "from ghostfunc._types import A as A\n"
                "__all__ = ['A', 'hf']\n"
                "__version__ = '0'\n"
            ),
            "_types.py": "import torch\nA = getattr(torch, 'Tensor')\n",
            "_errors.py": "from ghostfunc._types import A\n",
            "_tree.py": "from . import _types\nfrom ._errors import A\n",
            "_rules/__init__.py": "from ghostfunc._rules import linear\n",
            "_rules/linear.py": "from .._tree import A\nfrom . import _registry\n",
            "_rules/_registry.py": "import ghostfunc._rules.linear\n",
            "_quantities.py": "from ghostfunc import _factors\nfrom ghostfunc._cost import f\n",
            "_factors.py": "",
            "_cost.py": "",
            "hf/__init__.py": "from ghostfunc.projection import P\n",
            "projection.py": "from ghostfunc._transforms import f\n",
            "_transforms.py": "from ghostfunc._oracles import g\n",
        },
    )
    assert check(package) == []


@pytest.mark.parametrize(
    ("file", "source", "line", "why"),
    [
        ("_types.py", "from ghostfunc._errors import E\nimport ghostfunc._tree\n", 2, "layer 1"),
        ("_tree.py", "from . import _factors\n", 1, "layer 2"),
        ("_factors.py", "def f():\n    from ._rules.linear import x\n", 2, "layer 3"),
        ("_cost.py", "from ghostfunc._trace import Trace\n", 1, "layer 4"),
        ("_taps.py", "from ghostfunc import _transforms\n", 1, "layer 5"),
        ("_transforms.py", "from ghostfunc.hf import causal_lm\n", 1, "layer 6"),
        ("_oracles.py", "from ghostfunc._helpers import x\n", 1, "needs its place in LAYERS"),
        ("_rules/linear.py", "from .._quantities import Dot\n", 1, "a rule never"),
        ("_rules/deep/er.py", "from ..._quantities import Dot\n", 1, "a rule never"),
        ("_quantities.py", "import ghostfunc._rules.linear as r\n", 1, "a quantity never"),
        ("hf/trainer.py", "import ghostfunc as gf\n", 1, "not the package"),
        ("hf/trainer.py", "from ghostfunc import ghost_norm\n", 1, "not the package"),
        ("__init__.py", "import os\n", 1, "holds only"),
        ("__init__.py", '"""Doc."""\nfrom torch import Tensor\n', 2, "holds only"),
        ("__init__.py", "__all__ = []\nVERBOSE = True\n", 2, "holds only"),
        ("__init__.py", "def helper():\n    return 1\n", 1, "holds only"),
        ("_tree.py", "import sys\n\nsys.path.append('x')\n", 3, "sys.path"),
        ("_tree.py", "from sys import path\n", 1, "sys.path"),
        ("_tree.py", "ok = hasattr(x, 'y')\n", 1, "probing"),
        ("hf/__init__.py", "y = getattr(x, 'y', None)\n", 1, "silent default"),
    ],
)
def test_a_violation_is_named(tmp_path: Path, file: str, source: str, line: int, why: str) -> None:
    package = write(
        tmp_path,
        {"_factors.py": "", "_quantities.py": "", "_transforms.py": "", file: source},
    )
    (violation,) = check(package)
    assert (violation.file, violation.line) == (f"ghostfunc/{file}", line)
    assert why in violation.why
    assert violation.source in source
    assert str(violation).startswith(f"ghostfunc/{file}:{line}: `{violation.source}`: ")


def test_a_circle_within_a_layer_is_named_on_every_side(tmp_path: Path) -> None:
    package = write(
        tmp_path,
        {
            "_trace.py": "from ghostfunc._taps import Tap\n",
            "_taps.py": "from ghostfunc._tracking import Mode\n",
            "_tracking.py": "from ghostfunc._trace import Trace\n",
            "shapley.py": "from ghostfunc.select import pick\n",
        },
    )
    assert [(v.file, v.line) for v in check(package)] == [
        ("ghostfunc/_taps.py", 1),
        ("ghostfunc/_trace.py", 1),
        ("ghostfunc/_tracking.py", 1),
    ]
