"""Finding mislabelled digits by what they did in training.

A tenth of the training labels of scikit-learn's handwritten digits are flipped to another class. A
small classifier is trained on all of them while four scores per sample are summed over the steps:

    dot               <g_i, u>, u the gradient of a small clean validation batch (what
                      gf.shapley sums, without the learning rate)
    cosine            the cosine of the two
    self-influence    the squared norm of g_i (TracIn's)
    loss              the sample's loss: the baseline that needs no gradient

Then every sample is ranked by each. AUROC is the chance that a flipped sample is ranked before
a clean one. Three seeds; no setting was tuned on the result.

    pip install -e ".[examples]" && python examples/mislabelled_digits.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass


def asked() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.1, help="of labels flipped")
    parser.add_argument("--val-size", type=int, default=100)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.1)
    return parser.parse_args()


if __name__ == "__main__":
    asked()  # before torch is imported: --help and mistakes are answered at once

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import ghostfunc as gf


@dataclass(frozen=True)
class Data:
    """Training digits with some wrong labels, and a clean validation set."""

    x: Tensor
    y: Tensor
    flipped: Tensor
    val: tuple[Tensor, Tensor]


def digits(seed: int, share: float, val_size: int) -> Data:
    data = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.target), generator=generator)
    x = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    y = torch.tensor(data.target)[order]
    val, x, y = (x[:val_size], y[:val_size]), x[val_size:], y[val_size:]
    flipped = torch.zeros(len(y), dtype=torch.bool)
    flipped[torch.randperm(len(y), generator=generator)[: round(share * len(y))]] = True
    other = (y + torch.randint(1, 10, y.shape, generator=generator)) % 10
    return Data(x, torch.where(flipped, other, y), flipped, val)


def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def scores(data: Data, seed: int, args: argparse.Namespace) -> dict[str, Tensor]:
    """Every sample's scores, summed over training; the higher, the more suspicious."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model_fn, params = gf.from_module(net, loss)
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr)
    names = ("dot", "cosine", "self-influence", "loss")
    state = gf.shapley.init(len(names))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(args.epochs):
        for rows in torch.randperm(len(data.y), generator=generator).split(args.batch_size):
            batch = data.x[rows], data.y[rows]
            u = gf.direction(model_fn, params, data.val)
            read = {"dot": gf.Dot(u), "square": gf.SqNorm()}
            out = gf.ghost_vjp(model_fn, params, batch, read, grads=True)
            dots, squares = (sum(out.values[name].values()) for name in ("dot", "square"))
            length = sum(x.square().sum() for x in u.values()).sqrt()
            cosines = dots / (squares.sqrt() * length).clamp(min=1e-12)
            columns = [-dots, -cosines, squares, out.losses]
            state = gf.shapley.update(state, rows, torch.stack(columns, dim=1))
            optimizer.zero_grad()
            gf.accumulate_grads(net, out.grads, weight=1 / len(rows))
            optimizer.step()
    return dict(zip(names, gf.shapley.finalize(state).values.T, strict=True))


def main() -> None:
    args = asked()
    lengths, names = args.epochs, ("dot", "cosine", "self-influence", "loss")
    print("AUROC of finding flipped labels, mean over seeds (lowest to highest)")
    print(f"{'epochs':>6}" + "".join(f"{name:>24}" for name in names))
    for args.epochs in lengths:
        found: dict[str, list[float]] = {name: [] for name in names}
        for seed in range(args.seeds):
            data = digits(seed, args.share, args.val_size)
            for name, score in scores(data, seed, args).items():
                found[name].append(float(roc_auc_score(data.flipped, score)))
        cells = (f"{sum(x) / len(x):.3f} ({min(x):.3f}-{max(x):.3f})" for x in found.values())
        print(f"{args.epochs:>6}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    main()
