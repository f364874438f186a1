"""What Adam would make of one sample's gradient."""

from __future__ import annotations

from collections.abc import Callable

import optree
from torch import Tensor

from ghostfunc._base.dtypes import wide
from ghostfunc._base.options import check_betas, check_not_negative, check_type, check_whole
from ghostfunc._base.trees import batch_size, flatten_like, flatten_params
from ghostfunc._base.types import PyTree


def adam_scaled(
    exp_avg: PyTree,
    exp_avg_sq: PyTree,
    *,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Callable[[PyTree], PyTree]:
    """From per-sample gradients to the step Adam would take on each, as LESS scores samples.

        m_i = (b1 m + (1 - b1) g_i) / (1 - b1^(t+1))
        v_i = (b2 v + (1 - b2) g_i^2) / (1 - b2^(t+1))
        out_i = m_i / (sqrt(v_i) + eps)

    It is not linear in `g_i`, so it is made of per-sample gradients themselves: pass it to
    `store.project_dataset(transform=...)`, or compute `projection.apply(out)`.

    Args:
        exp_avg, exp_avg_sq: Adam's state `m` and `v`, pytrees like `params`.
        step: number t of steps taken so far.
        betas, eps: Adam's.

    Returns:
        A function from a pytree of `[n, *shape]` to one of the same shapes, float32 or wider.

    Reference:
        Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning", ICML 2024.
    """
    check_whole("step", step, 0)
    check_betas(betas)
    check_not_negative("eps", eps)
    for name, state in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        for x in optree.tree_leaves(state):
            check_type(name, x, Tensor, "a pytree of tensors, like params")
    leaves, spec = flatten_params(exp_avg, "exp_avg")
    flatten_like(exp_avg_sq, leaves, spec, "exp_avg_sq")
    b1, b2 = betas
    correct1, correct2 = 1 - b1 ** (step + 1), 1 - b2 ** (step + 1)

    def scaled(g: Tensor, m: Tensor, v: Tensor) -> Tensor:
        g = wide(g)
        first = (b1 * wide(m) + (1 - b1) * g) / correct1
        second = (b2 * wide(v) + (1 - b2) * g.square()) / correct2
        return first / (second.sqrt() + eps)

    def transform(grads: PyTree) -> PyTree:
        n = batch_size(grads, "grads")
        flatten_like(grads, [m.expand(n, *m.shape) for m in leaves], spec, "grads")
        return optree.tree_map(scaled, grads, exp_avg, exp_avg_sq)

    return transform
