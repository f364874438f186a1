"""Models that `fully_shard` and tensor parallel plans shard, with batches of several ranks in
unequal numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import ghostfunc as gf


@dataclass(frozen=True)
class Problem:
    """A model before it is sharded.

    Attributes:
        module: the whole of it, the same on every rank.
        units: the modules to shard by themselves, besides the whole.
        make: makes `(model_fn, params)` of it.
        train, val: batches, one per rank.
        few: validation batches that are one with those of train; each rank computes all of them.
        many: the same, of which each rank computes its own.
        plan: the tensor parallel styles of parts, by name.
        loaded: whether its parameters become others once it is sharded.
    """

    module: nn.Module
    units: list[nn.Module]
    make: Callable[[nn.Module], tuple[Any, dict[str, Tensor]]]
    train: list[Any]
    val: list[Any]
    few: list[Any]
    many: list[Any]
    plan: Mapping[str, Any] = field(default_factory=dict)
    loaded: bool = False

    @property
    def like_train(self) -> tuple[list[Any], list[Any]]:
        """Validation batches that may share a run with those of train."""
        return self.few, self.many


class Mlp(nn.Module):
    """Sizes that no number of ranks divides, a frozen layer, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.twice = nn.Linear(7, 7)
        self.frozen = nn.Linear(7, 3).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = torch.tanh(self.twice(torch.tanh(self.twice(h))))
        out: Tensor = self.last(torch.tanh(self.frozen(h)) * self.scale)
        return out


def mlp(world: int) -> Problem:
    net = Mlp()

    def loss(module: nn.Module, batch: Any) -> Tensor:
        out: Tensor = (module(batch["x"]) - batch["y"]).square().mean((1, 2))
        return out

    def batches(sizes: list[int]) -> list[Any]:
        return [{"x": torch.randn(n, 4, 5), "y": torch.randn(n, 4, 1)} for n in sizes]

    return Problem(
        net,
        [net.first, net.twice],
        lambda module: gf.from_module(module, loss),
        *(batches(sizes) for sizes in _all_sizes(world)),
    )


class Scaled(nn.Module):
    """A weight that is made of two parameters, as `weight_norm` makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(7, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(nn.functional.linear(x, self.gain * self.weight.tanh()))


def scaled(world: int) -> Problem:
    """No parameter is used twice; all are loaded into pieces."""
    like, net = mlp(world), nn.Sequential(Scaled(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))
    own = net, [net[0], net[1]], like.make, like.train, like.val, like.few, like.many
    return Problem(*own, loaded=True)


class PlannedMlp(nn.Module):
    """Parts that a plan cuts in uneven pieces, used twice; a frozen one, and others it leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)
        self.frozen = nn.Linear(5, 4).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.down(torch.tanh(self.up(self.norm(x))))
        out: Tensor = self.last(torch.tanh(self.frozen(x)) * self.scale)
        return out


def planned_mlp(world: int) -> Problem:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    net, like = PlannedMlp(), mlp(world)
    plan = {
        "up": ColwiseParallel(use_local_output=False),
        "down": RowwiseParallel(),
        "frozen": ColwiseParallel(output_layouts=Replicate()),
    }
    return Problem(
        net, [net.up, net.down], like.make, like.train, like.val, like.few, like.many, plan
    )


def llama(world: int) -> Problem:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=32, max_position_embeddings=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(torch.get_default_dtype())
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    layer = "model.layers.*"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        plan[f"{layer}.{name}"] = ColwiseParallel()
    plan |= {f"{layer}.mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
    plan |= {f"{layer}.{x}": RowwiseParallel() for x in ("self_attn.o_proj", "mlp.down_proj")}
    return Problem(model, list(model.model.layers), gf.hf.causal_lm, *_tokens(world), plan)


def _tokens(world: int) -> tuple[list[Any], ...]:
    """Batches of train, val, few and many."""
    return tuple(
        [{"input_ids": torch.randint(0, 31, (n, length))} for n in sizes]
        for sizes, length in zip(_all_sizes(world), (6, 5, 6, 6), strict=True)
    )


def _all_sizes(world: int) -> list[list[int]]:
    """Samples of every rank: of train, val, few and many."""
    few = _sizes(world, 1)
    train = _sizes(world, max(3, sum(few)))
    # All of them are more than twice what the last rank has of its own.
    many = [train[0] + 5] * (world - 1) + [2]
    return [train, _sizes(world, 2), few, many]


def _sizes(world: int, start: int) -> list[int]:
    """Samples of every rank."""
    return [start + r % 2 for r in range(world)]


def gpt2(world: int) -> Problem:
    """Input and output embeddings are one parameter. Two ranks have two units that are alike."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=2 if world == 2 else 1, n_head=2, n_embd=8, vocab_size=31, n_positions=16,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    return Problem(model, list(model.transformer.h), gf.hf.causal_lm, *_tokens(world))


def llama_lora(world: int) -> Problem:
    """Its plan cuts what an adapter puts out as it cuts what the adapter is beside."""
    from peft import LoraConfig, get_peft_model
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=31, max_position_embeddings=16,
    )  # fmt: skip
    lora = LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    model = get_peft_model(LlamaForCausalLM(config), lora).eval().double()
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zeros at first
            nn.init.normal_(p)
    layers = list(model.base_model.model.model.layers)
    attention = "base_model.model.model.layers.*.self_attn"
    adapted = [f"{attention}.{x}_proj.{y}" for x in "qv" for y in ("base_layer", "lora_B.default")]
    plan: dict[str, Any] = {x: ColwiseParallel() for x in (*adapted, f"{attention}.k_proj")}
    plan[f"{attention}.o_proj"] = RowwiseParallel()
    return Problem(model, layers, gf.hf.causal_lm, *_tokens(world), plan)


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "mlp": mlp,
    "scaled": scaled,
    "gpt2": gpt2,
    "llama_lora": llama_lora,
    "planned_mlp": planned_mlp,
    "llama": llama,
}


def sharded(problem: Problem, mesh: Any) -> nn.Module:
    """The module, sharded as it is: by its plan over the dimension "tp", and by `fully_shard` over
    the others."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        parallelize_module(problem.module, mesh["tp"], dict(problem.plan))
        if len(names) == 1:
            return problem.module
        mesh = mesh[names[:-1]]
    for unit in problem.units:
        fully_shard(unit, mesh=mesh)
    fully_shard(problem.module, mesh=mesh)
    if problem.loaded:
        problem.module.load_state_dict(problem.module.state_dict(), assign=True)
    return problem.module


def joined(batches: list[Any]) -> Any:
    """The batches of all ranks as one."""
    return {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
