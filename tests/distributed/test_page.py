"""The page's training loop prints the same in one process and under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import ghostfunc as gf

ROOT = Path(gf.__file__).parents[1]


def test_the_loop_under_torchrun(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    loop, corpus = re.findall(r"(?<!-->\n)^```python\n(.*?)^```$", page, re.M | re.S)
    # gloo's threads may not have ended when the interpreter takes itself apart, which aborts it.
    end = "print(end='', flush=True)\nos._exit(0)\n"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    said = []
    for start, folder in (([], tmp_path / "one"), (torchrun, tmp_path / "two")):
        folder.mkdir()
        (folder / "train.py").write_text(loop + corpus + end)
        command = [sys.executable, *start, "train.py"]
        out = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=400
        )
        assert out.returncode == 0, out.stderr
        assert len(list(folder.glob("scores-*.parquet"))) == 16
        said.append(out.stdout)
    assert said[0] == said[1]
    assert "9 samples" in said[0]
