"""What the ranks of a group on gloo do; see `ddp_ranks.py`."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import optree
import torch
import torch._dynamo  # loaded by the server, once: optimizers and dispatch modes import it
import torch.distributed as dist
import torch.nn.functional as F
from problems import CASES
from torch import Tensor, nn

import ghostfunc as gf
from ghostfunc._base.processes import ranks


def share(batch: Any, rank: int, size: int) -> Any:
    """This rank's rows: rank 0 has the most, and no two ranks but the last have as many."""
    n = len(optree.tree_leaves(batch)[0])
    bounds = [0, *(n - (size - r) * (size - r + 1) // 2 for r in range(1, size + 1))]
    bounds = [max(x, r) for r, x in enumerate(bounds)]
    return optree.tree_map(lambda x: x[bounds[rank] : bounds[rank + 1]], batch)


def error(actual: Any, expected: Any) -> float:
    """The largest difference, relative to the largest value of all."""
    pairs = list(zip(optree.tree_leaves(actual), optree.tree_leaves(expected), strict=True))
    assert all(a.shape == e.shape for a, e in pairs)
    size = max(float(e.abs().max()) for _, e in pairs)
    return max(float((a - e).abs().max()) for a, e in pairs) / size


def equal(dtype: str, names: str) -> dict[str, dict[str, float]]:
    """Problems' steps beside those of one process that has all samples and materializes their
    gradients."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    out = {}
    for name in names.split(","):
        problem = CASES[name]()
        model_fn, params = problem.model_fn, cast(problem.params, dtype)
        n, m = 3 + size * (size + 1) // 2, 1 + size * (size + 1) // 2
        train, val = (cast(problem.batch(k, seed=k), dtype) for k in (n, m))
        whole = gf.ghost_value_and_grad(model_fn, params, train, val, mode="materialized")
        ours, theirs = share(train, rank, size), share(val, rank, size)
        step = gf.ghost_value_and_grad(model_fn, params, ours, theirs, group=group)
        scores = gf.distributed.gather(step.dot_prods, group)
        out[name] = {
            "scores": error(scores, whole.dot_prods),
            "grads": error(step.grads, whole.grads),
        }
    return out


class Net(nn.Module):
    """A tied matrix, small vectors, and a parameter that no sample meets at some ranks."""

    def __init__(self, wide: int = 16) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.up, self.down = nn.Linear(8, wide), nn.Linear(wide, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.down(torch.tanh(self.up(self.table(ids)))))
        return h @ self.table.weight.t()


def token_loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = module(batch["ids"][:, :-1])
    return F.cross_entropy(logits.mT, batch["ids"][:, 1:], reduction="none").mean(1)


def text(n: int, seed: int, t: int = 6) -> dict[str, Tensor]:
    return {"ids": torch.randint(11, (n, t), generator=torch.Generator().manual_seed(seed))}


def net(dtype: torch.dtype = torch.float64, **options: int) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(**options).to(dtype)


def train(module: nn.Module, steps: int, group: Any = None) -> list[list[float]]:
    """Adam with batches that differ in size from step to step, and from rank to rank. Returns the
    scores of all samples, step by step."""
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    model_fn, params = gf.from_module(module, token_loss)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    scores = []
    for step in range(steps):
        ours, val = share(text(11 + step % 3, step), rank, size), share(text(10, 99), rank, size)
        out = gf.ghost_value_and_grad(model_fn, params, ours, val, group=group)
        optimizer.zero_grad()
        gf.accumulate_grads(module, out.grads)
        optimizer.step()
        found = out.dot_prods if group is None else gf.distributed.gather(out.dot_prods, group)
        scores.append(found.tolist())
    return scores


def trained() -> dict[str, float]:
    """Ten steps of all ranks beside ten steps of one process, and beside DDP's own weights."""
    ours, alone, theirs = net(), net(), net()
    scores = train(ours, 10, dist.group.WORLD)
    expected = train(alone, 10)
    weights = dict(ours.named_parameters())
    return {
        "weights": error(weights, dict(alone.named_parameters())),
        "scores": error(list(map(torch.tensor, scores)), list(map(torch.tensor, expected))),
        "as DDP": error(weights, dict(by_ddp(theirs, 10).named_parameters())),
        "first weight": float(ours.up.weight[0, 0]),
    }


def by_ddp(module: nn.Module, steps: int) -> nn.Module:
    """What a plain loop with `DistributedDataParallel` trains: it averages over ranks, so a rank's
    loss is weighed by its number of samples."""
    rank, size = dist.get_rank(), dist.get_world_size()
    ddp = nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for step in range(steps):
        n = 11 + step % 3
        optimizer.zero_grad()
        (token_loss(ddp, share(text(n, step), rank, size)).sum() * size / n).backward()
        optimizer.step()
    return module


def said_of_groups() -> dict[str, str]:
    """What a rank says of other weights, of collectives inside of a model and of groups that it is
    not in, and whether tensors of all dtypes are gathered. The group goes on after each."""
    group, rank = dist.group.WORLD, dist.get_rank()
    model_fn, params = gf.from_module(net(), token_loss)
    ours, val = text(4, rank), text(3, 7)
    bent = {k: x.clone() for k, x in params.items()}
    bent["norm.bias"][0] += 1e-15 * rank

    def coupled(collective: Callable[[Tensor], Any]) -> Any:
        def loss(module: nn.Module, batch: Any) -> Tensor:
            losses = token_loss(module, batch)
            collective(losses)
            return losses

        return gf.ghost_norm(*gf.from_module(net(), loss), ours)

    def functional(x: Tensor) -> Any:
        return torch.ops._c10d_functional.all_reduce(x, "sum", group.group_name)

    def step(p: Any) -> Any:
        return gf.ghost_value_and_grad(model_fn, p, ours, val, group=group)

    def turns() -> Any:  # one parameter of a call, until the one that differs
        for _ in range(len(params)):
            step({**params, "norm.bias": bent["norm.bias"]})

    fresh_fn, _ = gf.from_module(net(), token_loss)
    nobody = dist.new_group([0])
    calls = {
        "weights": lambda: gf.direction(fresh_fn, bent, ours, group=group),
        "same weights": lambda: step(params),
        "weights later": turns,
        "directions": lambda: gf.ghost_dot_prod(
            model_fn, params, ours, direction={k: x * 1e-3 for k, x in bent.items()}, group=group
        ),
        "clipped": lambda: gf.ghost_clipped_grad(fresh_fn, bent, ours, max_norm=1.0, group=group),
        "all_reduce": lambda: coupled(lambda x: dist.all_reduce(x.detach().clone())),
        "functional": lambda: coupled(functional),
        "objects": lambda: coupled(lambda x: dist.all_gather_object([None, None], 1)),
        "nobody": lambda: gf.distributed.gather(torch.ones(2), nobody),
    }
    said = {name: _said(call) for name, call in calls.items()}
    dtypes = (torch.int16, torch.bool, torch.bfloat16, torch.float16, torch.complex64, torch.uint8)
    for dtype in dtypes:
        x = torch.arange(2 * (rank + 2)).view(-1, 2).to(dtype)
        expected = torch.cat([torch.arange(4), torch.arange(6)]).view(-1, 2).to(dtype)
        said[str(dtype)] = str(torch.equal(gf.distributed.gather(x, group), expected))
    return said


def _said(call: Callable[[], Any]) -> str:
    try:
        call()
    except gf.GhostError as error:
        return f"{type(error).__name__}: {error}"
    return "right"


SUMS: Any = ("mean", "sum")


def others() -> dict[str, float]:
    """The other functions with a group, the other ways to ask, and several validation batches."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    model_fn, params = gf.from_module(net(), token_loss)
    whole, val, more = text(13, 0), text(10, 1), text(11, 2)
    ours = share(whole, rank, size)
    sets = {"a": share(val, rank, size), "b": share(more, rank, size)}
    both = {"a": val, "b": more}
    out = {}
    for name, function, options in (
        ("scores", gf.ghost_dot_prod, {}),
        ("sum", gf.ghost_dot_prod, {"reduction": "sum"}),
        ("by parameter", gf.ghost_dot_prod, {"per_param": True}),
        ("by position", gf.ghost_dot_prod, {"per_position": True}),
        ("chunks", gf.ghost_dot_prod, {"chunk_size": 2}),
        ("jvp", gf.ghost_dot_prod, {"mode": "jvp"}),
        ("cosines", gf.ghost_cosine, {}),
    ):
        found = function(model_fn, params, ours, sets, group=group, **options)
        out[name] = error(
            gf.distributed.gather(found, group), function(model_fn, params, whole, both, **options)
        )
    for name, options in (
        ("step in chunks", {"chunk_size": 2}),
        ("step, materialized", {"mode": "materialized"}),
    ):
        step = gf.ghost_value_and_grad(model_fn, params, ours, sets, group=group, **options)
        one = gf.ghost_value_and_grad(model_fn, params, whole, both, **options)
        out[name] = max(
            error(step.grads, one.grads),
            error(gf.distributed.gather(step.dot_prods, group), one.dot_prods),
            error(gf.distributed.gather(step.losses, group), one.losses),
        )
    u = gf.direction(model_fn, params, val)
    found = gf.ghost_dot_prod(model_fn, params, ours, direction=u, group=group)
    expected = gf.ghost_dot_prod(model_fn, params, whole, direction=u)
    out["direction given"] = error(gf.distributed.gather(found, group), expected)
    shared = {r: gf.direction(model_fn, params, sets["a"], reduction=r, group=group) for r in SUMS}
    alone = {r: gf.direction(model_fn, params, val, reduction=r) for r in SUMS}
    out["direction"] = max(error(shared[r], alone[r]) for r in SUMS)
    clipped = gf.ghost_clipped_grad(model_fn, params, ours, max_norm=0.3, group=group)
    one = gf.ghost_clipped_grad(model_fn, params, whole, max_norm=0.3)
    assert (one.norms > 0.3).any()
    out["clipped"] = error(clipped.grads, one.grads)
    out["norms"] = error(gf.distributed.gather(clipped.norms, group), one.norms)
    return out


def in_transforms() -> list[str]:
    """What is said of a group inside `torch.func` and `torch.compile`."""
    group = dist.group.WORLD
    model_fn, params = gf.from_module(net(), token_loss)
    ours, val = text(4, 0), text(3, 1)

    def step(p: Any) -> Tensor:
        return gf.ghost_value_and_grad(model_fn, p, ours, val, group=group).dot_prods.sum()

    def clipped(p: Any) -> Tensor:
        found = gf.ghost_clipped_grad(model_fn, p, ours, max_norm=1.0, group=group)
        return found.norms.sum()

    said = []
    for call in (
        lambda: torch.func.grad(step)(params),
        lambda: torch.func.grad(clipped)(params),
        lambda: torch.compile(step)(params),
    ):
        try:
            call()
        except RuntimeError as error:  # the compiler's own wraps ours
            said.append(f"{type(error).__name__}: {error}")
    return said


def travelled(mib: str) -> dict[str, Any]:
    """How many collectives a step takes, of how many bytes, and how many buckets leave while the
    backward passes go on; of small buckets."""
    ranks.BUCKET_BYTES = int(float(mib) * 2**20)
    module = net(torch.float32, wide=64)
    model_fn, params = gf.from_module(module, token_loss)
    early: list[int] = []
    sums = ranks.Exchange.sums

    def counted(self: Any) -> list[Tensor]:
        early.append(self.early)
        return sums(self)

    calls: list[int] = []
    all_reduce = dist.all_reduce

    def logged(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(x.numel() * x.element_size())
        return all_reduce(x, *args, **kwargs)

    orders: list[int] = []
    broadcast = dist.broadcast

    def noted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        orders.append(x.numel() * x.element_size())
        return broadcast(x, *args, **kwargs)

    dist.broadcast = noted
    ranks.Exchange.sums, dist.all_reduce = counted, logged  # type: ignore[method-assign]
    ours, val = text(4, dist.get_rank()), text(3, 7)
    gf.ghost_value_and_grad(model_fn, params, ours, val, group=dist.group.WORLD)
    early.clear(), calls.clear(), orders.clear()
    gf.ghost_value_and_grad(model_fn, params, ours, val, group=dist.group.WORLD)
    elements = sum(p.numel() for p in module.parameters())
    return {
        "calls": calls,
        "orders": orders,
        "early": early,
        "model": 4 * elements,
        "tensors": len(params),
    }


def disagreement(kind: str) -> str:
    """What a rank says when rank 1 alone meets something else at the second step."""
    group, rank = dist.group.WORLD, dist.get_rank()
    module = net()
    model_fn, params = gf.from_module(module, token_loss)
    val = text(4, 1)
    options: dict[str, Any] = {}
    gf.ghost_value_and_grad(model_fn, params, text(4, rank), val, group=group)
    ours = text(5, rank)
    if rank == 1:
        match kind:
            case "structure":  # another length, dtype and rank of ids: a new trace, and a proof
                ours = {"ids": text(3, 0, t=9)["ids"].int().long()[:1]}
            case "empty":
                ours = text(0, 0)
            case "invalid":
                ours = {"ids": text(5, 0)["ids"].float()}
            case "backward":
                params = {**params, "up.weight": params["up.weight"] * float("nan")}
            case "interrupt":
                module.norm.register_forward_pre_hook(_interrupt)
            case "reduction":
                options = {"reduction": "sum"}
            case "option":
                options = {"reduction": "none"}
            case "shapes":
                model_fn, params = gf.from_module(net(wide=17), token_loss)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "killed in the backward pass":
                module.norm.register_full_backward_hook(_kill)
            case "held up":
                while not Path(FOLDER[0], "disagreement-0.json").exists():
                    time.sleep(0.1)
                os._exit(0)
            case "ended":
                os._exit(0)
    try:
        gf.ghost_value_and_grad(model_fn, params, ours, val, group=group, **options)
        if kind != "structure":
            return "no error"
        # The group goes on.
        gf.ghost_value_and_grad(model_fn, params, text(4, rank), val, group=group)
    except (gf.GhostError, RuntimeError, KeyboardInterrupt) as error:
        said = f"{type(error).__name__}: {error}"
    else:
        return "right"
    if "killed" in kind or kind in ("held up", "ended"):
        Path(FOLDER[0], f"disagreement-{rank}.json").write_text(json.dumps(said))
        os._exit(1)
    dist.barrier()  # nobody waits in a collective of its own
    return said


def disagreements(*kinds: str) -> dict[str, str]:
    """`disagreement` of several kinds, after each of which the group goes on."""
    return {kind: disagreement(kind) for kind in kinds}


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


FOLDER: list[str] = []


def cast(tree: Any, dtype: str) -> Any:
    to = getattr(torch, dtype)
    return optree.tree_map(lambda x: x.to(to) if x.is_floating_point() else x, tree)


def script(argv: list[str], printed: str) -> None:
    """One process of a group that a script itself makes."""
    said = os.open(printed, os.O_CREAT | os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.argv = argv
    importlib.import_module(Path(argv[0]).stem).main()
    os._exit(0)  # gloo's threads may not have ended


def rank(
    name: str, size: int, folder: str, number: int, args: tuple[Any, ...], seconds: float
) -> None:
    """One process of the group: calls a function of this file, and writes what it returns."""
    said = os.open(f"{folder}/{name}-{number}.err", os.O_CREAT | os.O_WRONLY)
    os.dup2(said, 2)
    FOLDER.append(folder)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{name}-meet",
        rank=number,
        world_size=size,
        timeout=timedelta(seconds=seconds),
    )
    here = globals() if name in globals() else vars(importlib.import_module("trainer_worker"))
    result = here[name](*args)
    Path(folder, f"{name}-{number}.json").write_text(json.dumps(result))
    dist.barrier()
    # gloo's threads may not have ended when the interpreter takes itself apart, which aborts it.
    os._exit(0)
