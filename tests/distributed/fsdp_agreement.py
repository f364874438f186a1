"""One rank of several whose batches, programs and fates differ."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ghostfunc as gf


class Net(nn.Module):
    """Goes another way for samples whose first entry is large, and through a unit once more for
    those whose first entry is larger."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.other = nn.Linear(5, 5)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if float(x[..., 0].max()) > 100:
            h = torch.relu(h) * 2
        if float(x[..., 0].max()) > 10000:
            h = self.other(h)
        out: Tensor = self.last(self.other(h))
        return out


def loss(module: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = module(batch).flatten(1).square().mean(1)
    return out


def outcome(call: Callable[[], Any]) -> str:
    try:
        call()
    except gf.GhostError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refused_on_one_rank(
    model_fn: Any, params: Any, plain: Tensor, last: bool, right: Callable[[Tensor], float]
) -> dict[str, Any]:
    """What every public function says when one rank alone gives it a batch without samples, whether
    the ranks' next call is right, and the same of other arguments."""
    shapes = gf.distributed.whole_shapes(model_fn, params)
    projection = gf.kronecker_projection(shapes, rank_total=4, rank_min=1, kind="dense", seed=0)
    sgd = gf.shapley.sgd(lr=0.1)
    u = gf.direction(model_fn, params, plain)
    kept = gf.factored_grads(model_fn, params, plain)
    own, weights = plain[: 0 if last else 4], torch.ones(3 if last else 4)
    calls: dict[str, Callable[..., Any]] = {
        "ghost_dot_prod": lambda fn, p: gf.ghost_dot_prod(fn, p, own, plain),
        "ghost_dot_prod, val": lambda fn, p: gf.ghost_dot_prod(fn, p, plain, own),
        "ghost_dot_prod, chunks": lambda fn, p: gf.ghost_dot_prod(
            fn, p, own, direction=u, chunk_size=2
        ),
        "ghost_value_and_grad": lambda fn, p: gf.ghost_value_and_grad(fn, p, own, plain),
        "ghost_cosine": lambda fn, p: gf.ghost_cosine(fn, p, own, plain),
        "direction": lambda fn, p: gf.direction(fn, p, own),
        "ghost_norm": lambda fn, p: gf.ghost_norm(fn, p, own),
        "ghost_gram": lambda fn, p: gf.ghost_gram(fn, p, own),
        "ghost_clipped_grad": lambda fn, p: gf.ghost_clipped_grad(fn, p, own, max_norm=1.0),
        "ghost_project": lambda fn, p: gf.ghost_project(fn, p, own, projection),
        "ghost_vjp": lambda fn, p: gf.ghost_vjp(fn, p, own, gf.SqNorm()),
        "factored_grads": lambda fn, p: gf.factored_grads(fn, p, own),
        "per_sample_grads": lambda fn, p: gf.per_sample_grads(fn, p, own, mode="ghost"),
        "step": lambda fn, p: gf.shapley.step(fn, p, own, {"a": plain}, optimizer=sgd),
        "step, val": lambda fn, p: gf.shapley.step(fn, p, plain, {"a": own}, optimizer=sgd),
        "directions": lambda fn, p: gf.shapley.directions(fn, p, {"a": own}, optimizer=sgd),
        "whole": lambda fn, p: gf.distributed.whole(fn, p, {} if last else u),
        "weighted_sum": lambda fn, p: kept.weighted_sum(weights),
        "dot_prods": lambda fn, p: kept.dot_prods({} if last else u),
    }
    return {
        f"refused: {name}": [outcome(lambda call=call: call(model_fn, params)), right(plain)]
        for name, call in calls.items()
    }


class Heads(nn.Module):
    """Takes what a plan has cut for `heads` heads."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.up, self.down = nn.LayerNorm(3), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.softmax(self.up(self.norm(x)).view(len(x), self.heads, -1), -1)
        out: Tensor = self.down(parts.flatten(1))
        return out


def planned(mesh: Any, plain: Tensor, last: bool) -> dict[str, str]:
    """What is said of a tensor parallel plan whose ranks differ, or whose code knows of it."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    def make(heads: int) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            net = Heads(2)
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(net, mesh, plan)
        net.heads = heads
        return net

    # The module's own forward pass has one head on a rank of two, at whole parameters it has two.
    reckons = gf.from_module(make(1), loss)
    found = {"its code knows of the plan": outcome(lambda: gf.ghost_norm(*reckons, plain))}
    other = make(1)
    other.norm.bias.data += last
    other_fn = gf.from_module(other, loss)
    found["other replicated weights"] = outcome(lambda: gf.ghost_norm(*other_fn, plain))

    def flat(module: nn.Module, batch: Tensor) -> Tensor:
        out: Tensor = module.down(torch.tanh(module.up(module.norm(batch)))).square().mean(1)
        return out

    fn, params = gf.from_module(make(1), flat)
    found["one batch"] = outcome(lambda: gf.ghost_norm(fn, params, plain))
    found["two batches"] = outcome(lambda: gf.ghost_norm(fn, params, plain + last))
    found["two validation batches"] = outcome(lambda: gf.direction(fn, params, plain + last))
    kept = gf.factored_grads(fn, params, plain)
    found["two weights"] = outcome(lambda: kept.weighted_sum(torch.ones(4) * (1 + last)))
    found["random numbers"] = outcome(
        lambda: gf.ghost_norm(fn, params, plain, randomness="different")
    )
    return found


def validation_samples_in_one_run(mesh: Any, plain: Tensor, last: bool) -> dict[str, Any]:
    """Scores with validation samples that share a run: few, which all ranks compute, and many, of
    which each computes its own. Where one rank differs they may not."""
    from torch.distributed.fsdp import fully_shard

    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    whole_fn, whole = gf.from_module(copy.deepcopy(net), loss)
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    model_fn, params = gf.from_module(net, loss)

    def right(*vals: Tensor, train: Tensor = plain) -> float:
        own = gf.ghost_dot_prod(model_fn, params, train, vals[last]).flatten()
        sums = [gf.direction(whole_fn, whole, val, reduction="sum") for val in vals]
        m = sum(map(len, vals))
        u = {name: sum(x[name] for x in sums) / m for name in whole}
        one = gf.ghost_dot_prod(whole_fn, whole, plain, direction=u)
        return float(((own - one) / one).abs().max())

    def scores(train: Tensor, val: Tensor) -> Any:
        return gf.ghost_dot_prod(model_fn, params, train, val)

    one, two, longer = plain[:1], plain[1:3], plain[:2, None]
    bad, many = one * torch.nan, torch.cat([plain, 2 * plain, -plain])
    return {
        "few": right(one, two),
        "few, of another length on one rank": right(one, longer),
        "few, more of them on one rank": right(one, plain),
        "few on one rank": outcome(
            lambda: gf.ghost_norm(model_fn, params, plain) if last else scores(plain, one)
        ),
        "few, none on one rank": outcome(lambda: scores(plain, one[: 1 - last])),
        "few, a bad one": outcome(lambda: scores(plain, bad if last else two)),
        "few, after the errors": right(one, two),
        "many": right(one, many),
        "many, of another length on one rank": right(
            one, many[:, None], train=plain[:, None] if last else plain
        ),
        "many, a bad one": outcome(lambda: scores(plain, many * torch.nan if last else one)),
        "many, after the errors": right(one, many),
    }


def main() -> None:
    rank, world, directory, what = (
        int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4],
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=world,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    net = Net()
    whole_fn, whole = gf.from_module(copy.deepcopy(net), loss)
    for layer in (net.first, net.other):
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    model_fn, params = gf.from_module(net, loss)
    plain = torch.randn(4, 3)
    longer = torch.randn(4, 2, 3)
    elsewhere = plain.clone()
    elsewhere[:, 0] = 1000
    further = plain.clone()
    further[:, 0] = 1e5
    bad = plain.clone()
    bad[1] = torch.nan
    found: dict[str, Any] = {}

    def right(batch: Tensor) -> float:
        ours, one = gf.ghost_norm(model_fn, params, batch), gf.ghost_norm(whole_fn, whole, batch)
        return float(((ours - one) / one).abs().max())

    if what == "differ":
        last = rank == world - 1
        found["plain"] = right(plain)
        found["a structure that is new on one rank"] = right(longer if last else plain)
        found["another way on one rank"] = right(elsewhere if last else plain)
        found["the same once more"] = right(elsewhere if last else plain)
        found["a unit more on one rank"] = outcome(lambda: right(further if last else plain))
        found["after a unit more"] = right(plain)
        found["an error on one rank"] = outcome(lambda: right(bad if last else plain))
        found["after the error"] = right(plain)
        found["other calls"] = outcome(
            lambda: (
                gf.ghost_norm(model_fn, params, plain)
                if last
                else gf.direction(model_fn, params, plain)
            )
        )
        found["after other calls"] = right(plain)
        found |= validation_samples_in_one_run(mesh, plain, last)
        found["planned"] = planned(mesh, plain, last)
        found |= refused_on_one_rank(model_fn, params, plain, last, right)
        found["a wrapped function"] = outcome(
            lambda: gf.ghost_norm(lambda p, b: model_fn(p, b), params, plain)
        )
        found["by itself"] = outcome(lambda: model_fn(params, plain))
        found["other modes"] = outcome(
            lambda: gf.ghost_dot_prod(model_fn, params, plain, plain, mode="materialized")
        )
        found["verify"] = outcome(lambda: gf.verify(model_fn, params, plain, plain))
        found["whole params"] = outcome(lambda: gf.ghost_norm(model_fn, whole, plain))
    else:
        right(plain)
        if rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        found["killed"] = outcome(lambda: right(plain))
    (directory / f"{rank}.json").write_text(json.dumps(found))
    if what == "differ":
        torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may abort a process that lost its peers


if __name__ == "__main__":
    main()
