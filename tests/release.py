"""What a user would install works: build sdist and wheel, install each alone, run the command line.

    make release-check
    python -m tests.release --pythons python3.11 --artifacts wheel

Every artifact gets a fresh virtual environment per Python, outside of this folder, with versions
pinned by constraints.txt. Pythons that are not on this machine are named and left out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cli.conftest import chat, lines, save_model

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("python3.10", "python3.11", "python3.12", "python3.13")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pythons", nargs="+", default=PYTHONS)
    parser.add_argument("--artifacts", nargs="+", default=["wheel", "sdist"])
    options = parser.parse_args()
    present = [python for python in options.pythons if shutil.which(python)]
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
