"""ghostfunc's own methods, and controls: scores `[n, m]`, higher where a sample helps more; or
`[shares, n, m]` where they depend on the share of the samples that is left out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from tasks import Task
from torch import Tensor

import ghostfunc as gf
from ghostfunc.unrolled import Trained

DAMPING = 0.1
"""Relative to each parameter's mean eigenvalue, as kronfluence's heuristic has it. For CG it is the
mean eigenvalue of the whole matrix, chosen after a look at the MLP: see docs/leaderboard.md."""

LEFT_OUT = (0.05, 0.1, 0.5)
"""Shares of the samples that retrained models do without."""

Method = Callable[[Task, Trained], Tensor]


def dot(task: Task, trained: Trained) -> Tensor:
    return gf.influence(
        task.model_fn, trained.params, task.train, task.queries, curvature=None, chunk_size=128
    )


def cosine(task: Task, trained: Trained) -> Tensor:
    fn, params = task.model_fn, trained.params
    norms = [gf.ghost_norm(fn, params, side) for side in (task.train, task.queries)]
    return dot(task, trained) / (norms[0][:, None] * norms[1])


def in_run(task: Task, trained: Trained) -> Tensor:
    """In-run data Shapley of first order: `lr_t <g_i, q_j>` along the run, as if by plain SGD."""
    training, state = trained.training, trained.training.start()
    scores = torch.zeros(task.n, len(task.queries["y"]))
    for t, micro in enumerate(task.steps):
        params = training.unflatten(state.params)
        dots = gf.ghost_dot_prod(task.model_fn, params, micro.batch, task.queries, reduction="none")
        lr = task.optimizer.lr(t)  # type: ignore[attr-defined]
        scores.index_add_(0, micro.ids, lr * dots / len(micro.ids))
        state = training.after(state, training.gradient(state, t), t)
    return scores


def projected(task: Task, trained: Trained) -> Tensor:
    """Random projections with a damped second moment, as TRAK and LoGra have it."""
    projection = gf.kronecker_projection(
        trained.params, rank_total=64, rank_min=4, kind="gaussian", seed=0
    )
    rows, queries = (
        torch.cat(
            [gf.ghost_project(task.model_fn, trained.params, chunk, projection) for chunk in chunks]
        ).double()
        for chunks in (task.batches(), [task.queries])
    )
    moment = rows.mT @ rows / len(rows)
    damped = moment + DAMPING * moment.diag().mean() * torch.eye(len(moment)).double()
    return rows @ torch.linalg.solve(damped, queries.mT)


def ekfac(task: Task, trained: Trained, draws: int = 1) -> Tensor:
    made = gf.curvature.ekfac(
        task.model_fn, trained.params, task.batches(), likelihood=task.likelihood, draws=draws
    )
    return gf.influence(
        task.model_fn, trained.params, task.train, task.queries,
        curvature=made, damping=DAMPING, relative=True, chunk_size=128, directions_at_once=64,
    )  # fmt: skip


def ekfac_cg(task: Task, trained: Trained) -> Tensor:
    params = trained.params
    made = gf.curvature.ekfac(task.model_fn, params, task.batches(), likelihood=task.likelihood)
    rows = made.report().rows
    damping = sum(r.trace for r in rows) / sum(x.numel() for x in params.values())
    ggn = gf.curvature.ggn(task.model_fn, params, task.batches(256), likelihood=task.likelihood)
    solver = gf.curvature.cg(ggn, preconditioner=made, tolerance=0.02, max_iterations=200)
    return gf.influence(
        task.model_fn, params, task.train, task.queries,
        curvature=solver, damping=damping, chunk_size=128,
    )  # fmt: skip


def metagradients(task: Task, trained: Trained) -> Tensor:
    made = gf.unrolled.metagradients(trained, task.queries, reduction="none")
    return -made.scores.values


def half_weights(task: Task, trained: Trained) -> Tensor:
    """The derivative of another run, in which every sample weighs a half."""
    training = task.training(weights=torch.full((task.n,), 0.5))
    return metagradients(task, gf.unrolled.train(training, keep_every=12))


def centred(task: Task, trained: Trained) -> Tensor:
    """The derivative of other runs, `[shares, n, m]`: every sample weighs its mean over the models
    that are trained again, 1 minus the share left out."""
    weights = (torch.full((task.n,), 1 - share) for share in LEFT_OUT)
    runs = (gf.unrolled.train(task.training(weights=w), keep_every=12) for w in weights)
    return torch.stack([metagradients(task, run) for run in runs])


def loss(task: Task, trained: Trained) -> Tensor:
    """A control: minus the loss of a sample itself, the same for every query."""
    with torch.no_grad():
        own = task.model_fn(trained.params, task.train)
    return -own[:, None].expand(-1, len(task.queries["y"]))


def alike(task: Task, trained: Trained) -> Tensor:
    """A control without a model: BM25 of texts, the cosine of images."""
    if task.texts is not None:
        from retrieval import bm25

        return bm25(*task.texts)
    train, queries = (
        torch.nn.functional.normalize(b["x"].flatten(1)) for b in (task.train, task.queries)
    )
    return train @ queries.mT


METHODS: dict[str, Method] = {
    "metagradients": metagradients,
    "metagradients, half weights": half_weights,
    "metagradients, mean weights": centred,
    "EK-FAC + CG": ekfac_cg,
    "EK-FAC, 16 draws": partial(ekfac, draws=16),
    "EK-FAC": ekfac,
    "projected, damped": projected,
    "in-run Shapley": in_run,
    "dot product": dot,
    "cosine": cosine,
    "similarity": alike,
    "plain loss": loss,
}
