"""One process of the bench: `python benchmarks/job.py step/256 --out step.json`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from measure import measure
from rows import JOBS
from scaling import grow
from shapes import SHAPES, TINY

ONEDNN: dict[str, Callable[[], object]] = {
    "ours": lambda: None,
    "all": lambda: torch.set_float32_matmul_precision("medium"),
    "none": lambda: torch.backends.mkldnn.set_flags(False),
}
"""Whose float32 products go to oneDNN: ghostfunc's, where it is the faster one; every contestant's
(bfloat16 is allowed then, too, which processors without AMX make no use of); nobody's."""

NO_BFLOAT16 = "only oneDNN multiplies bfloat16 fast; see the table of --onednn all"
"""Why rows in bfloat16 have no figure where oneDNN is off: a step takes minutes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("process")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--onednn", choices=ONEDNN, default="none")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    job, shape = args.process.split("/")
    torch.set_num_threads(1 if shape == "calls" else args.threads)
    ONEDNN[args.onednn]()
    if job == "scaling":
        found = grow(shape, args.seconds, quick=args.quick)
    else:
        contestants = JOBS[job](TINY if args.quick else SHAPES[shape])
        left_out = [x for x in contestants if args.onednn == "none" and "bf16" in x]
        found = measure({k: x for k, x in contestants.items() if k not in left_out}, args.seconds)
        found |= {name: {"fails": NO_BFLOAT16} for name in left_out}
    args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
