"""A module lends its parameters and has them back; what cannot lend them is refused."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import pytest
import torch
from torch import Tensor, nn

import ghostfunc as gf


class Twice(nn.Module):
    """One layer under two names, in a list as well, and a dict of parameters shared by two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first
        self.norm = nn.BatchNorm1d(3)
        self.layers = nn.ModuleList([self.first, self.norm, self.norm])
        self.scales = nn.ParameterDict({"a": nn.Parameter(torch.ones(3))})
        self.shared = nn.Module()
        self.shared.scales = self.scales

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).tanh()) * self.shared.scales["a"]
        return self.layers[2](self.layers[0](y)) * self.scales["a"]


def loss(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).square().sum(1)


def test_a_layer_under_several_names_has_its_own_parameters_back() -> None:
    module = Twice().double().eval()
    held = [*module.named_parameters(), *module.named_buffers()]
    model_fn, params = gf.from_module(module, loss)
    x = torch.randn(4, 3, dtype=torch.float64)
    norms = gf.ghost_norm(model_fn, params, x)
    again = [*module.named_parameters(), *module.named_buffers()]
    assert [k for k, _ in again] == [k for k, _ in held]
    assert all(a is b for (_, a), (_, b) in zip(again, held, strict=True))
    for i in range(4):
        grads = torch.autograd.grad(loss(module, x[i : i + 1]).sum(), list(module.parameters()))
        expected = torch.cat([g.flatten() for g in grads]).norm()
        torch.testing.assert_close(norms[i], expected)


def test_what_an_optimizer_holds_is_trained() -> None:
    module = Twice().eval()
    model_fn, params = gf.from_module(module, loss)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.randn(4, 3)
    before = model_fn(params, x)
    step = gf.ghost_value_and_grad(model_fn, params, x, x)
    gf.accumulate_grads(module, step.grads)
    optimizer.step()
    assert (model_fn(params, x) - before).abs().min() > 1e-4
    torch.testing.assert_close(model_fn(params, x), loss(module, x))


class Factors(nn.Module):
    """Parameters that ops take transposed, as LoRA's factors of an embedding are."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        table, out = (torch.randn(s, generator=generator) for s in ((2, 7), (3, 2)))
        self.table = nn.Parameter(table.T.contiguous().T if transposed else table)
        self.out = nn.Parameter(out)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.embedding(x, self.table.T) @ self.out.T


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_gradients_lie_in_memory_as_their_parameters_do(kind: str, transposed: bool) -> None:
    """Kernels of fused optimizers read both from first to last."""
    x, y = torch.randint(7, (5, 4)), torch.randn(5, 4, 3)
    ours, theirs = Factors(transposed), Factors(transposed)

    def squares(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (module(batch[0]) - batch[1]).square().mean((1, 2))

    optimizers = [
        getattr(torch.optim, kind)(m.parameters(), 0.1, fused=True) for m in (ours, theirs)
    ]
    model_fn, params = gf.from_module(ours, squares)
    for _ in range(3):
        gf.accumulate_grads(ours, gf.ghost_value_and_grad(model_fn, params, (x, y), (x, y)).grads)
        squares(theirs, (x, y)).mean().backward()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert p.grad.stride() == q.grad.stride()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def compiled_in_place() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].compile()
    return module


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.compile(nn.Linear(3, 3)), r"compiled\._orig_mod"),
        (lambda: nn.Sequential(torch.compile(nn.Linear(3, 3))), "'0' in Sequential has been"),
        (compiled_in_place, "'1' in Sequential has been compiled"),
    ],
)
def test_compiled_modules_are_refused_at_once(make: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(gf.ParamsError, match=said):
        gf.from_module(make(), loss)


def lines_of_lending(raise_at: int) -> tuple[Callable[..., object], list[int]]:
    """A trace function that interrupts at the k-th line of the code that swaps tensors."""
    count = [0]

    def local(frame: FrameType, event: str, arg: object) -> Callable[..., object]:
        if event == "line":
            count[0] += 1
            if count[0] == raise_at:
                raise KeyboardInterrupt
        return local

    def start(frame: FrameType, event: str, arg: object) -> Callable[..., object] | None:
        name = frame.f_code.co_filename
        swaps = name.endswith(("_named_member_accessor.py", "stateless.py"))
        swaps |= frame.f_code.co_name in ("_lend", "lend_to")
        return local if swaps else None

    return start, count


@pytest.mark.parametrize("changed", [False, True], ids=["as it was", "with another layer"])
def test_an_interrupt_anywhere_leaves_the_module_its_own_tensors(changed: bool) -> None:
    """Every line of the code that lends tensors is interrupted once; it is torch's where the module
    has other layers than it had."""
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    model_fn, params = gf.from_module(module, loss)
    if changed:
        module.append(nn.Identity())
    held = {name: id(x) for name, x in [*module.named_parameters(), *module.named_buffers()]}
    others = {name: torch.randn_like(x) for name, x in params.items()}
    x = torch.randn(3, 2)
    interrupted = 0
    for line in range(1, 2000):
        start, count = lines_of_lending(line)
        before = sys.gettrace()
        sys.settrace(start)
        try:
            model_fn(others, x)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(before)
        now = {name: id(x) for name, x in [*module.named_parameters(), *module.named_buffers()]}
        assert now == held, line
        if count[0] < line:
            break
    assert interrupted == line - 1 > 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_during_a_call_has_free_locks_and_its_own_tensors() -> None:
    module = nn.Linear(2, 2)
    entered, release = threading.Event(), threading.Event()

    def slow_loss(module: nn.Module, x: Tensor) -> Tensor:
        entered.set()
        release.wait(30)
        return module(x).square().sum(1)

    model_fn, params = gf.from_module(module, slow_loss)
    quick_fn, _ = gf.from_module(module, loss)
    held = {name: id(x) for name, x in module.named_parameters()}
    x = torch.randn(3, 2)
    quick = gf.ghost_norm(quick_fn, params, x)
    thread = threading.Thread(target=model_fn, args=({k: v + 1 for k, v in params.items()}, x))
    thread.start()
    assert entered.wait(30)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            same = {name: id(x) for name, x in module.named_parameters()} == held
            code = 0 if same and torch.equal(gf.ghost_norm(quick_fn, params, x), quick) else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    done = 0
    while not done and time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.02)
    release.set()
    thread.join()
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child waits for a lock of a thread that it does not have")
    assert os.waitstatus_to_exitcode(status) == 0
