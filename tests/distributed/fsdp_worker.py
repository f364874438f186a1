"""One rank of a sharded model: every quantity beside that of one process with the whole model."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
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


def of_one_process(problem: Problem) -> dict[str, Any]:
    """Every quantity of all samples, and the parameters before and after training."""
    whole_fn, whole = problem.make(problem.module)
    train, val = joined(problem.train), joined(problem.val)
    u = gf.direction(whole_fn, whole, val)
    norms = gf.ghost_norm(whole_fn, whole, train)
    kept = gf.factored_grads(whole_fn, whole, train)
    weights = torch.linspace(-1, 1, len(norms), dtype=torch.float64)
    bound = float(norms.median())
    return {
        "params": {name: x.detach().clone() for name, x in whole.items()},
        "u": u,
        "sums": gf.direction(whole_fn, whole, val, reduction="sum"),
        "step": gf.ghost_value_and_grad(whole_fn, whole, train, val),
        # Llama's norms round to float32, whatever the model's dtype: the same call is compared.
        "along": gf.ghost_dot_prod(whole_fn, whole, train, direction=u),
        "per_param": gf.ghost_dot_prod(whole_fn, whole, train, val, per_param=True),
        "like train": [
            (
                gf.ghost_value_and_grad(whole_fn, whole, train, joined(like)),
                gf.ghost_dot_prod(
                    whole_fn, whole, train, joined(like), per_param=True, reduction="sum"
                ),
            )
            for like in problem.like_train
        ],
        "cosines": gf.ghost_cosine(whole_fn, whole, train, val),
        "norms": norms,
        "gram": gf.ghost_gram(whole_fn, whole, train),
        "pairs": gf.ghost_gram(whole_fn, whole, train, val),
        "bound": bound,
        "clipped": gf.ghost_clipped_grad(whole_fn, whole, train, max_norm=bound),
        "projected": {
            kind: gf.ghost_project(whole_fn, whole, train, projection_of(whole, kind))
            for kind in ("rademacher", "dense")
        },
        "kept norms": kept.norms(),
        "kept dots": kept.dot_prods(u),
        "weights": weights,
        "kept sums": kept.weighted_sum(weights),
        "formed": gf.per_sample_grads(whole_fn, whole, train, mode="ghost"),
        "in_run": in_run_values(whole_fn, whole, train, {"val": val}),
        "trained": {name: x.detach().clone() for name, x in whole.items()},
    }


def projection_of(params: Any, kind: Any) -> Any:
    return gf.kronecker_projection(params, rank_total=6, rank_min=1, kind=kind, seed=1)


def own_rows(batches: list[Any], rank: int) -> slice:
    """Which of all ranks' samples a rank has."""
    counts = [len(next(iter(b.values()))) for b in batches]
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def every_quantity(problem: Problem, one: dict[str, Any], rank: int, mesh: Any) -> Results:
    """`one`: what one process finds; `rank`: whose samples this one has."""
    model_fn, params = problem.make(sharded(problem, mesh))
    mine, own_val = problem.train[rank], problem.val[rank]
    rows, columns = own_rows(problem.train, rank), own_rows(problem.val, rank)

    def cut(tree: dict[str, Tensor]) -> Any:
        return pieces(tree, problem.module, mesh)

    found: Results = {}
    assert params.keys() == one["params"].keys()
    found["params"] = error(params, cut(one["params"]))

    u = one["u"]
    found["direction"] = error(gf.direction(model_fn, params, own_val), cut(u))
    found["a direction made whole"] = error(gf.distributed.whole(model_fn, params, cut(u)), u)
    found["direction, sum"] = error(
        gf.direction(model_fn, params, own_val, reduction="sum"), cut(one["sums"])
    )

    step = one["step"]
    for again in ("", ", warm"):
        ours = gf.ghost_value_and_grad(model_fn, params, mine, own_val)
        found[f"losses{again}"] = error(ours.losses, step.losses[rows])
        found[f"dots{again}"] = error(ours.dot_prods, step.dot_prods[rows])
        found[f"grads{again}"] = error(ours.grads, cut(step.grads))
    dots = gf.ghost_dot_prod(model_fn, params, mine, direction=cut(u))
    found["dots with a direction"] = error(dots, one["along"][rows])
    found["dots per parameter"] = error(
        gf.ghost_dot_prod(model_fn, params, mine, own_val, per_param=True),
        {k: x[rows] for k, x in one["per_param"].items()},
    )
    before = shared_runs(model_fn)
    for name, like, expected in zip(
        ("few", "many"), problem.like_train, one["like train"], strict=True
    ):
        given = model_fn, params, mine, like[rank]
        of_like = in_one_run(given, expected, rows, cut)
        found |= {f"{what}, {name} like train": x for what, x in of_like.items()}
    found["batches that share a run"] = shared_runs(model_fn) - before
    found["cosines"] = error(gf.ghost_cosine(model_fn, params, mine, own_val), one["cosines"][rows])

    found["norms"] = error(gf.ghost_norm(model_fn, params, mine), one["norms"][rows])
    found["gram"] = error(gf.ghost_gram(model_fn, params, mine), one["gram"][rows, rows])
    found["gram of two batches"] = error(
        gf.ghost_gram(model_fn, params, mine, own_val), one["pairs"][rows, columns]
    )
    clipped = gf.ghost_clipped_grad(model_fn, params, mine, max_norm=one["bound"])
    found["clipped"] = error(clipped.grads, cut(one["clipped"].grads))
    found["norms before clipping"] = error(clipped.norms, one["clipped"].norms[rows])

    shapes = gf.distributed.whole_shapes(model_fn, params)
    for kind, projected in one["projected"].items():
        found[f"projected, {kind}"] = error(
            gf.ghost_project(model_fn, params, mine, projection_of(shapes, kind)), projected[rows]
        )

    book = gf.factored_grads(model_fn, params, mine)
    found["kept norms"] = error(book.norms(), one["kept norms"][rows])
    found["kept dots"] = error(book.dot_prods(cut(u)), one["kept dots"][rows])
    found["kept sums"] = error(book.weighted_sum(one["weights"][rows]), cut(one["kept sums"]))
    found["gradients themselves"] = error(
        gf.per_sample_grads(model_fn, params, mine, mode="ghost"),
        {k: g[rows] for k, g in one["formed"].items()},
    )
    chunks = gf.ghost_value_and_grad(model_fn, params, mine, own_val, chunk_size=2)
    found["grads in chunks"] = error(chunks.grads, cut(step.grads))
    found["dots in chunks"] = error(chunks.dot_prods, step.dot_prods[rows])
    in_run = in_run_values(model_fn, params, mine, {"val": own_val})
    for name, values in one["in_run"].items():
        found[f"in-run values, {name}"] = error(in_run[name], values[rows])
    found["params after training"] = error(params, cut(one["trained"]))
    return found


