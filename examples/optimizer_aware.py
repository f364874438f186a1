"""Which score tells what a sample did when the optimizer is Adam?

Two small models are trained with Adam: a classifier of handwritten digits, and a byte-level
transformer on the documentation that every Python carries. After some steps, one step is looked at:
each sample of its batch is left out in turn, the step is taken with the real `torch.optim.Adam`,
and the change of the validation loss is what that sample did. Four scores are compared with it, by
correlation over the samples of the batch:

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
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any, NamedTuple

TASK_NAMES = ("digits", "text")


def asked() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASK_NAMES, default=list(TASK_NAMES))
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 10, 100, 500])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args()


if __name__ == "__main__":
    asked()  # before torch is imported: --help and mistakes are answered at once

import torch
import torch.nn.functional as F
from scipy.stats import pearsonr, spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ghostfunc as gf

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
Scores = dict[str, Tensor]


class Task(NamedTuple):
    """A model, its loss per sample, training data and a validation batch."""

    net: nn.Module
    loss: Loss
    train: Batch
    val: Batch


class Reader(nn.Module):
    """A one-layer transformer over bytes."""

    def __init__(self, width: int = 32, heads: int = 4, length: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.bytes, self.places = nn.Embedding(128, width), nn.Embedding(length, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.head = nn.Linear(width, 128)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.bytes(ids) + self.places(torch.arange(ids.shape[1]))
        parts = self.qkv(self.norms[0](x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norms[2](x))


def classified(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def predicted(module: nn.Module, batch: Batch) -> Tensor:
    """Each sample's mean over its positions."""
    logits = module(batch[0])
    losses = F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), reduction="none")
    return losses.view(batch[1].shape).mean(1)


def digits(seed: int) -> Task:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(data.data)[order].double() / 16, torch.tensor(data.target)[order]
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    return Task(net, classified, (x[200:], y[200:]), (x[:200], y[:200]))


def text(seed: int) -> Task:
    joined = "".join(topics[key] for key in sorted(topics)).encode("ascii", "ignore")
    chunks = torch.tensor(list(joined)).unfold(0, 33, 33)
    chunks = chunks[torch.randperm(len(chunks), generator=torch.Generator().manual_seed(seed))]
    x, y = chunks[:, :-1], chunks[:, 1:]
    return Task(Reader(), predicted, (x[64:], y[64:]), (x[:64], y[:64]))


TASKS = dict(zip(TASK_NAMES, (digits, text), strict=True))


def real_changes(task: Task, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    """What each sample changed the validation loss by: with it less without it, `[n]`."""
    net, loss, _, val = task
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


def scored(task: Task, optimizer: torch.optim.Optimizer, batch: Batch, lr: float) -> Scores:
    net, loss, _, val = task
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


def compare(name: str, args: argparse.Namespace) -> None:
    """Train, look at some steps, and print a table."""
    rows: dict[int, dict[str, list[tuple[float, float]]]] = {step: {} for step in args.steps}
    forms: dict[int, list[float]] = {step: [] for step in args.steps}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        task = TASKS[name](seed)
        (x, y), net = task.train, task.net
        optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
        for step in range(1, max(args.steps) + 1):
            chosen = torch.randint(len(y), (args.batch_size,))
            batch = x[chosen], y[chosen]
            if step in rows:
                truth = real_changes(task, optimizer, batch)
                found = scored(task, optimizer, batch, args.lr)
                for form, values in found.items():
                    rows[step].setdefault(form, []).append(correlations(values, truth))
                forms[step].append(correlations(found["previous state"], found["exact"])[0])
            optimizer.zero_grad()
            task.loss(net, batch).mean().backward()
            optimizer.step()
    print(f"\n{name}: Pearson (Spearman), mean over {args.seeds} seeds")
    names = list(next(iter(rows.values())))
    print(f"{'step':>5}" + "".join(f"{x:>18}" for x in names) + f"{'previous ~ exact':>20}")
    for step, row in rows.items():
        cells = []
        for form in names:
            pearson, spearman = (sum(x) / len(x) for x in zip(*row[form], strict=True))
            cells.append(f"{pearson:.2f} ({spearman:.2f})")
        agree = sum(forms[step]) / len(forms[step])
        print(f"{step:>5}" + "".join(f"{cell:>18}" for cell in cells) + f"{agree:>20.2f}")


def main() -> None:
    args = asked()
    torch.set_default_dtype(torch.float64)
    print("Correlation with leaving one sample out of a step of Adam")
    for name in args.tasks:
        compare(name, args)


if __name__ == "__main__":
    main()
