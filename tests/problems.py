"""One list of problems: a model function, its parameters, and random batches of any size.

Every case runs through every test that takes the `problem` fixture. To add one, write a function
under `@case` that returns a `Problem`; it is called anew, under a fixed seed, for every test.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import ghostfunc as gf

Draw = Callable[[int, int, Generator], Any]


@dataclass(frozen=True)
class Problem:
    """`draw(n, t, generator)` makes a batch of n samples with t positions each.

    `forward_mode`: whether torch can run it under `jvp`.
    """

    model_fn: Callable[[Any, Any], Tensor]
    params: Any
    draw: Draw
    tolerance: float = 1e-10
    forward_mode: bool = True

    def batch(self, n: int, t: int = 4, seed: int = 0) -> Any:
        return self.draw(n, t, Generator().manual_seed(seed))


CASES: dict[str, Callable[[], Problem]] = {}


def case(build: Callable[[], Problem]) -> Callable[[], Problem]:
    @functools.wraps(build)
    def seeded() -> Problem:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return build()

    CASES[build.__name__] = seeded
    return seeded


# --- building blocks --------------------------------------------------------------------------


def features(*shape: int) -> Draw:
    return lambda n, t, g: torch.randn(n, *shape, generator=g, dtype=torch.float64)


def sequences(d: int) -> Draw:
    return lambda n, t, g: torch.randn(n, t, d, generator=g, dtype=torch.float64)


def tokens(vocabulary: int) -> Draw:
    return lambda n, t, g: torch.randint(vocabulary, (n, t), generator=g)


def labelled(vocabulary: int, d: int) -> Draw:
    def draw(n: int, t: int, g: Generator) -> dict[str, Tensor]:
        return {"ids": tokens(vocabulary)(n, t, g), "x": sequences(d)(n, t, g)}

    return draw


def weights(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {k: 0.5 * torch.randn(s, dtype=torch.float64) for k, s in shapes.items()}


def energy(out: Tensor) -> Tensor:
    """A loss per sample whose gradient is nowhere zero by accident."""
    return (out.flatten(1) - 1).square().mean(1)


def next_token(logits: Tensor, ids: Tensor) -> Tensor:
    targets = ids[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


def of_module(
    module: nn.Module,
    draw: Draw,
    loss: Callable[[nn.Module, Any], Tensor] = lambda module, x: energy(module(x)),
    **options: Any,
) -> Problem:
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)  # so that no bias is zero and no scale is one
    return Problem(*gf.from_module(module, loss), draw, **options)


def language_model(module: nn.Module, vocabulary: int) -> Problem:
    return of_module(module, tokens(vocabulary), lambda m, ids: next_token(m(ids), ids))


# --- modules ----------------------------------------------------------------------------------


@case
def mlp() -> Problem:
    return of_module(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), features(4))


@case
def mlp_on_sequences() -> Problem:
    return of_module(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)), sequences(4))


@case
def relu_in_place() -> Problem:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3, bias=False))
    return of_module(net, sequences(4))


@case
def dropout_in_eval_mode() -> Problem:
    return of_module(
        nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).eval(), features(4)
    )


class TiedLM(nn.Module):
    def __init__(self, vocabulary: int = 11, d: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.norm = nn.LayerNorm(d)
        self.hidden = nn.Linear(d, d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.gelu(self.hidden(self.norm(self.embed(ids)))))


@case
def tied_lm() -> Problem:
    return language_model(TiedLM(), 11)


class NanoGPT(nn.Module):
    """Positions are 1-D ids, `arange(T)`: no sample in them, and T may equal n."""

    def __init__(self, vocabulary: int = 9, d: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.wte, self.wpe = nn.Embedding(vocabulary, d), nn.Embedding(16, d)
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d, bias=False)
        self.c_attn, self.c_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.lm_head = nn.Linear(d, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.c_attn(x).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        x = x + self.attention(self.ln_1(x))
        return self.lm_head(x + self.mlp(self.ln_2(x)))


@case
def nanogpt() -> Problem:
    return language_model(NanoGPT(), 9)


class Repeated(nn.Module):
    """One layer called several times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.layer, self.norm, self.times = nn.Linear(4, 4), nn.LayerNorm(4), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.norm(torch.tanh(self.layer(x)))
        return x


