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
        found = measure(contestants, args.seconds)
    args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
