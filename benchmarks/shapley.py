"""A training step with values of its samples against a plain step.

The plain step is an ordinary forward and backward of the mean loss over the n training rows alone:
what training without scores costs. All are eager and run interleaved in one process; what is
printed are ratios of medians, with the spread between quartiles. The paper's second order took 2.2
plain steps.

    python benchmarks/shapley.py                  # the default shapes
    python benchmarks/shapley.py --shapes wide --repeats 9 --cpu-time
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from step import Shape, measure, model_of, report

import ghostfunc as gf

SHAPES = {
    "small": Shape(4, 256, 4000, 128, 8, 1),
    "core": Shape(6, 384, 8000, 256, 8, 1),
    "more-val": Shape(4, 256, 4000, 128, 8, 4),
}


def contestants(shape: Shape) -> dict[str, Callable[[], object]]:
    """The plain step first, then what is compared with it."""
    model = model_of(shape)
    model_fn, params = gf.hf.causal_lm(model)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, shape.vocabulary, (shape.n + shape.m, shape.length), generator=generator)
    train, val_sets = {"input_ids": ids[: shape.n]}, {"val": {"input_ids": ids[shape.n :]}}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        model_fn(trainable, train).mean().backward()

    moments = [{k: torch.rand_like(x) for k, x in params.items()} for _ in range(2)]
    sgd = gf.shapley.sgd(lr=0.1)
    adam = gf.shapley.adamw(lr=0.1, exp_avg=moments[0], exp_avg_sq=moments[1], step=5)

    def step(**options: object) -> Callable[[], object]:
        return lambda: gf.shapley.step(model_fn, params, train, val_sets, **options)  # type: ignore[arg-type]

    return {
        "plain step, n rows": plain,
        "SGD": step(optimizer=sgd),
        "AdamW, previous state": step(optimizer=adam, form="previous_state"),
        "AdamW, exact": step(optimizer=adam),
        "AdamW, exact, two passes": step(optimizer=adam, keep_factors=False),
        "SGD, order 2": step(optimizer=sgd, order=2),
        "SGD, order 2, two passes": step(optimizer=sgd, order=2, keep_factors=False),
        "SGD, order 2, hvp reverse": step(optimizer=sgd, order=2, hvp="reverse"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small", "more-val"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="processor time, 1 thread")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, eager")
    for name in args.shapes:
        shape = SHAPES[name]
        report(shape, measure(contestants(shape), args.repeats, clock))


if __name__ == "__main__":
    main()
