"""Exactness on a device: the tests marked `gpu` need a CUDA device; the same run on a processor."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghostfunc as gf

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)
DTYPES = [
    pytest.param(torch.float32, 1e-5, id="fp32"),
    pytest.param(torch.bfloat16, 3e-2, id="bf16"),
    pytest.param(torch.float16, 5e-3, id="fp16"),
]
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


class Net(nn.Module):
    """An embedding that is also the head, a norm, a hidden layer."""

    def __init__(self, *, remat: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.hidden = gf.remat(self.block) if remat else self.block

    def block(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.hidden(self.embedding(ids)), self.embedding.weight)


def token_losses(net: nn.Module, ids: Tensor) -> Tensor:
    logits = net(ids[:, :-1]).float() if ids.is_cuda else net(ids[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1)


def quantities(net: nn.Module, train: Tensor, val: Tensor) -> dict[str, Tensor]:
    """Every kind of number, in float64 on the processor."""
    model_fn, params = gf.from_module(net, token_losses)
    step = gf.ghost_value_and_grad(model_fn, params, train, val)
    clipped = gf.ghost_clipped_grad(model_fn, params, train, max_norm=0.1).grads
    found = {
        "scores": step.dot_prods,
        "grads": _flat(step.grads),
        "each": gf.ghost_dot_prod(model_fn, params, train, val, reduction="none"),
        "norms": gf.ghost_norm(model_fn, params, train),
        "gram": gf.ghost_gram(model_fn, params, train),
        "cosines": gf.ghost_cosine(model_fn, params, train, val),
        "clipped": _flat(clipped),
    }
    return {name: x.double().cpu() for name, x in found.items()}


def defined(net: nn.Module, train: Tensor, val: Tensor) -> dict[str, Tensor]:
    """The same by the definition, one sample at a time, in float64 on the processor."""
    net = copy.deepcopy(net).double().cpu()
    params = list(net.parameters())

    def gradient(ids: Tensor) -> Tensor:
        grads = torch.autograd.grad(token_losses(net, ids).mean(), params)
        return torch.cat([g.flatten() for g in grads])

    g = torch.stack([gradient(x[None]) for x in train.cpu()])
    v = torch.stack([gradient(x[None]) for x in val.cpu()])
    u, norms = v.mean(0), g.norm(dim=1)
    return {
        "scores": g @ u,
        "grads": g.mean(0),
        "each": g @ v.T,
        "norms": norms,
        "gram": g @ g.T,
        "cosines": g @ u / norms / u.norm(),
        "clipped": ((0.1 / norms).clamp(max=1)[:, None] * g).sum(0),
    }


def _flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in grads.values()])


def batches(device: str) -> tuple[Tensor, Tensor]:
    return torch.randint(11, (8, 6), device=device), torch.randint(11, (2, 6), device=device)


@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_every_quantity_is_that_of_the_definition(
    device: str, dtype: torch.dtype, tolerance: float, remat: bool
) -> None:
    net = Net(remat=remat).to(device, dtype)
    train, val = batches(device)
    right = defined(Net().to(dtype) if remat else net, train, val)
    if remat:
        plain = Net()
        plain.load_state_dict(net.state_dict())
        right = defined(plain.to(dtype), train, val)
    for name, found in quantities(net, train, val).items():
        error = (found - right[name]).norm() / right[name].norm()
        assert error < tolerance, (name, error)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnCuda:
    """What has no counterpart on a processor."""

    def test_compiled_equals_eager(self) -> None:
        net = Net().to("cuda")
        train, val = batches("cuda")
        model_fn, params = gf.from_module(net, token_losses)
        compiled = torch.compile(
            lambda p, a, b: gf.ghost_dot_prod(model_fn, p, a, b), fullgraph=True
        )
        torch.testing.assert_close(
            compiled(params, train, val), gf.ghost_dot_prod(model_fn, params, train, val)
        )

    def test_two_streams(self) -> None:
        net = Net().to("cuda")
        pairs = [batches("cuda"), batches("cuda")]
        model_fn, params = gf.from_module(net, token_losses)
        alone = [gf.ghost_dot_prod(model_fn, params, *pair) for pair in pairs]
        torch.cuda.synchronize()
        found: list[Any] = []
        for pair in pairs:
            with torch.cuda.stream(torch.cuda.Stream()):
                found.append(gf.ghost_dot_prod(model_fn, params, *pair, check_finite=False))
        torch.cuda.synchronize()
        torch.testing.assert_close(found, alone)

    @pytest.mark.parametrize("name", ["ghost_dot_prod", "ghost_value_and_grad", "ghost_cosine"])
    def test_nothing_waits(self, name: str) -> None:
        net = Net().to("cuda")
        train, val = batches("cuda")
        model_fn, params = gf.from_module(net, token_losses)
        function = getattr(gf, name)
        function(model_fn, params, train, val)
        torch.cuda.set_sync_debug_mode("error")
        try:
            function(model_fn, params, train, val, check_finite=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_bench_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    try:
        bench = __import__("gpu")
        monkeypatch.setattr(bench, "ROUNDS", 1)
        monkeypatch.setattr(bench, "TINY", {"smollm2": bench.TINY["smollm2"]})
        out = tmp_path / "gpu.md"
        bench.main(["--device", "cpu", "--tiny", "--no-compile", "--out", str(out)])
    finally:
        for name in set(sys.modules) - before:
            if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
    text = out.read_text()
    for work in ("plain step", "step with scores", "norm", "clipped", "project"):
        assert text.count(f"| {work} | eager |") == 2, work
    assert "Error" not in text
    errors = [float(x.split("|")[3]) for x in text.splitlines() if x.startswith("| fp32 |")]
    assert len(errors) == 3
    assert max(errors) < 1e-5
