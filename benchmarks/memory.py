"""What less memory costs: peak bytes and time of scores, by `gf.remat`, `chunk_size` and pieces of
logits, over those of the same call without them.

    python benchmarks/memory.py [--layers 6 --width 384 --vocabulary 8000 --length 256 -n 4]

Peak bytes are those of tensors that are alive, parameters apart; times are medians of processor
time, interleaved in one process. The largest relative difference of the scores is printed beside.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any


def asked() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("layers", 6), ("width", 384), ("vocabulary", 8000), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("-n", type=int, default=4, help="samples")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    asked()  # before torch is imported: --help and mistakes are answered at once

import torch
import transformers as hf
from live_bytes import LiveBytes

import ghostfunc as gf


def model(options: argparse.Namespace, *, remat: bool) -> hf.GPT2LMHeadModel:
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=options.vocabulary,
        n_positions=options.length,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.width // 64,
        bos_token_id=0,
        eos_token_id=0,
    )
    made = hf.GPT2LMHeadModel(config).eval()
    if remat:
        gf.hf.enable_remat(made)
    return made


def main() -> None:
    options = asked()

    ids = torch.randint(options.vocabulary, (options.n, options.length))
    plain, again = (model(options, remat=remat) for remat in (False, True))
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "as it is": (gf.hf.causal_lm(plain), {}),
        "remat": (gf.hf.causal_lm(again), {}),
        "logit_chunks=8": (gf.hf.causal_lm(plain, logit_chunks=8), {}),
        "remat, logit_chunks=8": (gf.hf.causal_lm(again, logit_chunks=8), {}),
        "chunk_size=1": (gf.hf.causal_lm(plain), {"chunk_size": 1}),
        "all three": (gf.hf.causal_lm(again, logit_chunks=8), {"chunk_size": 1}),
    }
    calls: dict[str, Callable[..., Any]] = {
        "scores": gf.ghost_dot_prod,
        "step with scores": gf.ghost_value_and_grad,
    }
    for what, call in calls.items():
        runs = {
            way: partial(call, *made, {"input_ids": ids}, direction=made[1], **more)
            for way, (made, more) in ways.items()
        }
        scores, peaks = {}, {}
        for way, run in runs.items():
            run()  # traced from here on
            with LiveBytes() as memory:
                out = run()
            scores[way], peaks[way] = out if what == "scores" else out.dot_prods, memory.peak
        times: dict[str, list[float]] = {way: [] for way in runs}
        for _ in range(options.rounds):
            for way, run in runs.items():
                start = time.process_time()
                run()
                times[way].append(time.process_time() - start)
        base = scores["as it is"]
        median = {way: statistics.median(t) for way, t in times.items()}
        print(f"{what:24} {'peak':>8} {'ratio':>6} {'time':>6} {'difference':>11}")
        for way in runs:
            difference = float((scores[way] - base).abs().max() / base.abs().max())
            print(
                f"{way:24} {peaks[way] / 2**20:5.0f} MB {peaks[way] / peaks['as it is']:6.2f}"
                f" {median[way] / median['as it is']:6.2f} {difference:11.1e}"
            )


if __name__ == "__main__":
    main()
