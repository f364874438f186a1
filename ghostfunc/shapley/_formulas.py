"""Steps of `torch.optim` as formulas: what each adds to a parameter, given settings and state.

`g` is the gradient with weight decay added, `p` the parameter, everything else the state before the
step. Where the running size of the gradient is zero no gradient was ever other than zero, and the
formula has no derivative, or one as large as 1 / eps: such an entry counts as not moved by the
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

Change: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`change(g, p)`: what the step adds."""

Settings: TypeAlias = Mapping[str, Any]


def over_root(m: Tensor, v: Tensor, eps: float, scale: float = 1.0) -> Tensor:
    """`m / (scale sqrt(v) + eps)`."""
    met = v != 0
    root = torch.where(met, v, 1.0).sqrt()
    return torch.where(met, m / (scale * root + eps), (m / eps).detach())


def kept(state: Settings, key: str, p: Tensor) -> Tensor:
    """A tensor of the state, zeros before the first step."""
    held: Tensor | None = state.get(key)
    return torch.zeros_like(p) if held is None else held


def steps(state: Settings) -> int:
    """The number of the step that comes next."""
    return int(state.get("step", 0)) + 1


def mixed(old: Tensor, new: Tensor, share: float) -> Tensor:
    """A running mean, of which the new value is a share."""
    return old + share * (new - old)


def rmsprop(group: Settings, state: Settings) -> Change:
    """v = a v + (1 - a) g^2, minus the square of the mean if centered; g / (sqrt(v) + eps)."""
    new = 1 - group["alpha"]

    def change(g: Tensor, p: Tensor) -> Tensor:
        v = mixed(kept(state, "square_avg", p), g.square(), new)
        if group["centered"]:
            v = v - mixed(kept(state, "grad_avg", p), g, new).square()
        out = over_root(g, v, group["eps"])
        if group["momentum"]:
            out = group["momentum"] * kept(state, "momentum_buffer", p) + out
        return -float(group["lr"]) * out

    return change


def adagrad(group: Settings, state: Settings) -> Change:
    """s = s + g^2;  g / (sqrt(s) + eps), at a rate that falls as 1 / (1 + (t - 1) decay)."""
    lr = float(group["lr"]) / (1 + (steps(state) - 1) * group["lr_decay"])

    def change(g: Tensor, p: Tensor) -> Tensor:
        return -lr * over_root(g, kept(state, "sum", p) + g.square(), group["eps"])

    return change


def adadelta(group: Settings, state: Settings) -> Change:
    """v = r v + (1 - r) g^2;  g sqrt(d + eps) / sqrt(v + eps), d the mean of squared changes."""
    eps = group["eps"]

    def change(g: Tensor, p: Tensor) -> Tensor:
        v = mixed(kept(state, "square_avg", p), g.square(), 1 - group["rho"])
        sizes = (kept(state, "acc_delta", p) + eps).sqrt()
        return -float(group["lr"]) * g * sizes / (v + eps).sqrt()

    return change


def adamax(group: Settings, state: Settings) -> Change:
    """u = max(b2 u, |g| + eps);  m / u / (1 - b1^t)."""
    b1, b2 = group["betas"]
    lr = float(group["lr"]) / (1 - b1 ** steps(state))

    def change(g: Tensor, p: Tensor) -> Tensor:
        m = mixed(kept(state, "exp_avg", p), g, 1 - b1)
        u = torch.maximum(b2 * kept(state, "exp_inf", p), g.abs() + group["eps"])
        return -lr * torch.where(u != group["eps"], m / u, (m / u).detach())

    return change


def nadam(group: Settings, state: Settings) -> Change:
    """Adam with Nesterov's momentum, whose coefficients mu_t change with the step."""
    (b1, b2), t, lr = group["betas"], steps(state), float(group["lr"])
    mu, following = (
        b1 * (1 - 0.5 * 0.96 ** (s * group["momentum_decay"])) for s in (float(t), float(t + 1))
    )
    product = float(
        state.get("mu_product", torch.ones((), device="cpu")) * mu
    )  # torch's own is in float32
    of_g = lr * (1 - mu) / (1 - product)
    of_m = lr * following / (1 - product * following)

    def change(g: Tensor, p: Tensor) -> Tensor:
        m = mixed(kept(state, "exp_avg", p), g, 1 - b1)
        v = mixed(kept(state, "exp_avg_sq", p), g.square(), 1 - b2)
        return -over_root(of_g * g + of_m * m, v, group["eps"], (1 - b2**t) ** -0.5)

    return change