@case
def layer_called_twice() -> Problem:
    return of_module(Repeated(2), sequences(4))


@case
def layer_called_three_times() -> Problem:
    return of_module(Repeated(3), features(4))


@case
def frozen_first_layer() -> Problem:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    net[0].requires_grad_(False)
    return of_module(net, sequences(4))


class Standardised(nn.Module):
    """Buffers before and behind the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("mask", torch.ones(16, 16).tril())

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        return (self.mask[:t, :t] @ self.linear(x - self.mean)) * self.mean


@case
def buffers() -> Problem:
    return of_module(Standardised(), sequences(4))


@case
def padded_embedding() -> Problem:
    return language_model(nn.Sequential(nn.Embedding(7, 5, padding_idx=0), nn.Linear(5, 7)), 7)


@case
def weight_norm() -> Problem:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    net = nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3))
    return of_module(net, sequences(4), forward_mode=False)


@case
def regulariser() -> Problem:
    def loss(module: nn.Module, x: Tensor) -> Tensor:
        return energy(module(x)) + 0.1 * sum(p.square().sum() for p in module.parameters())

    return of_module(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), features(4), loss)


@case
def layer_norm_over_two_axes() -> Problem:
    return of_module(nn.Sequential(nn.LayerNorm((3, 4)), nn.Linear(4, 2)), features(3, 4))


@case
def rms_norm() -> Problem:
    return of_module(
        nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 3), nn.RMSNorm(3, eps=0.1)), sequences(4)
    )


class LlamaRMSNorm(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float64)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)


@case
def llama_rms_norm() -> Problem:
    return of_module(nn.Sequential(LlamaRMSNorm(4), nn.Linear(4, 3)), sequences(4))


@case
def bfloat16() -> Problem:
    problem = of_module(
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)), sequences(4)
    )
    problem.model_fn.module.bfloat16()
    params = {k: v.bfloat16() for k, v in problem.params.items()}
    draw = lambda n, t, g: sequences(4)(n, t, g).bfloat16()  # noqa: E731
    return Problem(problem.model_fn, params, draw, tolerance=5e-2)


# --- raw functions ----------------------------------------------------------------------------


class Layer(NamedTuple):
    w: Tensor
    b: Tensor


@case
def nested_params() -> Problem:
    def model_fn(params: Any, x: Tensor) -> Tensor:
        for w, b in params["layers"]:
            x = torch.tanh(F.linear(x, w, b))
        last, (scale, [shift]) = params["last"]
        return energy(F.linear(x, last.w, last.b) * scale + shift)

    layers = [tuple(weights(w=(5, 4), b=(5,)).values()), tuple(weights(w=(6, 5), b=(6,)).values())]
    last = (Layer(**weights(w=(3, 6), b=(3,))), tuple(weights(s=(3,), t=(3,)).values()))
    params = {"layers": layers, "last": (last[0], (last[1][0], [last[1][1]]))}
    return Problem(model_fn, params, sequences(4))


@case
def params_are_one_tensor() -> Problem:
    return Problem(lambda w, x: energy(x @ w), weights(w=(4, 3))["w"], sequences(4))


@case
def one_tensor_under_two_names() -> Problem:
    w = weights(w=(4, 4))["w"]
    return Problem(lambda p, x: energy(torch.tanh(x @ p[0]) @ p[1].t()), [w, w], sequences(4))


@case
def nested_batch() -> Problem:
    def draw(n: int, t: int, g: Generator) -> Any:
        return features(4)(n, t, g), {"y": [sequences(3)(n, t, g)]}

    def model_fn(p: Any, batch: Any) -> Tensor:
        x, rest = batch
        (y,) = rest["y"]
        return energy((x @ p["w"])[:, None] - y)

    return Problem(model_fn, weights(w=(4, 3)), draw)


@case
def time_first() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) + p["positions"][: x.shape[1], None]  # [T, n, d]
        x = F.layer_norm(torch.tanh(F.linear(x, p["w"], p["b"])), (5,), p["scale"], p["shift"])
        return energy((x @ p["v"]).transpose(0, 1))

    shapes = {"positions": (16, 4), "w": (5, 4), "b": (5,), "scale": (5,), "shift": (5,)}
    return Problem(model_fn, weights(**shapes, v=(5, 3)), sequences(4))


@case
def axes_by_length() -> Problem:
    """Short samples batch-first, long ones time-first: as good a function as any."""

    def model_fn(p: Any, x: Tensor) -> Tensor:
        if x.shape[1] <= 3:
            return energy(torch.tanh(x @ p["w"]))
        return energy(torch.tanh(x.transpose(0, 1) @ p["w"]).transpose(0, 1))

    return Problem(model_fn, weights(w=(4, 3)), sequences(4))


def folded(x: Tensor, p: Any) -> Tensor:
    """`x` is `[rows, d]`; which sample a row belongs to is not for this code to know."""
    x = torch.tanh(torch.addmm(p["b"], x, p["w"]))
    x = F.layer_norm(x * p["gain"], (5,), p["scale"], p["shift"])
    x += p["last"]
    return x @ p["v"]


FOLDED = {
    "w": (4, 5), "b": (5,), "gain": (5,), "scale": (5,), "shift": (5,), "last": (5,), "v": (5, 3)
}  # fmt: skip


@case
def folded_sample_major() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        return energy(folded(x.flatten(0, 1), p).unflatten(0, x.shape[:2]))

    return Problem(model_fn, weights(**FOLDED), sequences(4))


@case
def folded_time_major() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        out = folded(x.transpose(0, 1).flatten(0, 1), p)
        return energy(out.unflatten(0, (t, n)).transpose(0, 1))

    return Problem(model_fn, weights(**FOLDED), sequences(4))


@case
def embedding_of_folded_ids() -> Problem:
    def model_fn(p: Any, ids: Tensor) -> Tensor:
        x = F.embedding(ids.t().flatten(), p["e"]) @ p["w"]
        return energy(x.unflatten(0, (ids.shape[1], ids.shape[0])).transpose(0, 1))

    return Problem(model_fn, weights(e=(7, 4), w=(4, 3)), tokens(7))


@case
def conv1d_of_gpt2() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        flat = torch.addmm(p["b"], x.view(-1, x.size(-1)), p["w"], beta=0.5, alpha=2)
        flat = flat.addmm(flat, p["v"])
        return energy(flat.view(*x.shape[:-1], 4))

    return Problem(model_fn, weights(b=(4,), w=(4, 4), v=(4, 4)), sequences(4))


@case
def weight_and_its_transpose() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        return energy(torch.tanh(x @ p["w"]) @ p["w"].t() + F.linear(x, p["w"].mT) @ p["w"].T)

    return Problem(model_fn, weights(w=(4, 5)), sequences(4))


@case
def table_and_head() -> Problem:
    def model_fn(p: Any, ids: Tensor) -> Tensor:
        return next_token(torch.tanh(p["w"][ids]) @ p["w"].transpose(0, 1), ids)

    return Problem(model_fn, weights(w=(7, 4)), tokens(7))


@case
def tables_of_every_rank() -> Problem:
    def model_fn(p: Any, ids: Tensor) -> Tensor:
        return energy(
            (p["cube"][ids] * p["matrix"][ids][..., None]).sum(-1) + p["bias"][ids][..., None]
        )

    return Problem(model_fn, weights(cube=(7, 3, 2), matrix=(7, 3), bias=(7,)), tokens(7))


@case
def tied_embedding_with_padding() -> Problem:
    """The row of the padding index has a gradient from the head alone."""

    def model_fn(p: Any, ids: Tensor) -> Tensor:
        return next_token(torch.tanh(F.embedding(ids, p["e"], padding_idx=-1)) @ p["e"].t(), ids)

    return Problem(model_fn, weights(e=(5, 4)), tokens(5))


@case
def matmul_parameter_right() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        return energy(
            torch.matmul(x @ p["w"], p["v"]).matmul(p["u"])[..., None] * (x @ p["u"])[..., None]
        )

    return Problem(model_fn, weights(w=(4, 5), v=(5, 4), u=(4,)), sequences(4))


@case
def matmul_parameter_left() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        columns = p["v"] @ torch.tanh(p["w"] @ x.mT)  # [n, 3, T]
        return energy(columns) + energy(p["u"] @ columns) + energy((p["w"] @ x[:, 0].t()).t())

    return Problem(model_fn, weights(w=(5, 4), v=(3, 5), u=(3,)), sequences(4))


@case
def matmul_samples_on_the_last_axis() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        return energy((p["w"] @ x.permute(1, 2, 0)).permute(2, 0, 1))  # x is [T, d, n]

    return Problem(model_fn, weights(w=(4, 4)), sequences(4))


@case
def matmul_per_head() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        heads = x[:, None] @ p["w"]  # [n, h, T, p]
        return energy(heads) + energy(p["v"] @ heads)

    return Problem(model_fn, weights(w=(3, 4, 5), v=(3, 1, 1)), features(1, 4))


@case
def matmul_per_expert() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        experts = x.expand(3, *x.shape) @ p["w"]  # [h, n, d] @ [h, d, p]
        return energy(experts.movedim(0, 1))

    return Problem(model_fn, weights(w=(3, 4, 4)), features(4))


@case
def learned_queries() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        pooled = torch.softmax(p["q"] @ x.mT, -1) @ x
        return energy(pooled + F.scaled_dot_product_attention(p["q"].expand(len(x), -1, -1), x, x))

    return Problem(model_fn, weights(q=(3, 4)), sequences(4))


@case
def class_token() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        x = torch.cat([p["cls"].expand(len(x), -1, -1), x], 1)
        return energy((x + p["positions"][:, : x.shape[1]]) @ p["w"])

    return Problem(model_fn, weights(cls=(1, 1, 4), positions=(1, 16, 4), w=(4, 3)), sequences(4))


@case
def class_token_time_first() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        x = torch.cat([p["cls"].expand(-1, n, -1), x.transpose(0, 1)])
        x = x * p["positions"][: t + 1, None].expand(-1, n, -1)
        return energy((x @ p["w"]).transpose(0, 1))

    return Problem(model_fn, weights(cls=(1, 1, 4), positions=(16, 4), w=(4, 3)), sequences(4))


@case
def class_token_written_into_the_sequence() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :1], x], 1)
        x[:, 0] = p["cls"]
        return energy(x @ p["w"])

    return Problem(model_fn, weights(cls=(4,), w=(4, 3)), sequences(4))


@case
def mask_token() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        return energy(torch.where(x[..., :1] > 0, p["token"], x) @ p["w"])

    return Problem(model_fn, weights(token=(4,), w=(4, 3)), sequences(4))


@case
def position_table_added() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        t = x.shape[1]
        shifted = F.embedding(torch.arange(t)[None], p["table"]) + p["table"][:t]
        return energy((x + shifted) @ p["w"])

    return Problem(model_fn, weights(table=(16, 4), w=(4, 3)), sequences(4))


@case
def relative_position_bias() -> Problem:
    """T5: a derived tensor `[1, h, T, T]` meets samples, once added and once as an `attn_mask`."""

    def model_fn(p: Any, x: Tensor) -> Tensor:
        t = torch.arange(x.shape[1])
        bias = F.embedding((t[:, None] - t).abs().clamp(max=3), p["table"]).permute(2, 0, 1)[None]
        heads = x[:, None] * p["gain"]
        scores = heads @ heads.mT / math.sqrt(4) + bias
        attended = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias)
        return energy(torch.softmax(scores, -1) @ heads + attended)

    return Problem(model_fn, weights(table=(4, 2), gain=(2, 1, 4)), sequences(4))


@case
def in_place_arithmetic() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        x = x @ p["w"]
        x += p["b"]
        x.mul_(p["s"]).sub_(p["c"])
        x[:, 1:] += p["b"]
        return energy(x)

    return Problem(model_fn, weights(w=(4, 5), b=(5,), s=(5,), c=(1,)), sequences(4))


@case
def elementwise() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        x = (1 - p["a"]) * x + x / p["a"].exp() - (p["a"] - x)
        x = torch.maximum(x, p["b"]) + torch.lerp(x, p["b"], p["gate"]) + torch.rsub(x, p["b"])
        x = torch.addcmul(x, p["b"], x, value=0.5) + p["gate"] / (2 + x.square())
        return energy(x + (1 + x.square()) ** p["gate"] + p["gate"].abs() ** x.sigmoid())

    return Problem(model_fn, weights(a=(1, 4), b=(4,), gate=()), sequences(4))


@case
def parameter_larger_than_the_samples() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        return energy(torch.tanh(x[..., None] * p["w"] + p["b"]))

    return Problem(model_fn, weights(w=(4, 3), b=(4, 1)), features(4))


@case
def lora() -> Problem:
    w = weights(w=(5, 4))["w"]
    return Problem(
        lambda p, x: energy(F.linear(x, w + 2 * p["b"] @ p["a"])),
        weights(b=(5, 2), a=(2, 4)),
        sequences(4),
    )


@case
def lora_at_initialisation() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        return energy(F.linear(x, p["w"] + p["b"] @ p["a"]))

    params = weights(w=(5, 4), a=(2, 4)) | {"b": torch.zeros(5, 2, dtype=torch.float64)}
    return Problem(model_fn, params, sequences(4))


@case
def pruned_weight() -> Problem:
    mask = (torch.rand(4, 5) > 0.4).double()
    return Problem(lambda p, x: energy(x @ (p["w"] * mask)), weights(w=(4, 5)), sequences(4))


@case
def packed_projection() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        q, k, v = p["w"].chunk(3)
        return energy(F.linear(x, q, p["b"][:4]) * F.linear(x, k) + F.linear(x, v) @ v)

    return Problem(model_fn, weights(w=(12, 4), b=(12,)), sequences(4))


@case
def stacked_weights() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        for w in torch.stack([p["w1"], p["w2"]]):
            x = torch.tanh(x @ w)
        return energy(x @ torch.cat([p["w1"], p["w2"].flip(0)], dim=1))

    return Problem(model_fn, weights(w1=(4, 4), w2=(4, 4)), sequences(4))


@case
def normalised_weight() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            constant = p["w"].norm()
        mixture = p["logits"].softmax(0)
        return energy((x @ (p["w"] / p["w"].norm(dim=0)) + constant) * mixture)

    return Problem(model_fn, weights(w=(4, 3), logits=(3,)), sequences(4))


@case
def constants_of_parameters() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        return energy(x @ p["w"].detach() @ p["v"] + (x @ p["v"].data) * p["w"].shape[0])

    return Problem(model_fn, weights(w=(4, 4), v=(4, 4)), sequences(4))


@case
def derived_in_place() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        return energy(x @ F.relu(p["w"] * 1.5, inplace=True))

    return Problem(model_fn, weights(w=(4, 5)), sequences(4))


@case
def cast_up() -> Problem:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        return energy(F.linear(x, p["w"].to(x.dtype), p["b"].double()) @ p["w"].to(x))

    params = {k: v.float() for k, v in weights(w=(4, 4), b=(4,)).items()}
    return Problem(model_fn, params, sequences(4), tolerance=1e-5)


@case
def unused_parameter() -> Problem:
    return Problem(lambda p, x: energy(x @ p["w"]), weights(w=(4, 3), idle=(2, 2)), sequences(4))


@case
def pooled_over_padding() -> Problem:
    def model_fn(p: Any, batch: Any) -> Tensor:
        keep = (batch["ids"] > 1)[..., None]
        x = torch.tanh(batch["x"] @ p["w"]) + p["e"][batch["ids"]]
        return energy((x * keep).sum(1) / (1 + keep.sum(1)))

    return Problem(model_fn, weights(w=(4, 3), e=(6, 3)), labelled(6, 4))
