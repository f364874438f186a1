"""Which score tells what a sample did when the optimizer is Adam?

A small classifier is trained with Adam on handwritten digits. After some steps, one step is looked
at: each sample of its batch is left out in turn, the step is taken with the real
`torch.optim.Adam`, and the change of the validation loss is what that sample did. Four scores are
compared with it, by correlation over the samples of the batch:

    SGD                what plain SGD would make of the sample: -lr <g_i, u>
    previous state     through Adam's update, from its moments before the step (one pass)
    exact              through Adam's update, at the gradient of the step itself
    exact, order 2     the same with the curvature of the validation loss

    pip install -e ".[examples]" && python examples/optimizer_aware.py
"""

from __future__ import annotations

import argparse
import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import pearsonr, spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ghostfunc as gf

Batch = tuple[Tensor, Tensor]


def digits(seed: int) -> Batch:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(data.data)[order].double() / 16, torch.tensor(data.target)[order]


def loss(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def real_changes(
    net: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, val: Batch
) -> Tensor:
    """What each sample changed the validation loss by: with it less without it, `[n]`."""
    n = len(batch[1])

    def after(weights: Tensor) -> Tensor:
        twin, twin_optimizer = copy.deepcopy((net, optimizer))
        twin_optimizer.zero_grad()
        (loss(twin, batch) @ weights).backward()
        twin_optimizer.step()
        with torch.no_grad():
            return loss(twin, val).mean()

    everyone = torch.full((n,), 1 / n, dtype=torch.float64)
    return torch.stack(
        [after(everyone) - after(everyone * (torch.arange(n) != i)) for i in range(n)]
    )


def scored(
    net: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, val: Batch, lr: float
) -> dict[str, Tensor]:
    model_fn, params = gf.from_module(net, loss)
    adam = gf.shapley.from_optimizer(optimizer, net)
    asked: dict[str, dict[str, Any]] = {
        "SGD": {"optimizer": gf.shapley.sgd(lr=lr)},
        "previous state": {"optimizer": adam, "form": "previous_state"},
        "exact": {"optimizer": adam},
        "exact, order 2": {"optimizer": adam, "order": 2},
    }
    return {
        name: gf.shapley.step(model_fn, params, batch, {"val": val}, **options).values[:, 0]
        for name, options in asked.items()
    }


def correlations(values: Tensor, truth: Tensor) -> tuple[float, float]:
    """Pearson's and Spearman's; NaN for values that are all the same (Adam's first step, where no
    state tells them apart)."""
    if not bool(values.std() > 0):
        return math.nan, math.nan
    return float(pearsonr(values, truth)[0]), float(spearmanr(values, truth)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 10, 100, 500, 2000])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    rows: dict[int, dict[str, list[tuple[float, float]]]] = {step: {} for step in args.steps}
    forms: dict[int, list[float]] = {step: [] for step in args.steps}
    for seed in range(args.seeds):
        x, y = digits(seed)
        val, x, y = (x[:200], y[:200]), x[200:], y[200:]
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
        for step in range(1, max(args.steps) + 1):
            chosen = torch.randint(len(y), (args.batch_size,))
            batch = x[chosen], y[chosen]
            if step in rows:
                truth = real_changes(net, optimizer, batch, val)
                found = scored(net, optimizer, batch, val, args.lr)
                for name, values in found.items():
                    rows[step].setdefault(name, []).append(correlations(values, truth))
                forms[step].append(correlations(found["previous state"], found["exact"])[0])
            optimizer.zero_grad()
            loss(net, batch).mean().backward()
            optimizer.step()
    print("Correlation with leaving one sample out of a step of Adam")
    print(f"Pearson (Spearman), mean over {args.seeds} seeds")
    names = list(next(iter(rows.values())))
    print(f"{'step':>5}" + "".join(f"{x:>18}" for x in names) + f"{'previous ~ exact':>20}")
    for step, row in rows.items():
        cells = []
        for name in names:
            pearson, spearman = (sum(x) / len(x) for x in zip(*row[name], strict=True))
            cells.append(f"{pearson:.2f} ({spearman:.2f})")
        agree = sum(forms[step]) / len(forms[step])
        print(f"{step:>5}" + "".join(f"{cell:>18}" for cell in cells) + f"{agree:>20.2f}")


if __name__ == "__main__":
    main()
