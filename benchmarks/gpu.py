"""Everything on one GPU: `make bench-gpu`, at most 8 minutes; writes docs/benchmarks/gpu.md.

python benchmarks/gpu.py                       # a CUDA device, all shapes
python benchmarks/gpu.py --device cpu --tiny   # the same script without one: does it run?

Times are of whole calls, between synchronisations; the contestants of a shape run in turns.
Launches are aten calls that are not views. A shape that does not fit into memory, or into the time,
says so.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from calls import CountCalls
from exact import error, exact
from shapes import Shape, gpt2, gpt2_loss
from torch import Tensor, nn

import ghostfunc as gf

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "gpu.md"
MINUTES = 8.0
ROUNDS = 5
MAX_NORM = 1.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEAD = (
    "| model | n | m | dtype | work | mode | ms | ratio | tokens/s | peak MB | launches | waits |"
)
RULE = "| --- | ---: | ---: | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"


def smollm2(shape: Shape) -> nn.Module:
    """A Llama of SmolLM2-135M's shape, with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        intermediate_size=8 * shape.width // 3,
        num_attention_heads=max(1, shape.width // 64),
        num_key_value_heads=max(1, shape.width // 192),
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


@dataclass(frozen=True)
class Model:
    """A model's shape, but for its batches."""

    make: Callable[[Shape], nn.Module]
    layers: int
    width: int
    vocabulary: int


MODELS = {
    "gpt2-small": Model(gpt2, 12, 768, 50257),
    "smollm2-135m": Model(smollm2, 30, 576, 49152),
    "gpt2-medium": Model(gpt2, 24, 1024, 50257),
}
TINY = {"gpt2": Model(gpt2, 1, 64, 50), "smollm2": Model(smollm2, 1, 192, 50)}


@dataclass(frozen=True)
class Line:
    """One row of the table; `note` says why there is nothing in it."""

    model: str
    shape: Shape
    dtype: str
    work: str
    mode: str
    seconds: float | None = None
    base: float | None = None
    peak: int | None = None
    launches: int | None = None
    waits: int | None = None
    note: str = ""

    def __str__(self) -> str:
        head = f"| {self.model} | {self.shape.n} | {self.shape.m} | {self.dtype} | {self.work} | "
        if self.seconds is None:
            return f"{head}{self.mode} | {self.note} |  |  |  |  |  |"
        tokens = (self.shape.n + self.shape.m) * self.shape.length / self.seconds
        ratio = "" if self.base is None else f"{self.seconds / self.base:.2f}"
        peak = "" if self.peak is None else f"{self.peak / 1e6:.0f}"
        counts = " | ".join("" if x is None else str(x) for x in (self.launches, self.waits))
        return (
            f"{head}{self.mode} | {1e3 * self.seconds:.1f} | {ratio} | {tokens:.0f} | {peak} | "
            f"{counts} |"
        )


class Device:
    """Time and memory of a device; a processor has no allocator to ask."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cuda = name.startswith("cuda")

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any]) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def peak(self, run: Callable[[], Any]) -> int | None:
        if not self.cuda:
            return None
        torch.cuda.reset_peak_memory_stats()
        run()
        self.wait()
        return torch.cuda.max_memory_allocated()

    def describe(self) -> str:
        return torch.cuda.get_device_name() if self.cuda else "a processor"


def contestants(
    module: nn.Module, train: Tensor, val: Tensor, *, compiled: bool, graphs: bool
) -> dict[tuple[str, str], Callable[[], Any]]:
    """Everything that is timed, by work and mode; the plain step comes first."""
    model_fn, params = gf.from_module(module, gpt2_loss)
    args, rows = (model_fn, params, train), torch.cat([train, val])
    kept = gf.factored_grads(model_fn, params, val)
    projection = gf.kronecker_projection(
        params, rank_total=256, rank_min=4, kind="rademacher", seed=0, layers=["*_proj.weight"]
    )

    def plain() -> None:
        module.zero_grad(set_to_none=True)
        gpt2_loss(module, rows).mean().backward()

    eager: dict[str, Callable[[], Any]] = {
        "plain step": plain,
        "step with scores": lambda: gf.ghost_value_and_grad(*args, val),
        "scores": lambda: gf.ghost_dot_prod(*args, val),
        "scores of a pool": lambda: gf.ghost_dot_prod(*args, direction=kept),
        "norm": lambda: gf.ghost_norm(*args),
        "clipped": lambda: gf.ghost_clipped_grad(*args, max_norm=MAX_NORM),
        "project": lambda: gf.ghost_project(*args, projection),
    }
    found = {(work, "eager"): run for work, run in eager.items()}
    modes = {"compiled": None, "CUDA graphs": "reduce-overhead"} if graphs else {"compiled": None}
    for mode, how in modes.items() if compiled else ():

        @torch.compile(mode=how)
        def plain_step(params: dict[str, Tensor], rows: Tensor) -> Any:
            return torch.func.grad(lambda p: model_fn(p, rows).mean())(params)

        @torch.compile(mode=how, fullgraph=True)
        def step(params: dict[str, Tensor], train: Tensor, val: Tensor) -> Any:
            return gf.ghost_value_and_grad(model_fn, params, train, val)

        found["plain step", mode] = lambda f=plain_step: f(params, rows)
        found["step with scores", mode] = lambda f=step: f(params, train, val)
    return found


def measure(
    device: Device, name: str, model: Model, shape: Shape, dtype: str, *, compiled: bool
) -> list[Line]:
    """All lines of one model, shape and dtype."""
    module = model.make(shape).to(device.name, DTYPES[dtype])
    ids = shape.ids().to(device.name)
    runs = contestants(
        module, ids[: shape.n], ids[shape.n :], compiled=compiled, graphs=device.cuda
    )
    peaks: dict[tuple[str, str], int | None] = {}
    counts: dict[tuple[str, str], CountCalls] = {}
    notes: dict[tuple[str, str], str] = {}
    for key, run in runs.items():
        try:
            run()
            run()
            peaks[key] = device.peak(run)
            if key[1] == "eager":
                with CountCalls() as counts[key]:
                    run()
        except (RuntimeError, gf.GhostError) as problem:
            notes[key] = f"{type(problem).__name__}: {problem}".splitlines()[0][:80]
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs if key not in notes}
    for _ in range(ROUNDS):
        for key, row in times.items():
            row.append(device.seconds(runs[key]))
    middle = {key: statistics.median(row) for key, row in times.items()}
    return [
        Line(
            name,
            shape,
            dtype,
            *key,
            seconds=middle.get(key),
            base=middle.get(("plain step", key[1])),
            peak=peaks.get(key),
            launches=counts[key].calls.total() if key in counts else None,
            waits=counts[key].waits.total() if key in counts else None,
            note=notes.get(key, ""),
        )
        for key in runs
    ]


def errors(device: Device, model: Model, length: int) -> list[str]:
    """Scores, norms and the clipped sum against float64, in every dtype."""
    shape = Shape(min(2, model.layers), model.width, model.vocabulary, length, 4, 1)
    lines = []
    for name, dtype in DTYPES.items():
        module = model.make(shape).to(device.name, dtype)
        ids = shape.ids().to(device.name)
        train, val = ids[: shape.n], ids[shape.n :]
        right = exact(module, gpt2_loss, train, val)
        args = (*gf.from_module(module, gpt2_loss), train)
        found = {
            "scores": (gf.ghost_dot_prod(*args, val).cpu(), right.scores),
            "norms": (gf.ghost_norm(*args).cpu(), right.norms),
            "clipped": (gf.ghost_clipped_grad(*args, max_norm=MAX_NORM).grads, right.clipped),
        }
        lines += [f"| {name} | {work} | {error(*pair):.0e} |" for work, pair in found.items()]
    return lines


def shapes(models: dict[str, Model], *, tiny: bool) -> Iterator[tuple[str, Model, Shape, str]]:
    """What is measured, the most wanted first."""
    length, samples = (8, [(4, 1)]) if tiny else (1024, [(8, 1), (32, 1), (32, 8), (8, 8)])
    for n, m in samples:
        for name, model in models.items():
            for dtype in ("bf16", "fp32"):
                yield (
                    name,
                    model,
                    Shape(model.layers, model.width, model.vocabulary, length, n, m),
                    dtype,
                )


def page(device: Device, lines: list[Line], right: list[str]) -> str:
    """The page."""
    packages = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return "\n".join(
        [
            "# On a GPU",
            "",
            f"Written by `make bench-gpu` on {datetime.date.today()}, {device.describe()}, "
            f"{packages}. Random weights, {lines[0].shape.length} tokens. A ratio is to the plain "
            "step over all n + m rows in the same mode.",
            "",
            HEAD,
            RULE,
            *map(str, lines),
            "",
            "Relative errors against float64, of two layers:",
            "",
            "| dtype | of | error |",
            "| --- | --- | ---: |",
            *right,
            "",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, whose times say nothing")
    parser.add_argument("--no-compile", action="store_true", help="eager alone")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="no shape starts later")
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny tries the script")
    device, models = Device(args.device), TINY if args.tiny else MODELS
    begun = time.perf_counter()
    first = next(iter(models.values()))
    right = errors(device, first, 8 if args.tiny else 128)
    lines: list[Line] = []
    for name, model, shape, dtype in shapes(models, tiny=args.tiny):
        if time.perf_counter() - begun > 60 * args.minutes:
            late = f"not started within {args.minutes:g} minutes"
            lines.append(Line(name, shape, dtype, "all", "all", note=late))
            continue
        compiled = not args.no_compile and (shape.n, shape.m) in ((8, 1), (4, 1))
        lines += measure(device, name, model, shape, dtype, compiled=compiled)
        print(lines[-1], file=sys.stderr, flush=True)
    args.out.write_text(page(device, lines, right))


if __name__ == "__main__":
    main()
