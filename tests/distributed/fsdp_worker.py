"""One rank of a sharded model: every quantity beside that of one process with the whole model."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from fsdp_problems import PROBLEMS, Problem, joined, sharded
from torch import Tensor, nn

import ghostfunc as gf
from ghostfunc._base.remembered import memory
from ghostfunc._transforms.scores.one_run import OneRuns

Results = dict[str, float]


def error(got: Any, expected: Any) -> float:
    """The largest error of two trees, relative to the largest number of each tensor."""
    import optree

    a, b = optree.tree_leaves(got), optree.tree_leaves(expected)
    assert len(a) == len(b), (len(a), len(b))
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape, (x.shape, y.shape)
        if y.numel():
            scale = max(float(y.abs().max()), 1e-12)
            worst = max(worst, float((x - y).abs().max()) / scale)
    return worst


def pieces(whole: dict[str, Tensor], module: nn.Module, mesh: Any) -> Any:
    """This rank's pieces of whole tensors: what the plan has cut, and of that the rows."""
    from torch.distributed.tensor import DTensor

    names, own = mesh.mesh_dim_names or (None,), dict(module.named_parameters())
    out = {}
    for name, x in whole.items():
        placed: Any = own[name]
        cuts = placed.device_mesh.mesh_dim_names or (None,) if isinstance(placed, DTensor) else ()
        if "tp" in cuts and placed.placements[-1].is_shard():
            x = part_of(x, mesh, names.index("tp"), placed.placements[-1].dim)
        if cuts not in ((), ("tp",)):
            x = part_of(x, mesh, len(names) - 1 - ("tp" in names), 0)
        out[name] = x
    return out


