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
    (tmp_path / "train.py").write_text(loop + corpus)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    said = [
        subprocess.run(
            [sys.executable, *start, "train.py"],
            cwd=tmp_path,
            env=env,
            check=True,
            capture_output=True,
            text=True,
            timeout=400,
        ).stdout
        for start in ([], torchrun)
    ]
    assert said[0] == said[1]
    assert "9 samples" in said[0]
    assert len(list(tmp_path.glob("scores-*.parquet"))) == 16
