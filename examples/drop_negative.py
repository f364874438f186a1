"""Does dropping the samples with negative scores help? Against dropping as many at random.

A small GPT-2 trains on the bytes of six kinds of text while a few held-out chunks of one kind, the
target, score every sample at every step. A sample's score is the sum of `lr * <g_i, g_val>` over
the steps that saw it: to first order, by how much it lowered the target's validation loss. Then
fresh models train on what is left when the samples with a negative sum are dropped, when as many
are dropped at random, and when none are. A fourth drops at random as many of each domain as the
scores dropped: what the scores know beyond the domain is the difference to that one. The loss is
read on other held-out chunks of the target, which nothing was chosen by.

    python examples/drop_negative.py
    python examples/drop_negative.py --target asyncio --seeds 1
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from json import dumps
from math import inf
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import NoReturn

import matplotlib as mpl
import torch
import tyro
from demo_corpus import DOMAINS, VOCAB_SIZE, DomainName, load_corpus
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

import ghostfunc as gf


@dataclass(frozen=True)
class Config:
    """Train, score, drop, and train again."""

    target: DomainName = "manual"
    """Domain whose validation loss is to fall."""
    seeds: int = 3
    """Repetitions, each with its own split, models and order of samples."""
    steps: int = 500
    """Steps of every training."""
    batch_size: int = 32
    """Samples in a step."""
    lr: float = 3e-3
    """Learning rate after the warm-up."""
    layers: int = 2
    """Layers of the GPT-2."""
    width: int = 64
    """Width of the GPT-2."""
    chunk_bytes: int = 64
    """Length of a sample."""
    train_chunks: int = 600
    """Samples of every domain."""
    val_chunks: int = 16
    """Held-out chunks of the target that score, in every step."""
    test_chunks: int = 128
    """Other held-out chunks of the target, to read the loss on."""
    read_every: int = 20
    """Steps between two readings of that loss."""
    out: Path = Path("outputs/drop_negative")
    """Folder of the figure and of all numbers."""


@dataclass(frozen=True)
class Data:
    """One split.

    Attributes:
        train: `[n, t]`, all domains.
        domains: `[n]`, each sample's place in `DOMAINS`, known only to the tables.
        val, test: `[m, t]` of the target; one scores, the other judges.
    """

    train: Tensor
    domains: Tensor
    val: Tensor
    test: Tensor


def load(config: Config, seed: int) -> Data:
    corpus = load_corpus(
        chunk_bytes=config.chunk_bytes,
        n_train=config.train_chunks,
        n_held_out=config.val_chunks + config.test_chunks,
        generator=torch.Generator().manual_seed(seed),
    )
    val, test = corpus.held_out[config.target].split([config.val_chunks, config.test_chunks])
    return Data(
        train=torch.cat(list(corpus.train.values())),
        domains=torch.arange(len(DOMAINS)).repeat_interleave(config.train_chunks),
        val=val,
        test=test,
    )


Curve = list[tuple[int, float]]
"""Steps done, and the loss on the test chunks."""


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        curve: loss of the target.
        scores: `[n]`, the sum over steps; zeros for a training without scores.
    """

    curve: Curve
    scores: Tensor


