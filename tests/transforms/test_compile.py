"""`torch.compile` around the public functions: the same numbers as eager, from one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import ghostfunc as gf

Model = tuple[Any, dict[str, Tensor], Callable[[int, int], Any]]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gpt2() -> Model:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1,
        n_embd=16,
        n_head=2,
        vocab_size=40,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return *gf.hf.causal_lm(GPT2LMHeadModel(config).double().eval()), tokens


def llama() -> Model:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        tie_word_embeddings=True,
    )
    return *gf.hf.causal_lm(LlamaForCausalLM(config).double().eval()), tokens


def tokens(n: int, t: int) -> dict[str, Tensor]:
    mask = torch.ones(n, t, dtype=torch.long)
    mask[0, -2:] = 0
    return {"input_ids": torch.randint(1, 40, (n, t)), "attention_mask": mask}


def conv() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, groups=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.GroupNorm(2, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )

    def images(n: int, t: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 3, t, t).double(), torch.randint(4, (n,))

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1], reduction="none")

    return *gf.from_module(net.double().eval(), loss), images


MODELS = {"gpt2": gpt2, "llama": llama, "conv": conv}


def calls(model_fn: Any, params: dict[str, Tensor]) -> dict[str, Callable[..., Any]]:
    projection = gf.kronecker_projection(params, rank_total=16, rank_min=2, kind="gaussian", seed=0)
    hashed = gf.kronecker_projection(
        params, rank_total=16, rank_min=2, kind="sparse", seed=0, compress=32
    )

    some = gf.kronecker_projection(
        params, rank_total=4, rank_min=1, kind="gaussian", seed=0, layers=list(params)[:2]
    )

    def many(p: Any, train: Any, val: Any) -> Any:
        wanted = {"u": gf.Dot(p), "norm": gf.SqNorm(), "k": gf.Project(projection)}
        return gf.ghost_vjp(model_fn, p, train, wanted, grads=True)

    return {
        "dot": lambda p, a, b: gf.ghost_dot_prod(model_fn, p, a, b),
        "dot, each": lambda p, a, b: gf.ghost_dot_prod(model_fn, p, a, b, reduction="none"),
        "dot, given": lambda p, a, b: gf.ghost_dot_prod(model_fn, p, a, direction=p),
        "step": lambda p, a, b: gf.ghost_value_and_grad(model_fn, p, a, b),
        "vjp": many,
        "vjp, alone": lambda p, a, b: gf.ghost_vjp(model_fn, p, a, gf.Project(some), grads=False),
        "dot, bfloat16": lambda p, a, b: gf.ghost_dot_prod(
            model_fn, p, a, b, contract_dtype=torch.bfloat16, chunk_size=None
        ),
        "project": lambda p, a, b: gf.ghost_project(model_fn, p, a, projection),
        "project, hashed": lambda p, a, b: gf.ghost_project(model_fn, p, a, hashed),
        "dot, several": lambda p, a, b: gf.ghost_dot_prod(model_fn, p, a, {"x": b, "y": a}),
        "norm": lambda p, a, b: gf.ghost_norm(model_fn, p, a),
        "cosine": lambda p, a, b: gf.ghost_cosine(model_fn, p, a, b),
        "gram": lambda p, a, b: gf.ghost_gram(model_fn, p, a, b),
        "clipped": lambda p, a, b: gf.ghost_clipped_grad(model_fn, p, a, max_norm=0.1),
        "gradients": lambda p, a, b: gf.per_sample_grads(model_fn, p, a, mode="ghost"),
        "direction": lambda p, a, b: gf.direction(model_fn, p, b),
    }


CALLS = list(calls(*gpt2()[:2]))


def close(found: Any, expected: Any, tolerance: float) -> None:
    pairs = zip(_pytree.tree_leaves(found), _pytree.tree_leaves(expected), strict=True)
    assert type(found) is type(expected)
    for x, y in pairs:
        if isinstance(y, Tensor):
            assert x.dtype == y.dtype
            assert float((x - y).abs().max()) <= tolerance * (1e-3 + float(y.abs().max()))


TRACED = {"dot", "step", "vjp"}
"""Calls of Llama that autograd traces too, which takes most of the time: its ops under all kinds of
readers. The other calls' readers are traced with GPT-2, whose factors are the same."""


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("model", MODELS)
def test_captured_whole_and_equal_to_eager(model: str, name: str) -> None:
    model_fn, params, batch = MODELS[model]()
    f = calls(model_fn, params)[name]
    backend = "aot_eager" if model != "llama" or name in TRACED else "eager"
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    train, val = batch(3, 9), batch(2, 7)
    close(compiled(params, train, val), f(params, train, val), 1e-12)


@pytest.mark.parametrize(("model", "name"), [("gpt2", "step"), ("llama", "dot"), ("conv", "norm")])
def test_inductor(model: str, name: str) -> None:
    """In float32, as compiled programs are used; parameters change between calls."""
    model_fn, params, batch = MODELS[model]()
    model_fn.module.float()
    params = {k: p.detach() for k, p in model_fn.module.named_parameters()}
    f = calls(model_fn, params)[name]
    compiled = torch.compile(f, fullgraph=True)

    def single(x: Tensor) -> Tensor:
        return x.float() if x.is_floating_point() else x

    for _ in range(2):
        train, val = (_pytree.tree_map(single, batch(n, 9)) for n in (3, 2))
        found, expected = compiled(params, train, val), f(params, train, val)
        close(found, expected, 1e-6)
        with torch.no_grad():
            for p in params.values():
                p.mul_(0.9)


