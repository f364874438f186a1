"""The adjoint of one training step.

A step is `G = sum_i s_i g_i(theta)`, `(theta', state') = optimizer(G, state, theta)`. Given the
derivative `lambda'` of a final loss L by `(theta', state')`, the pullback of the optimizer has

    u = dL/dG,    dL/dstate,    and the direct part of dL/dtheta

and the gradient adds to it through theta, `sum_i s_i H_i u`. By a sample's share, `dL/ds_i` is
`<g_i, u>`. Both are derivatives of one number: `sum_i s_i <g_i(theta), u>` by theta and by s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ghostfunc._base.definition import ReverseModeConstants
from ghostfunc._base.errors import TransformError
from ghostfunc._base.locks import FORWARD_MODE
from ghostfunc._base.torch_private import unrounded
from ghostfunc.unrolled._training import State, Training

Hvp: TypeAlias = Literal["forward", "reverse"]


class Adjoint(NamedTuple):
    """`dL/dtheta` and `dL/dstate` of several losses L, `[q, *shape]` each; flat."""

    params: list[Tensor]
    slots: list[Tensor]


def step_back(
    training: Training,
    state: State,
    gradient: Sequence[Tensor],
    step: int,
    after: Adjoint,
    hvp: Hvp,
    vectorize: bool,
) -> tuple[Adjoint, list[Tensor]]:
    """The adjoint before a step, and `dL/ds_i` of its samples, `[n, q]` per micro-batch."""
    inputs = [list(gradient), list(state.slots), list(state.params)]

    def update(g: list[Tensor], slots: list[Tensor], params: list[Tensor]) -> tuple[Any, Any]:
        return training.optimizer.update(g, slots, params, step)

    pullback: Any = torch.func.vjp(update, *inputs)[1]

    def through_optimizer(*flat: Tensor) -> tuple[Tensor, ...]:
        p = len(after.params)
        u, slots, params = pullback((list(flat[:p]), list(flat[p:])))
        return (*u, *slots, *params)

    q = len(after.params[0])
    flat = _mapped(through_optimizer, [*after.params, *after.slots], q, vectorize)
    counts = [len(x) for x in inputs]
    u, slots, params = (
        flat[: counts[0]],
        flat[counts[0] : counts[0] + counts[1]],
        flat[counts[0] + counts[1] :],
    )
    micros = training.micros(step)
    dots = []
    for place, (micro, share) in enumerate(zip(micros, training.shares(micros), strict=True)):

        def losses(p: Sequence[Tensor], micro: Any = micro, place: int = place) -> Tensor:
            return training.losses(p, micro, step, place)

        second = _second_order(losses, state.params, share, hvp)
        found = _mapped(second, u, q, vectorize)
        dots.append(found[0].mT)
        params = [x + y for x, y in zip(params, found[1:], strict=True)]
    return Adjoint(params, slots), dots


def _second_order(
    losses: Callable[[Sequence[Tensor]], Tensor],
    params: Sequence[Tensor],
    share: Tensor,
    hvp: Hvp,
) -> Callable[..., tuple[Tensor, ...]]:
    """`u -> (<g_i, u> [n], sum_i s_i H_i u)`."""
    primals = [x.detach() for x in params]

    def forward(*u: Tensor) -> tuple[Tensor, ...]:
        # Forward over reverse: torch's forward derivatives of layer_norm and instance_norm have a
        # wrong derivative themselves.
        def first(p: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            values, pull = torch.func.vjp(losses, p)[:2]
            with unrounded(values):
                return values, pull(share.to(values))[0]

        dots, products = torch.func.jvp(first, (primals,), (list(u),))[1]
        return (dots, *products)

    def reverse(*u: Tensor) -> tuple[Tensor, ...]:
        def along(p: list[Tensor], s: Tensor) -> Tensor:
            values, pull = torch.func.vjp(losses, p)[:2]
            with unrounded(values):
                (grads,) = pull(s.to(values))
            return torch.stack([(g * x).sum() for g, x in zip(grads, u, strict=True)]).sum()

        products, dots = torch.func.grad(along, argnums=(0, 1))(primals, share)
        return (dots, *products)

    def guarded(*u: Tensor) -> tuple[Tensor, ...]:
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            if hvp == "reverse":
                return reverse(*u)
            try:
                with FORWARD_MODE, ReverseModeConstants():
                    return forward(*u)
            except (NotImplementedError, RuntimeError) as error:
                if "forward AD" not in str(error) and "forward mode AD" not in str(error):
                    raise
                raise TransformError(
                    'hvp="forward" needs forward-mode AD for every op; use hvp="reverse". torch '
                    f"said: {str(error).splitlines()[0]}"
                ) from error

    return guarded


def _mapped(
    f: Callable[..., tuple[Tensor, ...]], stacked: Sequence[Tensor], q: int, vectorize: bool
) -> list[Tensor]:
    """`f` of each of q lists of tensors, which are stacked."""
    if vectorize and q > 1:
        out: Any = torch.func.vmap(f, randomness="same")(*stacked)
        return [x.detach() for x in out]
    rows = [f(*(x[j] for x in stacked)) for j in range(q)]
    return [torch.stack([x.detach() for x in column]) for column in zip(*rows, strict=True)]