def train(
    config: Config, data: Data, kept: Tensor, seed: int, progress: tqdm[NoReturn], *, scored: bool
) -> Run:
    """Train a new model on the samples `kept`, with scores or in the ordinary way."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_positions=config.chunk_bytes,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=4,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    model_fn, params = gf.hf.causal_lm(model)
    val, test = {"input_ids": data.val}, {"input_ids": data.test}
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1.0))
    order = chain.from_iterable(epochs(kept, torch.Generator().manual_seed(seed)))
    scores = torch.zeros(len(data.train))
    curve: Curve = []
    for step in range(config.steps):
        rows = torch.stack([next(order) for _ in range(config.batch_size)])
        batch = {"input_ids": data.train[rows]}
        optimizer.zero_grad()
        if scored:
            result = gf.ghost_value_and_grad(model_fn, params, batch, val)
            for name, p in model.named_parameters():
                p.grad = result.grads[name]
            scores.index_add_(0, rows, schedule.get_last_lr()[0] * result.dot_prods)
        else:
            model_fn(dict(model.named_parameters()), batch).mean().backward()
        clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        schedule.step()
        progress.update()
        if (step + 1) % config.read_every == 0:
            with torch.no_grad():
                curve.append((step + 1, float(model_fn(params, test).mean())))
    return Run(curve, scores)


def epochs(kept: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """The samples in a new order, again and again."""
    while True:
        yield kept[torch.randperm(len(kept), generator=generator)]


# --- what is compared ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Repetition:
    """One seed: what was dropped, and how training went without it."""

    dropped: dict[str, float]
    curves: dict[str, Curve]


NEGATIVE = "negative ones dropped"
RANDOM = "random ones dropped"
MATCHED = "random, as many of each domain"
NOTHING = "nothing dropped"
COLOURS = {NEGATIVE: "#0072B2", RANDOM: "#D55E00", MATCHED: "#E69F00", NOTHING: "#8C8C8C"}


def repeat(config: Config, seed: int, progress: tqdm[NoReturn]) -> Repetition:
    """Score, drop and train again; the models that are compared start and shuffle alike."""
    data = load(config, seed)
    n = len(data.train)
    everything = torch.arange(n)
    scores = train(config, data, everything, seed, progress, scored=True).scores
    negative = scores < 0
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    matched = [
        mine[int(negative[mine].sum()) :]
        for mine in (shuffled[data.domains[shuffled] == i] for i in range(len(DOMAINS)))
    ]
    kept = {
        NEGATIVE: everything[~negative],
        RANDOM: shuffled[int(negative.sum()) :],
        MATCHED: torch.cat(matched),
        NOTHING: everything,
    }
    return Repetition(
        dropped={
            domain: float(negative[data.domains == i].float().mean())
            for i, domain in enumerate(DOMAINS)
        },
        curves={
            name: train(config, data, rows, seed + 1000, progress, scored=False).curve
            for name, rows in kept.items()
        },
    )


def steps_to(curve: Curve, loss: float) -> float:
    """Steps until the curve is first at `loss`, between readings on a line; inf for never."""
    for (step, high), (later, low) in pairwise(curve):
        if low <= loss:
            return step + max(0.0, (high - loss) / (high - low)) * (later - step)
    return inf


def compare(repetitions: list[Repetition]) -> Table:
    """Every seed: the last loss, and the steps to the lowest loss of random dropping."""
    table = Table(box=None)
    for name in ("seed", "dropped", "", "last loss", "steps to random dropping's best"):
        table.add_column(name, justify="left" if not name else "right")
    for seed, r in enumerate(repetitions):
        best = min(loss for _, loss in r.curves[RANDOM])
        for name, curve in r.curves.items():
            steps = steps_to(curve, best)
            table.add_row(
                str(seed) if name == NEGATIVE else "",
                f"{mean(r.dropped.values()):.0%}" if name == NEGATIVE else "",
                name,
                f"{curve[-1][1]:.3f}",
                f"{steps:.0f}" if steps < inf else "never",
            )
    return table


def plot(repetitions: list[Repetition], config: Config) -> Path:
    """The curves of every seed and their means, and who was dropped."""
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10.5}):
        figure = Figure(figsize=(11.5, 4.8), dpi=130, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
        for name, colour in COLOURS.items():
            curves = [r.curves[name] for r in repetitions]
            steps = [step for step, _ in curves[0]]
            losses = torch.tensor([[loss for _, loss in curve] for curve in curves])
            left.plot(steps, losses.T, color=colour, linewidth=0.7, alpha=0.4)
            left.plot(steps, losses.mean(0), color=colour, linewidth=2.2, label=name)
        low, high = losses.min(), losses[:, len(steps) // 5].max()
        left.set(xlabel="step", ylim=(float(low) - 0.2, float(high) + 0.1), xlim=(steps[0], None))
        left.set_title(f"Loss on held-out {config.target!r}, nats per byte", loc="left")
        left.legend(frameon=False, title=f"mean of {len(repetitions)} seeds (thin: each)")
        shares = {d: [r.dropped[d] for r in repetitions] for d in DOMAINS}
        order = sorted(shares, key=lambda d: -mean(shares[d]))
        for row, domain in enumerate(order):
            colour = COLOURS[NEGATIVE] if domain == config.target else COLOURS[NOTHING]
            right.barh(row, 100 * mean(shares[domain]), color=colour, height=0.6)
            right.plot([100 * x for x in shares[domain]], [row] * len(repetitions), "k.", ms=5)
        right.set_yticks(range(len(order)), order)
        right.set(xlabel="% of the domain's samples with a negative score")
        right.set_title("What was dropped (dots: seeds)", loc="left")
    path = config.out / "drop_negative.png"
    figure.savefig(path)
    return path


def main(config: Config) -> None:
    start = perf_counter()
    trainings = config.seeds * (1 + len(COLOURS))
    with tqdm(total=trainings * config.steps, desc="train", unit="step") as progress:
        repetitions = [repeat(config, seed, progress) for seed in range(config.seeds)]
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    numbers = {"config": settings, "repetitions": [asdict(r) for r in repetitions]}
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "results.json").write_text(dumps(numbers, indent=1))
    Console().print(compare(repetitions))
    print(f"figure: {plot(repetitions, config)}; {perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