@pytest.mark.parametrize("name", ["dot", "step", "norm", "project", "vjp"])
def test_no_new_program_for_a_new_step_or_a_new_length(name: str) -> None:
    model_fn, params, batch = gpt2()
    f = calls(model_fn, params)[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    lengths = [(16, 15), (16, 15), (20, 19), (24, 23), (28, 21)]
    for t, s in lengths:
        train, val = batch(3, t), batch(2, s)
        close(compiled(params, train, val), f(params, train, val), 1e-12)
        params = {k: p * 0.99 for k, p in params.items()}
    assert counter.frame_count == 2  # one for the first length, one for all others


@pytest.mark.parametrize("directed", [False, True])
def test_a_table_of_another_size(directed: bool) -> None:
    """The compiler has sizes that change be symbols, in parameters too."""

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return (p["table"][: x.shape[1]] * x).sum(1).tanh()

    def f(p: Any, u: Any, x: Tensor) -> Any:
        if directed:
            return gf.ghost_vjp(model_fn, p, x, {"dots": gf.Dot(u)}, grads=True).values["dots"]
        return gf.ghost_norm(model_fn, p, x)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for rows in (12, 8, 9):
        p, u = ({"table": torch.randn(rows, dtype=torch.float64)} for _ in range(2))
        x = torch.randn(3, 6, dtype=torch.float64)
        close(compiled(p, u, x), f(p, u, x), 1e-12)


def test_what_the_module_closes_over_is_read_at_every_call() -> None:
    model_fn, params, batch = conv()
    train, val = batch(3, 6), batch(2, 6)
    bias = params.pop("3.bias")

    def f(p: Any) -> Tensor:
        return gf.ghost_dot_prod(model_fn, p, train, val)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    before = compiled(params)
    bias.add_(1)
    model_fn.module[1].running_mean.add_(0.5)
    after = compiled(params)
    assert not torch.allclose(before, after)
    close(after, f(params), 1e-12)


def test_training_flags_are_checked() -> None:
    model_fn, params, batch = conv()
    train, val = batch(3, 6), batch(2, 6)
    compiled = torch.compile(
        lambda p: gf.ghost_dot_prod(model_fn, p, train, val), fullgraph=True, backend="aot_eager"
    )
    compiled(params)
    model_fn.module.train()
    with pytest.raises(Exception, match="batch_norm in training mode"):
        compiled(params)


def test_remat() -> None:
    """Nothing is saved, and nothing changes."""
    layer = nn.Linear(6, 6).double()

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        return gf.remat(lambda y: module(y).tanh())(x).square().sum(1)

    model_fn, params = gf.from_module(layer, loss)
    train, val = torch.randn(5, 6).double(), torch.randn(2, 6).double()

    def f(p: dict[str, Tensor]) -> Any:
        return gf.ghost_value_and_grad(model_fn, p, train, val)

    close(torch.compile(f, fullgraph=True, backend="aot_eager")(params), f(params), 1e-12)


def test_a_plain_function() -> None:
    def model_fn(p: list[Tensor], x: Tensor) -> Tensor:
        return (x @ p[0]).tanh().square().sum(1) * p[1]

    params = [torch.randn(4, 3).double(), torch.randn(()).double()]
    train, val = torch.randn(5, 4).double(), torch.randn(2, 4).double()

    def f(p: list[Tensor]) -> Tensor:
        return gf.ghost_dot_prod(model_fn, p, train, val)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    close(compiled(params), f(params), 1e-12)


def test_losses_that_are_not_finite_give_scores_that_are_not() -> None:
    def model_fn(p: Tensor, x: Tensor) -> Tensor:
        return (x * p).sum(1).log()

    p, val = torch.ones(3), torch.ones(2, 3)
    compiled = torch.compile(
        lambda x: gf.ghost_dot_prod(model_fn, p, x, val), fullgraph=True, backend="aot_eager"
    )
    assert compiled(torch.ones(4, 3)).isfinite().all()
    x = torch.ones(4, 3)
    x[1] = 0
    with pytest.raises(gf.NonFiniteLossError):
        gf.ghost_dot_prod(model_fn, p, x, val)
    assert compiled(x).isfinite().tolist() == [True, False, True, True]


def test_norms_whose_squares_overflow_are_not_numbers() -> None:
    """Eager takes them again at another scale, which a compiled program cannot."""

    def model_fn(p: Tensor, x: Tensor) -> Tensor:
        return x @ p

    p = torch.ones(3)
    compiled = torch.compile(
        lambda x: gf.ghost_norm(model_fn, p, x), fullgraph=True, backend="aot_eager"
    )
    compiled(torch.ones(2, 3))
    x = torch.tensor([[1.0, 0, 0], [1e25, 0, 0]])
    assert gf.ghost_norm(model_fn, p, x).tolist() == pytest.approx([1, 1e25])
    norms = compiled(x)
    assert norms[0] == 1
    assert norms[1].isnan()


def test_errors_are_said_while_compiling() -> None:
    def model_fn(p: Tensor, x: Tensor) -> Tensor:
        return (x @ p) / (x @ p).sum()

    compiled = torch.compile(
        lambda p, x: gf.ghost_dot_prod(model_fn, p, x, x), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="The loss of one sample depends on the others"):
        compiled(torch.ones(3), torch.rand(4, 3) + 1)


def test_a_dense_projection_is_refused() -> None:
    model_fn, params, batch = conv()
    projection = gf.kronecker_projection(params, rank_total=8, rank_min=2, kind="dense", seed=0)
    compiled = torch.compile(
        lambda p, x: gf.ghost_project(model_fn, p, x, projection),
        fullgraph=True,
        backend="aot_eager",
    )
    with pytest.raises(Exception, match=r"dense|_record"):
        compiled(params, batch(3, 6))
