"""Choosing samples inside the step, where half the labels are wrong and a few clean ones are known.

Half of the training digits were labelled by someone who is always off by one. Fifty digits have
clean labels. Every step draws candidates, scores them by what they would do to the loss on the
clean digits, and steps along the gradient of the chosen ones, which comes out of the same backward
pass. All ways of training get the same number of floating-point operations, scoring included.

    pip install -e ".[examples]" && python examples/greats.py
    python examples/greats.py --seeds 1 --flops 2e9 --figure outputs/greats.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def asked() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wrong", type=float, default=0.5, help="share of wrong labels")
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--chosen", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--flops", type=float, default=1e10)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--figure", type=Path, default=Path("outputs/greats.png"))
    return parser.parse_args()


if __name__ == "__main__":
    asked()  # before torch is imported: --help and mistakes are answered at once

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import ghostfunc as gf

Batch = dict[str, Tensor]
Point = tuple[float, float]
"""Floating-point operations spent, and test accuracy."""

N_TEST, N_CLEAN = 500, 50


@dataclass(frozen=True)
class Data:
    """Training digits with wrong labels among them, a few clean ones, and the test set."""

    train: Batch
    clean: Batch
    test: Batch


def digits(wrong: float, seed: int) -> Data:
    data = load_digits()
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.target), generator=g)
    x = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    y = torch.tensor(data.target)[order]
    parts = [
        {"x": a, "y": b}
        for a, b in zip(
            x.split([N_TEST, N_CLEAN, len(y) - N_TEST - N_CLEAN]),
            y.split([N_TEST, N_CLEAN, len(y) - N_TEST - N_CLEAN]),
            strict=True,
        )
    ]
    test, clean, train = parts
    off = torch.rand(len(train["y"]), generator=g) < wrong
    train = {"x": train["x"], "y": torch.where(off, (train["y"] + 1) % 10, train["y"])}
    return Data(train, clean, test)


def loss(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch["x"]), batch["y"], reduction="none")


class Trainer:
    """One model in training, whatever way its batches are chosen.

    Attributes:
        k, n: samples in an update, and candidates for it.
    """

    def __init__(self, data: Data, args: argparse.Namespace, seed: int) -> None:
        torch.manual_seed(seed)
        self.data, self.k, self.n = data, args.chosen, args.candidates
        self.module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.model_fn, self.params = gf.from_module(self.module, loss)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=args.lr)
        self.generator = torch.Generator().manual_seed(seed + 1)

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def draw(self, source: Batch, size: int) -> Batch:
        index = torch.randint(len(source["y"]), (size,), generator=self.generator)
        return {name: x[index] for name, x in source.items()}

    def step(self, grads: dict[str, Tensor]) -> None:
        for name, p in self.module.named_parameters():
            p.grad = grads[name]
        self.optimizer.step()

    # --- ways to choose ------------------------------------------------------------------------

    def uniform(self, source: Batch) -> None:
        """A plain step on k samples."""
        self.optimizer.zero_grad()
        loss(self.module, self.draw(source, self.k)).mean().backward()
        self.optimizer.step()

    def scored(self, choose: Callable[[Tensor, gf.FactoredGrads], Tensor]) -> None:
        """A step on the k of n candidates that `choose` takes: one backward pass over them."""
        book = gf.factored_grads(self.model_fn, self.params, self.draw(self.data.train, self.n))
        u = gf.direction(self.model_fn, self.params, self.data.clean)
        chosen = choose(book.dot_prods(u), book)
        self.step(book.weighted_sum(gf.select.uniform_weights(chosen, self.n)))

    def greats(self) -> None:
        # The smallest step is above zero where the learning rate has come down to it.
        step = max(self.lr, 1e-6) / self.k
        self.scored(lambda dots, book: gf.select.greats(dots, book.gram(), self.k, step=step))

    def top_k(self) -> None:
        self.scored(lambda dots, _: gf.select.top_k(dots, self.k))


def mixed(a: Batch, b: Batch) -> Batch:
    return {name: torch.cat([a[name], b[name]]) for name in a}


WAYS: dict[str, Callable[[Trainer], None]] = {
    "uniform": lambda t: t.uniform(t.data.train),
    "uniform, clean ones included": lambda t: t.uniform(mixed(t.data.train, t.data.clean)),
    "clean ones alone": lambda t: t.uniform(t.data.clean),
    "highest dot products": Trainer.top_k,
    "GREATS": Trainer.greats,
}


class Flops(TorchDispatchMode):
    """Counts the operations of products. (torch's FlopCounterMode puts hooks on modules.)"""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            formula = flop_registry[func.overloadpacket]
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops_of(way: Callable[[Trainer], None], data: Data, args: argparse.Namespace) -> int:
    """Operations of one step, counted as they are carried out."""
    trainer = Trainer(data, args, seed=0)
    way(trainer)  # tracing happens once
    with Flops() as counter:
        way(trainer)
    return counter.total


def train(way: Callable[[Trainer], None], args: argparse.Namespace, seed: int) -> list[Point]:
    """Train until the operations are spent, the learning rate falling to zero along with them."""
    data = digits(args.wrong, seed)
    trainer = Trainer(data, args, seed)
    each = flops_of(way, data, args)
    steps = int(args.flops / each)
    curve = []
    for i in range(steps):
        trainer.optimizer.param_groups[0]["lr"] = args.lr * (1 - i / steps)
        way(trainer)
        if (i + 1) % max(1, steps // 50) == 0:
            with torch.no_grad():
                hits = trainer.module(data.test["x"]).argmax(1) == data.test["y"]
            curve.append(((i + 1) * each, float(hits.float().mean())))
    return curve


def plot(curves: dict[str, list[list[Point]]], args: argparse.Namespace) -> None:
    mpl.use("Agg")
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, runs in curves.items():
        spent = [x for x, _ in runs[0]]
        accuracy = torch.tensor([[y for _, y in run] for run in runs])
        (line,) = axes.plot(spent, accuracy.mean(0), label=name)
        axes.fill_between(
            spent, accuracy.amin(0), accuracy.amax(0), color=line.get_color(), alpha=0.15, lw=0
        )
    axes.set(
        xlabel="floating-point operations, choosing included",
        ylabel="test accuracy",
        title=f"{args.wrong:.0%} of the labels off by one, {N_CLEAN} clean samples",
        xlim=(0, args.flops),
        ylim=(0, 1),
    )
    axes.legend(loc="lower right", fontsize="small")
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure, dpi=120)


def main() -> None:
    args = asked()
    torch.set_num_threads(1)

    print(f"{'':<29} {'steps':>6}  {'accuracy':>8}  (mean and range over {args.seeds} seeds)")
    curves = {}
    for name, way in WAYS.items():
        curves[name] = [train(way, args, seed) for seed in range(args.seeds)]
        last = torch.tensor([run[-1][1] for run in curves[name]])
        steps = int(args.flops / flops_of(way, digits(args.wrong, 0), args))
        print(f"{name:<29} {steps:>6}  {last.mean():>8.1%}  {last.min():.1%} to {last.max():.1%}")
    plot(curves, args)
    print(f"curves: {args.figure}")


if __name__ == "__main__":
    main()