def radam(group: Settings, state: Settings) -> Change:
    """Adam once the variance of its denominator is known well enough, momentum alone before."""
    (b1, b2), t = group["betas"], steps(state)
    lr = float(group["lr"]) / (1 - b1**t)
    most = 2 / (1 - b2) - 1
    known = most - 2 * t * b2**t / (1 - b2**t)
    adapted = known > 5
    if adapted:
        share = (known - 4) * (known - 2) * most / ((most - 4) * (most - 2) * known)
        lr *= (share * (1 - b2**t)) ** 0.5

    def change(g: Tensor, p: Tensor) -> Tensor:
        m = mixed(kept(state, "exp_avg", p), g, 1 - b1)
        if not adapted:
            return -lr * m
        v = mixed(kept(state, "exp_avg_sq", p), g.square(), 1 - b2)
        return -lr * over_root(m, v, group["eps"])

    return change


def adafactor(group: Settings, state: Settings) -> Change:
    """g over the root of a mean of its squares that has rank one, no longer than `d`."""
    t, lr = float(steps(state)), float(group["lr"])
    share = t ** group["beta2_decay"]
    first, second = group["eps"]

    def change(g: Tensor, p: Tensor) -> Tensor:
        tiny = torch.finfo(p.dtype).eps if first is None else first
        squares = g.square()
        if g.ndim > 1:
            rows, columns = squares.mean(-1, keepdim=True), squares.mean(-2, keepdim=True)
            r = mixed(kept(state, "row_var", rows), rows, share)
            v = r @ mixed(kept(state, "col_var", columns), columns, share)
            v = v / r.mean(-2, keepdim=True).clamp(min=tiny)
        else:
            v = mixed(kept(state, "variance", squares), squares, share)
        out = g * v.clamp(min=tiny * tiny).rsqrt()
        out = torch.where(v != 0, out, out.detach())
        length = (out.square().mean() / group["d"] ** 2).clamp(min=1.0).sqrt()
        size = (p.detach().square().mean().sqrt()).clamp(min=second)
        return -size * min(lr, t**-0.5) * out / length

    return change


def muon(group: Settings, state: Settings) -> Change:
    """The momentum with its singular values taken near one, by a polynomial. torch computes that in
    bfloat16: so is the step here, and its derivative is that of the polynomial unrounded."""
    momentum = group["momentum"]

    def change(g: Tensor, p: Tensor) -> Tensor:
        m = mixed(kept(state, "momentum_buffer", p), g, 1 - momentum)
        m = mixed(g, m, momentum) if group["nesterov"] else m
        long = m if m.shape[0] <= m.shape[1] else m.mT
        exact = _near_orthogonal(long, group)
        rounded = _near_orthogonal(long.detach().bfloat16(), group)
        out = exact + (rounded - exact).detach()
        out = torch.where((m != 0).any(), out, out.detach())
        out = out if m.shape[0] <= m.shape[1] else out.mT
        return -float(group["lr"]) * _share_of_rate(group["adjust_lr_fn"], p) * out

    return change


def _near_orthogonal(x: Tensor, group: Settings) -> Tensor:
    a, b, c = group["ns_coefficients"]
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _share_of_rate(name: str | None, p: Tensor) -> float:
    rows, columns = p.shape
    if name is None or name == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns)) if name == "match_rms_adamw" else 1.0


_MUON = vars(torch.optim).get("Muon")  # from torch 2.9 on

FORMULAS: dict[type[torch.optim.Optimizer], Callable[[Settings, Settings], Change]] = {
    torch.optim.RMSprop: rmsprop,
    torch.optim.Adagrad: adagrad,
    torch.optim.Adadelta: adadelta,
    torch.optim.Adamax: adamax,
    torch.optim.NAdam: nadam,
    torch.optim.RAdam: radam,
    torch.optim.Adafactor: adafactor,
    **({} if _MUON is None else {_MUON: muon}),
}

DECOUPLED = (torch.optim.Adafactor, _MUON)
"""Optimizers whose weight decay never passes through the state."""
