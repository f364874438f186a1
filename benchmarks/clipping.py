"""Norms, Gram matrices and clipped sums against a plain step, Opacus and `vmap(grad)`.

A plain step is forward and backward of the mean loss over the same n rows. Opacus' ghost clipping
(two backward passes) knows neither tied weights nor Hugging Face's Conv1D, so the model is a GPT of
`nn.Linear` with a head of its own. Opacus is optional: `pip install opacus`.

    python benchmarks/clipping.py --cpu-time
    python benchmarks/clipping.py --shapes gpt2-small --without opacus vmap
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from step import SHAPES, Shape, measure, report
from torch import Tensor, nn

import ghostfunc as gf

MAX_NORM = 1.0


class Block(nn.Module):
    """One layer of a GPT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        qkv = self.qkv(self.norms[0](x)).view(n, t, 3, self.heads, -1).transpose(1, 3)
        attended = F.scaled_dot_product_attention(*qkv.unbind(2), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    """Positions come with the batch: Opacus counts samples on the first axis of every input."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.length, shape.width)
        self.blocks = nn.Sequential(*(Block(shape.width) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions(places))))


def loss(module: nn.Module, ids: Tensor) -> Tensor:
    logits = module(ids)[:, :-1]
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1).mean(1)


def opacus_step(shape: Shape, ids: Tensor) -> Callable[[], dict[str, Tensor]]:
    """Opacus' ghost clipping: a backward pass for the norms, another for the sum."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    torch.manual_seed(0)
    module = GradSampleModuleFastGradientClipping(
        GPT(shape), loss_reduction="sum", max_grad_norm=MAX_NORM
    )

    def step() -> dict[str, Tensor]:
        module.zero_grad(set_to_none=True)
        losses = loss(module, ids)
        losses.sum().backward(retain_graph=True)
        module.zero_grad(set_to_none=True)
        module.disable_hooks()
        (module.get_clipping_coef() * losses).sum().backward()
        module.enable_hooks()
        return {k.removeprefix("_module."): p.grad for k, p in module.named_parameters()}

    return step


def contestants(shape: Shape, without: list[str]) -> dict[str, Callable[[], object]]:
    """The plain step first, then what is compared with it."""
    torch.manual_seed(0)
    module = GPT(shape)
    model_fn, params = gf.from_module(module, loss)
    ids = torch.randint(
        shape.vocabulary, (shape.n, shape.length), generator=torch.Generator().manual_seed(1)
    )

    def plain() -> None:
        module.zero_grad(set_to_none=True)
        loss(module, ids).mean().backward()

    def clipped(mode: str) -> dict[str, Tensor]:
        return gf.ghost_clipped_grad(model_fn, params, ids, max_norm=MAX_NORM, mode=mode).grads

    found: dict[str, Callable[[], object]] = {
        "plain step": plain,
        "ghost_norm": lambda: gf.ghost_norm(model_fn, params, ids),
        "ghost_gram": lambda: gf.ghost_gram(model_fn, params, ids),
        "ghost_clipped_grad": lambda: clipped("ghost"),
    }
    if "opacus" not in without:
        theirs = opacus_step(shape, ids)
        check(clipped("ghost"), theirs())
        found["Opacus ghost clipping"] = theirs
    if "vmap" not in without:
        found["vmap(grad), clipped"] = lambda: clipped("materialized")
    return found


def check(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Both must compute the same sum."""
    for name, grad in mine.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-3, atol=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without", nargs="*", choices=["opacus", "vmap"], default=[])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time of one thread, not wall time"
    )
    args = parser.parse_args()
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, eager")
    for name in args.shapes:
        report(SHAPES[name], measure(contestants(SHAPES[name], args.without), args.repeats, clock))


if __name__ == "__main__":
    main()