def part_of(x: Tensor, mesh: Any, which: int, dim: int) -> Tensor:
    """One of the parts that `torch.chunk` makes, of this rank along a dimension of the mesh."""
    length, count, rank = x.shape[dim], mesh.size(which), mesh.get_local_rank(which)
    most = -(-length // count)
    start = min(rank * most, length)
    return x.narrow(dim, start, min(most, length - start))


def every_quantity(problem: Problem, rank: int, mesh: Any) -> Results:
    """`rank`: whose samples this one has."""
    whole_fn, whole = problem.make(copy.deepcopy(problem.module))
    model_fn, params = problem.make(sharded(problem, mesh))
    train, val = joined(problem.train), joined(problem.val)
    mine, own_val = problem.train[rank], problem.val[rank]
    start = sum(len(next(iter(b.values()))) for b in problem.train[:rank])
    rows = slice(start, start + len(next(iter(mine.values()))))

    def cut(tree: dict[str, Tensor]) -> Any:
        return pieces(tree, problem.module, mesh)

    found: Results = {}
    assert params.keys() == whole.keys()
    found["params"] = error(params, cut(whole))

    u = gf.direction(whole_fn, whole, val)
    found["direction"] = error(gf.direction(model_fn, params, own_val), cut(u))
    found["a direction made whole"] = error(gf.distributed.whole(model_fn, params, cut(u)), u)
    sums = gf.direction(whole_fn, whole, val, reduction="sum")
    found["direction, sum"] = error(
        gf.direction(model_fn, params, own_val, reduction="sum"), cut(sums)
    )

    step = gf.ghost_value_and_grad(whole_fn, whole, train, val)
    for again in ("", ", warm"):
        ours = gf.ghost_value_and_grad(model_fn, params, mine, own_val)
        found[f"losses{again}"] = error(ours.losses, step.losses[rows])
        found[f"dots{again}"] = error(ours.dot_prods, step.dot_prods[rows])
        found[f"grads{again}"] = error(ours.grads, cut(step.grads))
    dots = gf.ghost_dot_prod(model_fn, params, mine, direction=cut(u))
    # Llama's norms round to float32, whatever the model's dtype: the same call is compared.
    along = gf.ghost_dot_prod(whole_fn, whole, train, direction=u)
    found["dots with a direction"] = error(dots, along[rows])
    per_param = gf.ghost_dot_prod(whole_fn, whole, train, val, per_param=True)
    found["dots per parameter"] = error(
        gf.ghost_dot_prod(model_fn, params, mine, own_val, per_param=True),
        {k: x[rows] for k, x in per_param.items()},
    )
    found |= with_few(problem, rank, (whole_fn, whole), (model_fn, params), cut)
    cosines = gf.ghost_cosine(whole_fn, whole, train, val)
    found["cosines"] = error(gf.ghost_cosine(model_fn, params, mine, own_val), cosines[rows])

    norms = gf.ghost_norm(whole_fn, whole, train)
    found["norms"] = error(gf.ghost_norm(model_fn, params, mine), norms[rows])
    found["gram"] = error(
        gf.ghost_gram(model_fn, params, mine), gf.ghost_gram(whole_fn, whole, mine)
    )
    found["gram of two batches"] = error(
        gf.ghost_gram(model_fn, params, mine, own_val),
        gf.ghost_gram(whole_fn, whole, mine, own_val),
    )
    bound = float(norms.median())
    clipped = gf.ghost_clipped_grad(whole_fn, whole, train, max_norm=bound)
    ours_clipped = gf.ghost_clipped_grad(model_fn, params, mine, max_norm=bound)
    found["clipped"] = error(ours_clipped.grads, cut(clipped.grads))
    found["norms before clipping"] = error(ours_clipped.norms, clipped.norms[rows])

    for kind in ("rademacher", "dense"):
        shapes = gf.distributed.whole_shapes(model_fn, params)
        projection = gf.kronecker_projection(shapes, rank_total=6, rank_min=1, kind=kind, seed=1)
        projected = gf.ghost_project(whole_fn, whole, train, projection)
        found[f"projected, {kind}"] = error(
            gf.ghost_project(model_fn, params, mine, projection), projected[rows]
        )

    kept = gf.factored_grads(whole_fn, whole, train)
    book = gf.factored_grads(model_fn, params, mine)
    found["kept norms"] = error(book.norms(), kept.norms()[rows])
    found["kept dots"] = error(book.dot_prods(cut(u)), kept.dot_prods(u)[rows])
    weights = torch.linspace(-1, 1, len(kept.losses), dtype=torch.float64)
    found["kept sums"] = error(book.weighted_sum(weights[rows]), cut(kept.weighted_sum(weights)))
    formed = gf.per_sample_grads(whole_fn, whole, mine, mode="ghost")
    found["gradients themselves"] = error(
        gf.per_sample_grads(model_fn, params, mine, mode="ghost"), formed
    )
    chunks = gf.ghost_value_and_grad(model_fn, params, mine, own_val, chunk_size=2)
    found["grads in chunks"] = error(chunks.grads, cut(step.grads))
    found["dots in chunks"] = error(chunks.dot_prods, step.dot_prods[rows])
    found |= in_run_values(problem, rank, (whole_fn, whole), (model_fn, params), cut)
    return found


def with_few(
    problem: Problem,
    rank: int,
    one: tuple[Any, Any],
    ours: tuple[Any, Any],
    cut: Callable[[dict[str, Tensor]], Any],
) -> Results:
    """Scores with so few validation samples that every rank computes all ranks' in one run."""
    train, val = joined(problem.train), joined(problem.few)
    mine, own_val = problem.train[rank], problem.few[rank]
    start = sum(len(next(iter(b.values()))) for b in problem.train[:rank])
    rows = slice(start, start + len(next(iter(mine.values()))))
    found: Results = {}
    step = gf.ghost_value_and_grad(*one, train, val)
    for again in ("", ", warm"):
        got = gf.ghost_value_and_grad(*ours, mine, own_val)
        found[f"losses, few{again}"] = error(got.losses, step.losses[rows])
        found[f"dots, few{again}"] = error(got.dot_prods, step.dot_prods[rows])
        found[f"grads, few{again}"] = error(got.grads, cut(step.grads))
    each = gf.ghost_dot_prod(*one, train, val, per_param=True, reduction="sum")
    found["dots per parameter, few"] = error(
        gf.ghost_dot_prod(*ours, mine, own_val, per_param=True, reduction="sum"),
        {k: x[rows] for k, x in each.items()},
    )
    known = memory(ours[0], OneRuns).found._found.values()
    found["runs of few"] = 1.0 if any(isinstance(x, list) for x in known) else 2.0
    return found


def in_run_values(
    problem: Problem,
    rank: int,
    one: tuple[Any, Any],
    ours: tuple[Any, Any],
    cut: Callable[[dict[str, Tensor]], Any],
) -> Results:
    """Shapley values of samples in training steps, whose optimizer has pieces of its state."""
    whole_fn, whole = one
    model_fn, params = ours
    train, val = joined(problem.train), {"val": joined(problem.val)}
    mine, own_val = problem.train[rank], {"val": problem.val[rank]}
    start = sum(len(next(iter(b.values()))) for b in problem.train[:rank])
    rows = slice(start, start + len(next(iter(mine.values()))))
    found: Results = {}
    module = model_fn.module
    copied = whole_fn.module
    # Of a first step eps alone is left where g / |g| cancels: torch's 1e-8 leaves few digits.
    options: dict[str, Any] = {"eps": 1e-2, "foreach": False}
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2, **options)
        for m in (copied, module)
    ]
    for number in range(2):
        steps = []
        for fn, p, batch, sets, m, optimizer in (
            (whole_fn, whole, train, val, copied, optimizers[0]),
            (model_fn, params, mine, own_val, module, optimizers[1]),
        ):
            update = gf.shapley.from_optimizer(optimizer, m)
            step = gf.shapley.step(fn, p, batch, sets, optimizer=update)
            optimizer.zero_grad()
            gf.accumulate_grads(m, step.grads)
            optimizer.step()
            steps.append(step)
        found[f"in-run values, step {number}"] = error(steps[1].values, steps[0].values[rows])
    found["params after training"] = error(params, cut(whole))
    plain = gf.shapley.sgd(lr=0.1)
    values = gf.shapley.step(whole_fn, whole, train, val, optimizer=plain).values
    found["in-run values, SGD"] = error(
        gf.shapley.step(model_fn, params, mine, own_val, optimizer=plain).values, values[rows]
    )
    return found


def main() -> None:
    rank, world, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=world,
        timeout=timedelta(seconds=300),
    )  # fmt: skip
    from torch.distributed.device_mesh import init_device_mesh

    flat = init_device_mesh("cpu", (world,))
    found = {}
    for name in sys.argv[4:]:
        torch.manual_seed(0)
        kind, _, dtype = name.partition(":")
        torch.set_default_dtype(getattr(torch, dtype or "float64"))
        kind, _, names = kind.partition("@")
        mesh, alike = flat, 1
        if names:
            dims = tuple(names.split("+"))
            shape = (world,) if len(dims) == 1 else (world // 2, 2)
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=dims)
            alike = mesh["tp"].size() if "tp" in dims else 1
        found[name] = every_quantity(PROBLEMS[kind](world // alike), rank // alike, mesh)
    (directory / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
