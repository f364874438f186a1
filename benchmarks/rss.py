"""Peak memory of a process: what a call takes beside a plain training step over the same rows.

    python benchmarks/rss.py [--shape gpt2 positions vocabulary] [--what scores step norms]

Every call runs in a process of its own. Its peak is the most memory that the process had resident
(`VmHWM`, which Linux sets anew on request), less what it had after its imports: model, batch,
activations, gradients, and whatever the allocator keeps. The first call traces and proves the
model; the others are warm. A plain step is forward and backward over all rows, train and
validation, with the gradients of all parameters.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WHATS = ("plain", "scores", "direction", "step", "norms", "clipped")
SHAPE_NAMES = ("gpt2", "positions", "vocabulary")


def asked() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="*", default=list(SHAPE_NAMES), choices=SHAPE_NAMES)
    parser.add_argument("--what", nargs="*", default=list(WHATS[1:]), choices=WHATS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    asked()  # before torch is imported: --help and mistakes are answered at once


import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghostfunc as gf


def _tokens(layers: int, width: int, vocabulary: int, n: int, m: int, length: int) -> Any:
    import transformers as hf

    config = hf.GPT2Config(
        vocab_size=vocabulary, n_positions=length, n_embd=width, n_layer=layers,
        n_head=width // 64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = hf.GPT2LMHeadModel(config).eval()
    ids = torch.randint(vocabulary, (n + m, length))
    fn, params = gf.hf.causal_lm(model)
    return fn, params, {"input_ids": ids[:n]}, {"input_ids": ids[n:]}


def gpt2() -> Any:
    """GPT-2 with six layers of width 384: 8 + 2 texts of 128 tokens."""
    return _tokens(6, 384, 50257, 8, 2, 128)


def vocabulary() -> Any:
    """A vocabulary of 200,000: 4 + 1 texts of 64 tokens, one layer of width 128."""
    return _tokens(1, 128, 200_000, 4, 1, 64)


def positions() -> Any:
    """20,000 positions in an MLP 64-256-64: 4 + 1 samples."""
    net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        return F.mse_loss(module(x), x, reduction="none").mean((1, 2))

    x = torch.randn(5, 20_000, 64)
    return *gf.from_module(net, loss), x[:4], x[4:]


SHAPES: dict[str, Callable[[], Any]] = dict(
    zip(SHAPE_NAMES, (gpt2, positions, vocabulary), strict=True)
)


def plain(fn: Any, params: dict[str, Tensor], train: Any, val: Any) -> Any:
    """Forward and backward over all rows."""
    leaves = {name: x.detach().requires_grad_() for name, x in params.items()}
    if isinstance(train, dict):
        rows: Any = {name: torch.cat([x, val[name]]) for name, x in train.items()}
    else:
        rows = torch.cat([train, val])
    return torch.autograd.grad(fn(leaves, rows).mean(), list(leaves.values()))


def calls(fn: Any, params: Any, train: Any, val: Any) -> dict[str, Callable[[], Any]]:
    """What is measured."""
    return {
        "plain": lambda: plain(fn, params, train, val),
        "scores": lambda: gf.ghost_dot_prod(fn, params, train, val),
        "direction": lambda: gf.ghost_dot_prod(fn, params, train, direction=params),
        "step": lambda: gf.ghost_value_and_grad(fn, params, train, val),
        "norms": lambda: gf.ghost_norm(fn, params, train),
        "clipped": lambda: gf.ghost_clipped_grad(fn, params, train, max_norm=1.0),
    }


def resident(line: str) -> int:
    """Bytes of a line of this process's status: `VmRSS` now, `VmHWM` at the most."""
    text = Path("/proc/self/status").read_text()
    found = next(x for x in text.splitlines() if x.startswith(line + ":"))
    return int(found.split()[1]) * 1024


def forget_peak() -> None:
    """Let `VmHWM` begin at what is resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def measure(shape: str, what: str) -> dict[str, int]:
    """Peaks of the first call and of two warm ones, in bytes above the imports."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    imports = resident("VmRSS")
    run = calls(*SHAPES[shape]())[what]
    peaks = []
    for _ in range(3):
        forget_peak()
        out = run()
        peaks.append(resident("VmHWM") - imports)
        del out
    return {"first": peaks[0], "warm": max(peaks[1:])}


def main() -> None:
    """A table of all shapes and calls."""
    options = asked()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    print(f"{'shape':12} {'call':10} {'warm':>8} {'ratio':>6} {'first':>8} {'ratio':>6}")
    for shape in options.shape:
        base: dict[str, int] = {}
        for what in ["plain", *options.what]:
            command = [sys.executable, __file__, "--one", shape, what]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(said.splitlines()[-1])
            base = base or found
            columns = [
                f"{found[x] / 2**20:5.0f} MB {found[x] / base['warm']:6.2f}"
                for x in ("warm", "first")
            ]
            print(f"{shape:12} {what:10} {'  '.join(columns)}", flush=True)


if __name__ == "__main__":
    main()
