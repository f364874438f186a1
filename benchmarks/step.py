"""A training step with scores against a plain step over the same rows.

Both are eager and run interleaved in one process; what is printed are ratios of medians, with the
spread between quartiles. The plain step is an ordinary forward and backward of the mean loss over
the n train and m validation rows together: what training on all of them would cost.

    python benchmarks/step.py                 # the default shapes
    python benchmarks/step.py --shapes small wide --repeats 9
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import ghostfunc as gf


@dataclass(frozen=True)
class Shape:
    """A GPT-2 with tied head, and a batch."""

    layers: int
    width: int
    vocabulary: int
    length: int
    n: int
    m: int

    def __str__(self) -> str:
        return (
            f"{self.layers} x {self.width}, V={self.vocabulary}, T={self.length}, "
            f"n={self.n}, m={self.m}"
        )


SHAPES = {
    "core": Shape(6, 384, 8000, 256, 8, 1),
    "small": Shape(6, 384, 8000, 256, 4, 1),
    "long": Shape(6, 384, 8000, 512, 8, 1),
    "longer": Shape(6, 384, 8000, 1024, 8, 1),
    "more-val": Shape(6, 384, 8000, 512, 8, 4),
    "gpt2-small": Shape(12, 768, 50257, 256, 4, 1),
}


def model_of(shape: Shape) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.width // 64,
        vocab_size=shape.vocabulary,
        n_positions=shape.length,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def contestants(shape: Shape) -> dict[str, Callable[[], object]]:
    """The plain step first, then what is compared with it."""
    model = model_of(shape)
    model_fn, params = gf.hf.causal_lm(model)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, shape.vocabulary, (shape.n + shape.m, shape.length), generator=generator)
    train, val = {"input_ids": ids[: shape.n]}, {"input_ids": ids[shape.n :]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        model_fn(trainable, {"input_ids": ids}).mean().backward()

    direction = gf.direction(model_fn, params, val)
    return {
        "plain step, n+m rows": plain,
        "scores + gradient": lambda: gf.ghost_value_and_grad(model_fn, params, train, val),
        "scores only": lambda: gf.ghost_dot_prod(model_fn, params, train, val),
        "scores, direction given": lambda: gf.ghost_dot_prod(
            model_fn, params, train, direction=direction
        ),
    }


def measure(
    functions: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of every function, run in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if turn:  # the first turn warms up, and traces
                times[name].append(clock() - start)
    return times


def report(shape: Shape, times: dict[str, list[float]]) -> None:
    """Ratios to the first function, turn by turn: median and quartiles."""
    print(f"\n{shape}")
    (_, base), *_ = times.items()
    for name, seconds in times.items():
        ratios = sorted(s / b for s, b in zip(seconds, base, strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        median = statistics.median(seconds) / statistics.median(base)
        print(
            f"  {name:<26} {statistics.median(seconds) * 1e3:9.1f} ms   "
            f"ratio {median:5.2f}   quartiles {low:.2f}-{high:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["core", "small", "long"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count processor time instead of wall time (steadier beside other work; 1 thread)",
    )
    args = parser.parse_args()
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, eager")
    for name in args.shapes:
        shape = SHAPES[name]
        report(shape, measure(contestants(shape), args.repeats, clock))


if __name__ == "__main__":
    main()
