"""Which checkpoint of a folder is whole: a run may have died while it wrote one."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ghostfunc._base.errors import OptionError
from ghostfunc._base.regular import check_regular
from ghostfunc.hf._state import STATE_FILE, load_state

LAST_WRITTEN = "trainer_state.json"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
)
BESIDE_WEIGHTS = ("optimizer.pt", "scheduler.pt")
KNOWN = (".safetensors", ".pt", ".pth", ".bin")
"""Files of torch and of safetensors, which say where they end."""


def newest_whole(folder: Path, *, weights_alone: bool) -> tuple[Path | None, dict[str, str]]:
    """The newest whole checkpoint of a run, and why newer ones were passed over.

    Args:
        folder: the run's `output_dir`.
        weights_alone: whether the run saves no optimizer (`save_only_model`).
    """
    numbered = sorted(_checkpoints(folder), reverse=True)
    passed: dict[str, str] = {}
    for _, path in numbered:
        flaw = flaw_of(path, weights_alone=weights_alone)
        if flaw is None:
            return path, passed
        passed[path.name] = flaw
    return None, passed


def flaw_of(path: Path, *, weights_alone: bool) -> str | None:
    """What is missing from a checkpoint or torn in it; None for a whole one."""
    try:
        check_regular(path / LAST_WRITTEN)
        state = json.loads((path / LAST_WRITTEN).read_text(encoding="utf-8"))
        step = int(state["global_step"])
    except FileNotFoundError:
        return f"{LAST_WRITTEN} is missing, which is written last"
    except OSError as error:
        return f"{LAST_WRITTEN} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"{LAST_WRITTEN} is torn"
    if not any((path / name).is_file() for name in WEIGHTS):
        return "its weights are missing"
    missing = [name for name in BESIDE_WEIGHTS if not (path / name).is_file()]
    if missing and not weights_alone:
        return f"{missing[0]} is missing"
    torn = [file.name for file in sorted(path.iterdir()) if _torn(file)]
    if torn:
        return f"{torn[0]} is torn"
    if (path / STATE_FILE).exists():
        try:
            saved = load_state(path / STATE_FILE)
        except OptionError:
            return f"{STATE_FILE} is damaged"
        if saved.facts["global_step"] != step:
            return f"{STATE_FILE} is of step {saved.facts['global_step']}, not {step}"
    return None


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.iterdir())
    return [(int(match[1]), path) for match, path in found if match and path.is_dir()]


def _torn(file: Path) -> bool:
    """Whether a file lacks its end, or is none."""
    if file.suffix not in KNOWN or file.name == STATE_FILE:
        return False
    try:
        check_regular(file)
    except OSError:
        return True
    if file.suffix == ".safetensors":
        try:
            with safe_open(str(file), framework="pt"):
                return False
        except (SafetensorError, OSError):
            return True
    return not zipfile.is_zipfile(file)
