"""A small language model of bytes, trained on six kinds of text, and queries of each kind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import ghostfunc as gf
from examples.demo_corpus import VOCAB_SIZE, load_corpus
from examples.evaluation.attribution import Batch, Task

CHUNK_BYTES, TRAIN_CHUNKS, POOL_CHUNKS, QUERY_CHUNKS, FRESH_CHUNKS = 128, 200, 48, 4, 12
"""Per domain: trained on; of these, scored; asked about; and held out to measure a step with."""
STEPS, BATCH_SIZE, LEARNING_RATE = 300, 16, 1e-3


@dataclass(frozen=True)
class Domains:
    """A trained model with its task, and which domain is whose.

    Attributes:
        task: the pool of training chunks, and single held-out chunks as queries.
        sources, wanted: the domain of every pool chunk, and of every query.
        fresh: per domain, held-out chunks that are no queries.
        losses: of every training step.
    """

    task: Task
    sources: Int[Tensor, " n"]
    wanted: Int[Tensor, " q"]
    fresh: list[Batch]
    losses: list[float]


def train(seed: int, *, steps: int = STEPS) -> Domains:
    """Train a model, in the ordinary way, on all domains alike."""
    generator = torch.Generator().manual_seed(seed)
    corpus = load_corpus(
        chunk_bytes=CHUNK_BYTES,
        n_train=TRAIN_CHUNKS,
        n_held_out=QUERY_CHUNKS + FRESH_CHUNKS,
        generator=generator,
    )
    chunks = torch.cat(list(corpus.train.values()))
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_positions=CHUNK_BYTES,
            n_embd=96,
            n_layer=3,
            n_head=3,
            bos_token_id=None,
            eos_token_id=None,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    model_fn, _ = gf.hf.causal_lm(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(chunks), (BATCH_SIZE,), generator=generator)
        loss = model_fn(dict(model.named_parameters()), {"input_ids": chunks[rows]}).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model_fn, params = gf.hf.causal_lm(model.eval())
    pool = torch.cat([x[:POOL_CHUNKS] for x in corpus.train.values()])
    queries = torch.cat([x[:QUERY_CHUNKS] for x in corpus.held_out.values()])
    kinds = torch.arange(len(corpus.train))
    return Domains(
        Task(model_fn, params, {"input_ids": pool}, {"input_ids": queries}, batch_size=32),
        kinds.repeat_interleave(POOL_CHUNKS),
        kinds.repeat_interleave(QUERY_CHUNKS),
        [{"input_ids": x[QUERY_CHUNKS:]} for x in corpus.held_out.values()],
        losses,
    )


def texts(chunks: Int[Tensor, "n t"]) -> list[str]:
    """Chunks as text."""
    return [bytes(chunk.tolist()).decode(errors="replace") for chunk in chunks]


def tail_patch(
    domains: Domains, scores: Float[Tensor, "n q"], k: int, *, lr: float
) -> Float[Tensor, " q"]:
    """How much one step on the k best samples lowers the loss of each query, in nats per byte.

        loss_j(params) - loss_j(params - lr * mean_{i in top k of j} g_i)

    Reference:
        Chang et al., "Scalable Influence and Fact Tracing for Large Language Model Pretraining",
        ICLR 2025, who take the step on one sample at a time.
    """
    task = domains.task
    before = task.model_fn(task.params, task.queries).detach()
    falls = []
    for j, best in enumerate(scores.topk(k, dim=0).indices.mT):
        few = {name: x[best] for name, x in task.train.items()}
        one = {name: x[j : j + 1] for name, x in task.queries.items()}
        g = gf.direction(task.model_fn, task.params, few)
        after = {name: p - lr * g[name] for name, p in task.params.items()}
        falls.append(before[j] - task.model_fn(after, one)[0].detach())
    return torch.stack(falls)
