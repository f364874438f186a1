"""Who runs against whom: one function per process, `shape -> contestants`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import peers
import torch
from exact import MAX_NORM, exact
from measure import Contestant
from shapes import Shape, documents, gpt2, gpt2_loss, untied_gpt, untied_loss
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import ghostfunc as gf

Loss = Callable[[nn.Module, Tensor], Tensor]
LINEAR_AND_EMBEDDINGS = [
    "*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight", "*.wte.weight", "*.wpe.weight"
]  # fmt: skip


def plain(module: nn.Module, loss: Loss, ids: Tensor) -> Callable[[], None]:
    """An ordinary step, without the optimizer's part: what everything is compared with."""

    def step() -> None:
        module.zero_grad(set_to_none=True)
        loss(module, ids).mean().backward()

    return step


class Watching(TorchFunctionMode):
    """Sees every call of torch, and does nothing: the least that a mode costs."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return func(*args, **(kwargs or {}))


def watched(run: Callable[[], None]) -> None:
    """`run` under a mode that does nothing."""
    with Watching():
        run()


def step(shape: Shape) -> dict[str, Contestant]:
    """Scores, with and without the training gradient, against steps over all rows."""
    module, ids = gpt2(shape), shape.ids()
    train, val = ids[: shape.n], ids[shape.n :]
    model_fn, params = gf.from_module(module, gpt2_loss)
    scores = exact(module, gpt2_loss, train, val).scores
    u, kept = gf.direction(model_fn, params, val), gf.factored_grads(model_fn, params, val)

    def with_gradient(**options: Any) -> gf.GhostStep:
        return gf.ghost_value_and_grad(model_fn, params, train, val, **options)

    def dots(result: gf.GhostStep) -> Tensor:
        return result.dot_prods

    return {
        "plain": Contestant(plain(module, gpt2_loss, ids), counted=True),
        "plain, n rows": Contestant(plain(module, gpt2_loss, train)),
        "plain, watched": Contestant(partial(watched, plain(module, gpt2_loss, ids))),
        "step": Contestant(with_gradient, scores, dots, counted=True),
        "step, bf16": Contestant(
            partial(with_gradient, contract_dtype=torch.bfloat16), scores, dots
        ),
        "scores": Contestant(lambda: gf.ghost_dot_prod(model_fn, params, train, val), scores),
        "scores, bf16": Contestant(
            lambda: gf.ghost_dot_prod(model_fn, params, train, val, contract_dtype=torch.bfloat16),
            scores,
        ),
        "scores, direction given": Contestant(
            lambda: gf.ghost_dot_prod(model_fn, params, train, direction=u), scores
        ),
        "scores, gradients kept": Contestant(
            lambda: gf.ghost_dot_prod(model_fn, params, train, direction=kept), scores
        ),
    }


def quadratic(shape: Shape) -> dict[str, Contestant]:
    """Norms, clipped sums and projections against a step over the same rows."""
    module, train = gpt2(shape), shape.ids()[: shape.n]
    model_fn, params = gf.from_module(module, gpt2_loss)
    right = exact(module, gpt2_loss, train, train[:1])
    projection = gf.kronecker_projection(
        params, rank_total=256, rank_min=4, kind="rademacher", seed=0, layers=LINEAR_AND_EMBEDDINGS
    )
    return {
        "plain, n rows": Contestant(plain(module, gpt2_loss, train)),
        "norm": Contestant(lambda: gf.ghost_norm(model_fn, params, train), right.norms),
        "clipped": Contestant(
            lambda: gf.ghost_clipped_grad(model_fn, params, train, max_norm=MAX_NORM).grads,
            right.clipped,
        ),
        "health": Contestant(
            lambda: gf.ghost_health(model_fn, params, train),
            right.norms,
            lambda step: sum(x[:, 0] for x in step.spread.values()).sqrt(),
        ),
        "project": Contestant(lambda: gf.ghost_project(model_fn, params, train, projection)),
    }


def packed(shape: Shape) -> dict[str, Contestant]:
    """Quadratic quantities of the documents in packed rows, against those of the rows."""
    module, ids = gpt2(shape).eval(), shape.ids()[: shape.n]
    model_fn, params = gf.hf.causal_lm(module)
    rows = {"input_ids": ids}
    found = {}
    for layout, sizes in documents(shape).items():
        segments = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).expand_as(ids)
        batches = {"rows": rows, layout: gf.documents({**rows, "segments": segments})}
        samples = [document for row in ids for document in row.split(sizes)]
        right = exact(module, lambda m, one: gpt2_loss(m, one[0][None]), samples, samples[:1])
        for name, batch in batches.items():
            norms, clipped = (None, None) if name == "rows" else (right.norms, right.clipped)
            found |= {
                f"norm, {name}": Contestant(partial(gf.ghost_norm, model_fn, params, batch), norms),
                f"clipped, {name}": Contestant(
                    partial(gf.ghost_clipped_grad, model_fn, params, batch, max_norm=MAX_NORM),
                    clipped,
                    lambda step: step.grads,
                ),
                f"gram, {name}": Contestant(
                    partial(gf.ghost_gram, model_fn, params, batch),
                    norms,
                    lambda gram: gram.diagonal().sqrt(),
                ),
                f"health, {name}": Contestant(
                    partial(gf.ghost_health, model_fn, params, batch),
                    norms,
                    lambda step: sum(x[:, 0] for x in step.spread.values()).sqrt(),
                ),
            }
    return found


def compiled(shape: Shape) -> dict[str, Contestant]:
    """A compiled step with scores against a compiled plain step over all rows."""
    module, ids = gpt2(shape), shape.ids()
    train, val = ids[: shape.n], ids[shape.n :]
    model_fn, params = gf.from_module(module, gpt2_loss)

    @torch.compile
    def plain_step(params: dict[str, Tensor], ids: Tensor) -> Any:
        return torch.func.grad(lambda p: model_fn(p, ids).mean())(params)

    @torch.compile(fullgraph=True)
    def with_gradient(params: dict[str, Tensor], train: Tensor, val: Tensor) -> gf.GhostStep:
        return gf.ghost_value_and_grad(model_fn, params, train, val)

    return {
        "compiled plain": Contestant(lambda: plain_step(params, ids)),
        "compiled step": Contestant(
            lambda: with_gradient(params, train, val).dot_prods,
            exact(module, gpt2_loss, train, val).scores,
        ),
    }


def against_vmap(shape: Shape) -> dict[str, Contestant]:
    return _step_against(shape, peers.vmap_step)


def against_dattri_llm(shape: Shape) -> dict[str, Contestant]:
    return _step_against(shape, peers.dattri_llm_step)


def _step_against(
    shape: Shape, peer: Callable[[nn.Module, Loss, Tensor, Tensor], Callable[[], Tensor]]
) -> dict[str, Contestant]:
    mine = step(shape)
    module, ids = gpt2(shape), shape.ids()
    theirs = peer(module, gpt2_loss, ids[: shape.n], ids[shape.n :])
    return {
        "plain": mine["plain"],
        "step": mine["step"],
        "peer": Contestant(theirs, mine["step"].expected),
    }


def against_opacus(shape: Shape) -> dict[str, Contestant]:
    """Norms and clipped sums on a model that Opacus can take."""
    module, train = untied_gpt(shape), shape.ids()[: shape.n]
    model_fn, params = gf.from_module(module, untied_loss)
    right = exact(module, untied_loss, train, train[:1])
    norms, clipped = peers.opacus_steps(untied_gpt(shape), untied_loss, train)

    def mine(mode: str) -> dict[str, Tensor]:
        return gf.ghost_clipped_grad(model_fn, params, train, max_norm=MAX_NORM, mode=mode).grads

    return {
        "plain, n rows": Contestant(plain(module, untied_loss, train)),
        "norm": Contestant(lambda: gf.ghost_norm(model_fn, params, train), right.norms),
        "clipped": Contestant(partial(mine, "ghost"), right.clipped),
        "peer, norm": Contestant(norms, right.norms),
        "peer, clipped": Contestant(clipped, right.clipped),
        "vmap, clipped": Contestant(partial(mine, "materialized"), right.clipped),
    }
