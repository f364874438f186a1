"""Projected per-sample gradients against a plain step over the same rows.

Run interleaved in one process, like `step.py`; the plain step is an ordinary eager forward and
backward of the mean loss. Projected are all linear layers and both embeddings of a GPT-2.

    python benchmarks/project.py --shapes gpt2-small --rank-total 256
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from step import SHAPES, Shape, measure, model_of, report

import ghostfunc as gf

LAYERS = ["*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight", "*.wte.weight", "*.wpe.weight"]


def contestants(shape: Shape, kinds: list[str], rank_total: int) -> dict[str, Callable[[], object]]:
    """The plain step first, then a projection of every kind."""
    model = model_of(shape)
    model_fn, params = gf.hf.causal_lm(model)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, shape.vocabulary, (shape.n, shape.length), generator=generator)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        model_fn(trainable, {"input_ids": ids}).mean().backward()

    def project(kind: str) -> Callable[[], object]:
        projection = gf.kronecker_projection(
            params, rank_total=rank_total, rank_min=4, kind=kind, seed=0, layers=LAYERS
        )
        return lambda: gf.ghost_project(model_fn, params, {"input_ids": ids}, projection)

    return {"plain step, n rows": plain, **{f"project, {kind}": project(kind) for kind in kinds}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small"])
    parser.add_argument("--kinds", nargs="+", default=["rademacher"])
    parser.add_argument("--rank-total", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="as in step.py")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, eager")
    for name in args.shapes:
        shape = SHAPES[name]
        report(shape, measure(contestants(shape, args.kinds, args.rank_total), args.repeats, clock))


if __name__ == "__main__":
    main()
