"""Differentially private SGD on handwritten digits, with the privacy it costs.

Every step draws a Poisson batch, sums the clipped per-sample gradients in one forward and backward
pass, adds Gaussian noise, and divides by the expected batch size. The accountant of `dp-accounting`
turns sampling rate, noise and number of steps into epsilon.

    pip install -e ".[examples]" && python examples/dp_sgd.py
    python examples/dp_sgd.py --epsilon 1 --epochs 20
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass


def asked() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 3.0, 8.0])
    parser.add_argument("--delta", type=float, default=1e-4)
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--batch-size", type=int, default=256, help="expected size")
    parser.add_argument("--max-norm", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    asked()  # before torch is imported: --help and mistakes are answered at once

import dp_accounting
import torch
import torch.nn.functional as F
from dp_accounting.pld import PLDAccountant
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ghostfunc as gf


@dataclass(frozen=True)
class Split:
    """Images `[n, 64]` in [0, 1] and labels `[n]`."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


def digits(seed: int) -> tuple[Split, Split]:
    """Four fifths of the digits for training, one fifth for testing."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    y = torch.tensor(data.target)[order]
    cut = len(y) * 4 // 5
    return Split(x[:cut], y[:cut]), Split(x[cut:], y[cut:])


def classifier(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(module(batch["x"]), batch["y"], reduction="none")


def mechanism(noise: float, rate: float, steps: int) -> dp_accounting.DpEvent:
    """Poisson-sampled Gaussian mechanisms in a row; neighbours have one sample more or less."""
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    return dp_accounting.SelfComposedDpEvent(step, steps)


def epsilon_of(noise: float, rate: float, steps: int, delta: float) -> float:
    """What the steps cost together."""
    return PLDAccountant().compose(mechanism(noise, rate, steps)).get_epsilon(delta)


def noise_for(epsilon: float, rate: float, steps: int, delta: float) -> float:
    """The least noise, in multiples of the clipping norm, that stays within epsilon."""
    return dp_accounting.calibrate_dp_mechanism(
        PLDAccountant,
        lambda noise: mechanism(noise, rate, steps),
        epsilon,
        delta,
        dp_accounting.LowerEndpointAndGuess(0.5, 2.0),
        tol=0.01,
    )


def train(
    train_set: Split, test_set: Split, args: argparse.Namespace, noise: float
) -> tuple[float, float]:
    """Train with the given noise; return test accuracy and the share of samples clipped."""
    module = classifier(args.seed)
    model_fn, params = gf.from_module(module, loss)
    generator = torch.Generator().manual_seed(args.seed + 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=args.lr, momentum=0.9)
    rate = args.batch_size / len(train_set)
    clipped = seen = 0
    for _ in range(steps_of(args, len(train_set))):
        drawn = torch.rand(len(train_set), generator=generator) < rate
        grads = {name: torch.zeros_like(p) for name, p in params.items()}
        if drawn.any():  # an empty batch still gets its noise
            batch = {"x": train_set.x[drawn], "y": train_set.y[drawn]}
            grads, norms = gf.ghost_clipped_grad(model_fn, params, batch, max_norm=args.max_norm)
            clipped += int((norms > args.max_norm).sum())
            seen += len(norms)
        for name, p in module.named_parameters():
            blur = torch.randn(p.shape, generator=generator) * noise * args.max_norm
            p.grad = (grads[name] + blur) / args.batch_size
        optimizer.step()
    with torch.no_grad():
        accuracy = (module(test_set.x).argmax(1) == test_set.y).float().mean()
    return float(accuracy), clipped / seen


def steps_of(args: argparse.Namespace, n: int) -> int:
    return round(args.epochs * n / args.batch_size)


def main() -> None:
    args = asked()

    train_set, test_set = digits(args.seed)
    steps, rate = steps_of(args, len(train_set)), args.batch_size / len(train_set)
    print(
        f"{len(train_set)} digits, {steps} steps, sampling rate {rate:.3f}, "
        f"max_norm {args.max_norm}, delta {args.delta:.0e}"
    )
    print(f"{'epsilon':>10}  {'noise':>7}  {'accuracy':>8}  {'clipped':>7}")
    for target in sorted(args.epsilon):
        noise = noise_for(target, rate, steps, args.delta)
        spent = epsilon_of(noise, rate, steps, args.delta)
        accuracy, share = train(train_set, test_set, args, noise)
        print(f"{spent:>10.3f}  {noise:>7.3f}  {accuracy:>8.1%}  {share:>7.1%}")
    accuracy, share = train(train_set, test_set, args, noise=0.0)
    print(f"{'infinite':>10}  {0:>7.3f}  {accuracy:>8.1%}  {share:>7.1%}")


if __name__ == "__main__":
    main()
