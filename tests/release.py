"""What a user would install works: build sdist and wheel, install each alone, run the command line.

    make release-check
    python -m tests.release --pythons python3.11 --artifacts wheel

Every artifact gets a fresh virtual environment per Python, outside of this folder, with versions
pinned by constraints.txt. Pythons that are not on this machine are named and left out.

    make torch-range
    python -m tests.release --torch oldest newest

installs the wheel with its core dependencies alone, beside the oldest torch that pyproject.toml
accepts and the newest there is, and runs tests/smoke.py. Only builds for CPUs are installed; a
version of which the index has none is an error that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.cli.conftest import chat, lines, save_model

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("python3.10", "python3.11", "python3.12", "python3.13")


CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
"""An index with builds of torch for CPUs."""

SUPPORTED = re.compile(r'"torch>=([\d.]+)"')


class NotInstallable(Exception):
    """There is no build of a version for CPUs."""


def build(folder: Path) -> dict[str, Path]:
    """The sdist and the wheel."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def install(python: str, artifact: Path, folder: Path) -> Path:
    """A fresh environment with the artifact and nothing of this checkout; its programs' folder."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    programs = folder / "bin"
    pip = [str(programs / "python"), "-m", "pip", "install", "--quiet"]
    pip += ["--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, f"ghostfunc[cli,examples] @ {artifact.as_uri()}"], check=True)
    return programs


def try_it(programs: Path, folder: Path) -> None:
    """The newcomer's command, and the demo at a small setting."""
    save_model(folder / "model")
    (folder / "pool.jsonl").write_text(lines(chat(i) for i in range(500)))
    (folder / "target.jsonl").write_text(lines(chat(i) for i in range(1000, 1020, 2)))
    command = "score model --pool pool.jsonl --target target.jsonl --top 100 --out sel.jsonl"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = {"cwd": folder, "env": environment, "check": True}
    subprocess.run(
        [str(programs / "ghostfunc"), *command.split(), "--report", "r.html", "--verify", "2"],
        **run,  # type: ignore[call-overload]
    )
    assert (folder / "sel.jsonl").read_text(encoding="utf-8").count("\n") == 100
    assert "Which samples help?" in (folder / "r.html").read_text(encoding="utf-8")
    demo = ["--steps", "20", "--train-chunks", "60", "--pool-chunks", "16", "--width", "32"]
    demo += ["--out", str(folder / "demo.png"), "--timing-rounds", "1"]
    subprocess.run(
        [str(programs / "python"), str(ROOT / "examples" / "demo.py"), *demo],
        **run,  # type: ignore[call-overload]
    )


def runs(python: str) -> bool:
    """Whether it is there and runs: a shim of pyenv may be there and lead to nothing."""
    if shutil.which(python) is None:
        return False
    return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


def requirement(which: str) -> str:
    """What pip is asked for: every release of the oldest supported version, or the newest."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (oldest,) = SUPPORTED.findall(text)
    return f"torch=={oldest}.*" if which == "oldest" else "torch"


def check_plan(report: str, asked: str) -> str:
    """The version of torch that pip would install, from its report, if it is for CPUs.

    Raises:
        NotInstallable: it comes with libraries of a card.
    """
    planned = {
        x["metadata"]["name"].lower(): x["metadata"]["version"]
        for x in json.loads(report)["install"]
    }
    if cards := sorted(name for name in planned if name.startswith(("nvidia-", "cuda-"))):
        raise NotInstallable(
            f"{asked}: {planned['torch']} is a build for cards, it brings {len(cards)} packages "
            f"such as {cards[0]}. Give an index with builds for CPUs: --index"
        )
    return str(planned["torch"])


def install_torch(python: str, asked: str, index: str, folder: Path) -> Path:
    """A fresh environment with a build of torch for CPUs; its programs' folder."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    programs = folder / "bin"
    pip = [str(programs / "python"), "-m", "pip", "install", "--quiet"]
    pip += ["--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
    # An old pip downloads whole wheels to plan; a new one asks for their metadata alone.
    subprocess.run([*pip, "--upgrade", "pip"], check=True)
    source = ["--index-url", index] if index else []
    plan = [*pip, *source, "--dry-run", "--report", "-", asked]
    found = subprocess.run(plan, capture_output=True, text=True)
    if found.returncode:
        said = [line for line in found.stderr.splitlines() if line.startswith("ERROR")]
        unreachable = " (the index cannot be reached)" if "Connection" in found.stderr else ""
        raise NotInstallable(f"{asked}: {' '.join(said[:2])}{unreachable}")
    version = check_plan(found.stdout, asked)
    subprocess.run([*pip, *source, f"torch=={version}"], check=True)
    return programs


def try_torch(python: str, which: str, index: str, folder: Path) -> bool:
    """Whether tests/smoke.py passes beside this torch; says why not."""
    asked = requirement(which)
    try:
        programs = install_torch(python, asked, index, folder / "venv")
    except NotInstallable as error:
        print(f"{which}: NOT TRIED. {error}", flush=True)
        return False
    wheel = build(folder / "dist")["wheel"]
    pip = [str(programs / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--disable-pip-version-check", str(wheel)], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    smoke = shutil.copy(ROOT / "tests" / "smoke.py", folder)
    found = subprocess.run([str(programs / "python"), smoke], cwd=folder, env=environment)
    print(f"{which}, {python}: {'passed' if found.returncode == 0 else 'FAILED'}", flush=True)
    return found.returncode == 0


def try_range(pythons: Sequence[str], which: Sequence[str], index: str) -> None:
    """`--torch`: every version on the first Python that is there."""
    python = next(filter(runs, pythons), sys.executable)
    passed = []
    for name in which:
        with tempfile.TemporaryDirectory() as folder:
            passed.append(try_torch(python, name, index, Path(folder)))
    if not all(passed):
        sys.exit("not every version was tried and passed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pythons", nargs="+", default=PYTHONS)
    parser.add_argument("--artifacts", nargs="+", default=["wheel", "sdist"])
    parser.add_argument("--torch", nargs="+", choices=("oldest", "newest"), default=[])
    parser.add_argument("--index", default=CPU_BUILDS, help="of torch; '' for pip's own")
    options = parser.parse_args()
    if options.torch:
        return try_range(options.pythons, options.torch, options.index)
    present = [python for python in options.pythons if runs(python)]
    print("not on this machine:", *(set(options.pythons) - set(present)), flush=True)
    folder = Path(tempfile.mkdtemp())
    built = build(folder / "dist")
    for python in present:
        for name in options.artifacts:
            place = folder / f"{python}-{name}"
            programs = install(python, built[name], place / "venv")
            try_it(programs, place)
            shutil.rmtree(place)
            print(f"{python}, {name}: installed and run", flush=True)
    shutil.rmtree(folder)
    if not present:
        sys.exit("none of the Pythons is on this machine")


if __name__ == "__main__":
    main()
