"""What a user would otherwise pick, used the way its documentation says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from exact import MAX_NORM
from torch import Tensor, nn

Loss = Callable[[nn.Module, Tensor], Tensor]


def vmap_step(module: nn.Module, loss: Loss, train: Tensor, val: Tensor) -> Callable[[], Tensor]:
    """`vmap(grad)`: every per-sample gradient, then dot products and their mean."""
    params = {k: x.detach() for k, x in module.named_parameters()}
    bound = _Bound(module, loss)

    def mean_loss(p: dict[str, Tensor], ids: Tensor) -> Tensor:
        return torch.func.functional_call(bound, {f"module.{k}": x for k, x in p.items()}, (ids,))

    of_one = torch.vmap(torch.func.grad(mean_loss), in_dims=(None, 0))

    def step() -> Tensor:
        u = torch.func.grad(mean_loss)(params, val)
        grads = of_one(params, train[:, None])
        scores = [grads[k].flatten(1) @ u[k].flatten() for k in params]
        {k: g.mean(0) for k, g in grads.items()}  # the training gradient
        return torch.stack(scores).sum(0)

    return step


class _Bound(nn.Module):
    """A module and its mean loss as one module, for `functional_call`."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module, self._loss = module, loss

    def forward(self, ids: Tensor) -> Tensor:
        return self._loss(self.module, ids).mean()


def dattri_llm_step(
    module: nn.Module, loss: Loss, train: Tensor, val: Tensor
) -> Callable[[], Tensor]:
    """dattri-llm: hooks capture both batches' factors, its selection callback's scores."""
    from dattri_llm import DataSelectionCallback, HookManager

    manager = HookManager(module)

    def step() -> Tensor:
        with manager.collect():
            module.zero_grad(set_to_none=True)
            loss(module, val).mean().backward()
            target = manager.get_gradient()
            module.zero_grad(set_to_none=True)
            loss(module, train).mean().backward()
            gradient = manager.get_gradient()
        layers = DataSelectionCallback.compute_scores(gradient, target)
        # The captured gradients are those of the mean loss.
        return len(train) * torch.stack([x.detach() for x in layers.values()]).sum(0)

    return step


def opacus_steps(
    module: nn.Module, loss: Loss, train: Tensor
) -> tuple[Callable[[], Tensor], Callable[[], dict[str, Tensor]]]:
    """Opacus' ghost norms (a backward pass), and its clipping (another one)."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        module, loss_reduction="sum", max_grad_norm=MAX_NORM
    )

    def backward(retain: bool) -> Tensor:
        wrapped.zero_grad(set_to_none=True)
        losses = loss(wrapped, train)
        losses.sum().backward(retain_graph=retain)
        return losses

    def norms() -> Tensor:
        backward(retain=False)
        return wrapped.get_norm_sample()

    def clipped() -> dict[str, Tensor]:
        losses = backward(retain=True)
        wrapped.zero_grad(set_to_none=True)
        wrapped.disable_hooks()
        (wrapped.get_clipping_coef() * losses).sum().backward()
        wrapped.enable_hooks()
        return {
            k.removeprefix("_module."): p.grad
            for k, p in wrapped.named_parameters()
            if p.grad is not None
        }

    return norms, clipped