def shared_runs(model_fn: Any) -> int:
    """How many pairs of batches are known to share a run."""
    return sum(isinstance(x, list) for x in memory(model_fn, OneRuns).found._found.values())


def in_one_run(
    given: tuple[Any, Any, Any, Any],
    expected: Any,
    rows: slice,
    cut: Callable[[dict[str, Tensor]], Any],
) -> Results:
    """Scores with validation samples that are like those of train."""
    found: Results = {}
    step, per_param = expected
    for again in ("", ", warm"):
        got = gf.ghost_value_and_grad(*given)
        found[f"losses{again}"] = error(got.losses, step.losses[rows])
        found[f"dots{again}"] = error(got.dot_prods, step.dot_prods[rows])
        found[f"grads{again}"] = error(got.grads, cut(step.grads))
    found["dots per parameter"] = error(
        gf.ghost_dot_prod(*given, per_param=True, reduction="sum"),
        {k: x[rows] for k, x in per_param.items()},
    )
    return found


def in_run_values(model_fn: Any, params: Any, train: Any, val: Any) -> dict[str, Tensor]:
    """Shapley values of samples in two training steps, which are taken, and in one by SGD. The
    optimizer of a sharded module has pieces of its state."""
    module = model_fn.module
    # Of a first step eps alone is left where g / |g| cancels: torch's 1e-8 leaves few digits.
    options: dict[str, Any] = {"eps": 1e-2, "foreach": False}
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, **options)
    values = {}
    for number in range(2):
        update = gf.shapley.from_optimizer(optimizer, module)
        step = gf.shapley.step(model_fn, params, train, val, optimizer=update)
        optimizer.zero_grad()
        gf.accumulate_grads(module, step.grads)
        optimizer.step()
        values[f"step {number}"] = step.values
    plain = gf.shapley.sgd(lr=0.1)
    values["SGD"] = gf.shapley.step(model_fn, params, train, val, optimizer=plain).values
    return values


@dataclass(frozen=True)
class Case:
    """`kind@dims:dtype`: a problem, and how it lies on the ranks.

    Attributes:
        shape, dims: of the mesh and names of its dimensions; no names for one of all ranks.
        alike: how many ranks have the same samples.
    """

    name: str
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    alike: int

    @staticmethod
    def of(name: str, world: int) -> Case:
        kind, _, dtype = name.partition(":")
        kind, _, names = kind.partition("@")
        dims = tuple(names.split("+")) if names else ()
        shape = (world // 2, 2) if len(dims) == 2 else (world,)
        alike = shape[-1] if "tp" in dims else 1
        return Case(name, kind, getattr(torch, dtype or "float64"), shape, dims, alike)

    def problem(self) -> Problem:
        """The same on every rank, and each time."""
        torch.manual_seed(0)
        torch.set_default_dtype(self.dtype)
        return PROBLEMS[self.kind](math.prod(self.shape) // self.alike)


def main() -> None:
    rank, world, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=world,
        timeout=timedelta(seconds=300),
    )  # fmt: skip
    from torch.distributed.device_mesh import init_device_mesh

    cases = [Case.of(name, world) for name in sys.argv[4:]]
    # Each rank makes some of what all compare with, while the others make the rest.
    own = {i: of_one_process(x.problem()) for i, x in enumerate(cases) if i % world == rank}
    flat = init_device_mesh("cpu", (world,))
    found = {}
    for i, case in enumerate(cases):
        one = [own.get(i)]
        torch.distributed.broadcast_object_list(one, i % world)
        mesh = flat
        if case.dims:
            mesh = init_device_mesh("cpu", case.shape, mesh_dim_names=case.dims)
        found[case.name] = every_quantity(case.problem(), one[0], rank // case.alike, mesh)
    (directory / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
