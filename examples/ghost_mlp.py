"""Which training images help on test images: scores of an MLP's training step on digits.

A fifth of the training labels are wrong. Every step scores its samples by `<g_i, u>`, u the mean
gradient of the clean test images; added up over the steps, wrong labels should have the lowest.

    python examples/ghost_mlp.py
"""

from __future__ import annotations

import argparse


def asked() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    asked()  # before torch is imported: --help and mistakes are answered at once

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import ghostfunc as gf


def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(module(images), labels, reduction="none")


def main() -> None:
    arguments = asked()

    torch.manual_seed(arguments.seed)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    train, val = order[:1500], order[1500:]
    wrong = torch.rand(len(train)) < 0.2
    given = torch.where(
        wrong, (labels[train] + torch.randint(1, 10, wrong.shape)) % 10, labels[train]
    )

    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model_fn, params = gf.from_module(module, loss)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    scores = torch.zeros(len(train))
    for epoch in range(arguments.epochs):
        for at in torch.randperm(len(train)).split(64):
            step = gf.ghost_value_and_grad(
                model_fn, params, (images[train[at]], given[at]), (images[val], labels[val])
            )
            scores[at] += step.dot_prods
            for name, grad in step.grads.items():
                module.get_parameter(name).grad = grad
            optimizer.step()
        auroc = roc_auc_score(wrong, -scores)
        print(
            f"epoch {epoch}: scores tell wrong labels from right ones with an AUROC of {auroc:.2f}"
        )

    batch = images[train[:8]], given[:8]
    print(gf.verify(model_fn, params, batch, (images[val[:4]], labels[val[:4]])))


if __name__ == "__main__":
    main()
