"""Starts a script on several ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TIMEOUT = 300
"""Seconds for all ranks of one start."""


def ranks_of(
    script: str, world: int, directory: Path, *args: str
) -> list[subprocess.CompletedProcess[str]]:
    """Start a script on every rank and wait for all of them."""
    path = os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(HERE / script), str(rank), str(world), str(directory), *args],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    out = []
    try:
        for process in running:
            said, _ = process.communicate(timeout=TIMEOUT)
            out.append(subprocess.CompletedProcess(process.args, process.returncode, said))
    finally:
        for process in running:
            process.kill()
    return out
