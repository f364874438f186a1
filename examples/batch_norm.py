"""Scores of a small ResNet beside leave-one-out: trained with batch statistics, scored in
evaluation mode.

python examples/batch_norm.py            # three seeds, some minutes
python examples/batch_norm.py --write    # and put the table into docs/batch_norm.md

A sample's score is `-lr / n <g_i, u>`, added up over all steps of the run; u is the gradient of the
mean validation loss. Leave-one-out trains the same network again without the sample, whose share of
the batch statistics leaves with it, and takes the validation loss of both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path


def asked() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    return parser.parse_args()


if __name__ == "__main__":
    asked()  # before torch is imported: --help and mistakes are answered at once

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ghostfunc as gf

PAGE = Path(__file__).resolve().parent.parent / "docs" / "batch_norm.md"
MARK = "<!-- measured -->"
SEEDS, STEPS, LR, WRONG = (0, 1, 2), 20, 0.02, 0.2
N_TRAIN, N_VAL, WIDTH = 32, 64, 8
Batch = dict[str, Tensor]


class Block(nn.Module):
    """Two convolutions around which the input passes."""

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = norm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


def resnet(norm: Callable[[int], nn.Module], width: int = WIDTH) -> nn.Sequential:
    """For images of 8 x 8 in ten classes."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        norm(width),
        nn.ReLU(),
        Block(width, norm),
        nn.AvgPool2d(2),
        Block(width, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BatchNorm2d": nn.BatchNorm2d,
    "GroupNorm": lambda width: nn.GroupNorm(2, width),
}


def loss(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch["image"]), batch["label"], reduction="none")


def digits(seed: int, n: int, m: int) -> tuple[Batch, Batch]:
    """Training digits, some with a wrong label, and others to validate on."""
    data = load_digits()
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.target), generator=g)[: n + m]
    images = torch.tensor(data.images, dtype=torch.float64)[order][:, None] / 16
    labels = torch.tensor(data.target)[order]
    wrong = torch.rand(n, generator=g) < WRONG
    shift = torch.randint(1, 10, (n,), generator=g)
    labels[:n] = torch.where(wrong, (labels[:n] + shift) % 10, labels[:n])
    return tuple({"image": images[s], "label": labels[s]} for s in (slice(n), slice(n, None)))


def states(seed: int, norm: str, train: Batch, steps: int) -> Iterator[nn.Module]:
    """The network before every step of plain gradient descent, and after the last."""
    torch.manual_seed(seed)
    module = resnet(NORMS[norm]).double()  # one sample of 32 is worth a few digits
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    for _ in range(steps):
        yield module
        module.train()
        optimizer.zero_grad()
        loss(module, train).mean().backward()
        optimizer.step()
    yield module


def summed_scores(seed: int, norm: str, train: Batch, val: Batch, steps: int) -> Tensor:
    """`sum over steps of -lr / n <g_i, u>`: negative lowered the validation loss, `[n]`."""
    n = len(train["label"])
    out = torch.zeros(n, dtype=torch.float64)
    fn = None
    for k, module in enumerate(states(seed, norm, train, steps)):
        if k == steps:
            break
        fn = gf.from_module(module, loss)[0] if fn is None else fn
        params = {name: p.detach() for name, p in module.named_parameters()}
        with gf.evaluating(module) if norm == "BatchNorm2d" else nullcontext():
            out -= LR / n * gf.ghost_dot_prod(fn, params, train, val)
    return out


def final_loss(seed: int, norm: str, train: Batch, val: Batch, steps: int) -> float:
    for module in states(seed, norm, train, steps):
        last = module
    with gf.evaluating(last), torch.no_grad():
        return float(loss(last, val).mean())


def left_out(seed: int, norm: str, train: Batch, val: Batch, steps: int) -> Tensor:
    """What every sample changed the final validation loss by, `[n]`, from n more trainings."""
    n = len(train["label"])
    whole = final_loss(seed, norm, train, val, steps)
    without = []
    for i in range(n):
        rest = [j for j in range(n) if j != i]
        others = {k: x[rest] for k, x in train.items()}
        without.append(final_loss(seed, norm, others, val, steps))
    return whole - torch.tensor(without, dtype=torch.float64)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def agreement(seed: int, norm: str, steps: int, n: int = N_TRAIN, m: int = N_VAL) -> float:
    """Spearman's correlation of summed scores and leave-one-out."""
    train, val = digits(seed, n, m)
    scores = summed_scores(seed, norm, train, val, steps)
    return rank_correlation(scores, left_out(seed, norm, train, val, steps))


def table() -> str:
    """Rank correlations, seed by seed."""
    lines = ["| network | steps | " + " | ".join(f"seed {s}" for s in SEEDS) + " | mean |"]
    lines.append("|---|---|" + "---|" * (len(SEEDS) + 1))
    for steps in (1, STEPS):
        for norm in NORMS:
            found = [agreement(seed, norm, steps) for seed in SEEDS]
            cells = " | ".join(f"{x:.2f}" for x in (*found, sum(found) / len(found)))
            lines.append(f"| {norm} | {steps} | {cells} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    args = asked()
    torch.set_num_threads(1)
    found = table()
    if args.write:
        before, _, after = PAGE.read_text(encoding="utf-8").split(MARK)
        PAGE.write_text(f"{before}{MARK}\n\n{found}\n\n{MARK}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
