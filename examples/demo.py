"""Which training samples speak for a validation domain?

A small GPT-2 learns the bytes of six kinds of real text. Then a few held-out chunks of one kind
score training chunks of all kinds by `<g_i, g_val>`, the dot product of each chunk's own gradient
with the validation gradient. The names of the domains serve only to grade the scores.

    python examples/demo.py
    python examples/demo.py --target asyncio --seed 1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import tyro
from demo_corpus import VOCAB_SIZE, Corpus, DomainName, load_corpus
from demo_report import Pool, Results, plot_scores, print_results, progress_bars
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import GPT2Config, GPT2LMHeadModel

import ghostfunc as gf

Batch = dict[str, Tensor]
Params = dict[str, Tensor]
ModelFn = Callable[[Params, Batch], Tensor]


@dataclass(frozen=True)
class Config:
    """Score training chunks of real text against a held-out domain."""

    target: DomainName = "manual"
    """Domain of the validation batch."""
    seed: int = 0
    """Of the split, the model and its training."""
    steps: int = 200
    """Training steps."""
    batch_size: int = 16
    """Chunks in a training step."""
    lr: float = 5e-4
    """Learning rate after the warm-up; it falls linearly to zero."""
    layers: int = 2
    """Layers of the GPT-2."""
    width: int = 128
    """Width of the GPT-2."""
    chunk_bytes: int = 256
    """Length of a chunk, which is one sample."""
    train_chunks: int = 200
    """Chunks of every domain to train on."""
    pool_chunks: int = 48
    """Chunks of every domain to score, out of those trained on."""
    val_chunks: int = 16
    """Held-out chunks in a validation batch."""
    score_batch: int = 32
    """Chunks scored at once."""
    timing_rounds: int = 3
    """Times every method is timed; the median counts."""
    out: Path = Path("outputs/demo/scores.png")
    """Where the figure goes."""


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    corpus = load_corpus(
        chunk_bytes=config.chunk_bytes,
        n_train=config.train_chunks,
        n_held_out=config.val_chunks,
        generator=generator,
    )
    pool = Pool.of(
        {domain: chunks[: config.pool_chunks] for domain, chunks in corpus.train.items()}
    )
    batches = [{"input_ids": chunks} for chunks in pool.chunks.split(config.score_batch)]
    vals = {domain: {"input_ids": chunks} for domain, chunks in corpus.held_out.items()}
    val = vals[config.target]
    one_of_each = {"input_ids": pool.chunks[:: pool.size]}

    with progress_bars() as progress:
        model = build_model(config)
        losses = train(model, corpus, config, generator, progress)
        model_fn, params = gf.hf.causal_lm(model.eval())
        scores = score(model_fn, params, batches, val, progress)
        dots, norms, val_norms = score_every_domain(model_fn, params, batches, vals, progress)
        verification = gf.verify(model_fn, params, one_of_each, val)
        seconds = time_methods(model_fn, params, batches[0], val, config.timing_rounds, progress)

    results = Results(
        target=config.target,
        pool=pool,
        losses=losses,
        n_params=sum(p.numel() for p in params.values()),
        scores=scores,
        dots=dots,
        norms=norms,
        val_norms=val_norms,
        verification=verification,
        seconds=seconds,
        n_timed=len(batches[0]["input_ids"]),
        n_val=config.val_chunks,
    )
    print_results(results)
    plot_scores(results, config.out)


# --- what ghostfunc does ------------------------------------------------------------------------


def score(
    model_fn: ModelFn, params: Params, batches: list[Batch], val: Batch, progress: Progress
) -> Float[Tensor, " n"]:
    """`<g_i, g_val>` of every sample; the validation gradient is computed once."""
    direction = gf.direction(model_fn, params, val)
    scores = [
        gf.ghost_dot_prod(model_fn, params, batch, direction=direction)
        for batch in progress.track(batches, description="score")
    ]
    return torch.cat(scores)


def score_every_domain(
    model_fn: ModelFn,
    params: Params,
    batches: list[Batch],
    vals: dict[str, Batch],
    progress: Progress,
) -> tuple[dict[str, Float[Tensor, " n"]], Float[Tensor, " n"], dict[str, float]]:
    """`<g_i, g_val>` for every validation batch and `||g_i||`, from one backward pass over the
    pool; and `||g_val||` of every validation batch."""
    directions = {domain: gf.direction(model_fn, params, val) for domain, val in vals.items()}
    dots: dict[str, gf.Quantity] = {domain: gf.Dot(u) for domain, u in directions.items()}
    parts = []
    for batch in progress.track(batches, description="score for every domain"):
        read = gf.ghost_vjp(model_fn, params, batch, {**dots, "square": gf.SqNorm()}).values
        parts.append({name: sum(by_param.values()) for name, by_param in read.items()})
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    norms = whole.pop("square").sqrt()
    val_norms = {domain: norm_of(u) for domain, u in directions.items()}
    return whole, norms, val_norms


def norm_of(u: Params) -> float:
    """`||u||` of a pytree of tensors."""
    return float(torch.stack([x.square().sum() for x in u.values()]).sum().sqrt())


def time_methods(
    model_fn: ModelFn,
    params: Params,
    train: Batch,
    val: Batch,
    rounds: int,
    progress: Progress,
) -> dict[str, float]:
    """Median seconds of each method on the same samples; the methods take turns."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    rows = {"input_ids": torch.cat([train["input_ids"], val["input_ids"]])}
    methods: dict[str, Callable[[], object]] = {
        "plain gradient": lambda: torch.autograd.grad(
            model_fn(leaves, rows).mean(), list(leaves.values())
        ),
        "ghost dot products": lambda: gf.ghost_dot_prod(model_fn, params, train, val),
        "ghost dot products and gradient": lambda: gf.ghost_value_and_grad(
            model_fn, params, train, val
        ),
        "materialized dot products": lambda: gf.ghost_dot_prod(
            model_fn, params, train, val, mode="materialized"
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for round_ in progress.track(range(rounds + 1), description="time"):
        for name, method in methods.items():
            start = perf_counter()
            method()
            if round_ > 0:  # the first round warms up
                seconds[name].append(perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


# --- the model and its training -----------------------------------------------------------------


def build_model(config: Config) -> GPT2LMHeadModel:
    """A GPT-2 over bytes, input and output embeddings tied."""
    return GPT2LMHeadModel(
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
            # vmap runs fused attention sample by sample: eager is fair to the materialized mode.
            attn_implementation="eager",
        )
    )


def train(
    model: GPT2LMHeadModel,
    corpus: Corpus,
    config: Config,
    generator: torch.Generator,
    progress: Progress,
) -> list[float]:
    """Train on all domains alike, in the ordinary way; return the loss of every step."""
    chunks = torch.cat(list(corpus.train.values()))
    model_fn, _ = gf.hf.causal_lm(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1 - step / config.steps)
    )
    losses = []
    for _ in progress.track(range(config.steps), description="train"):
        rows = torch.randint(len(chunks), (config.batch_size,), generator=generator)
        loss = model_fn(dict(model.named_parameters()), {"input_ids": chunks[rows]}).mean()
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
