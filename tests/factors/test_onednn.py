"""Matrix products by oneDNN: the same numbers, where they are asked for, and nowhere else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import ghostfunc as gf
from benchmarks.live_bytes import LiveBytes
from ghostfunc._factors import cost, matmul as matmul_room
from ghostfunc._factors.beside_total import dots_and_total
from ghostfunc._factors.contract import add_total, dot, materialize, total
from ghostfunc._factors.factor import Outer
from ghostfunc._factors.matmul import SPEED, _made_by_amd, add_product, chosen, product, speed

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x.contiguous(),
    "columns": lambda x: x.mT.contiguous().mT,
    "rows with gaps": lambda x: F.pad(x, (3, 2))[..., 3:-2],
    "columns with gaps": lambda x: F.pad(x.mT, (1, 4))[..., 1:-4].mT,
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one row for all": lambda x: x[..., :1, :].expand(x.shape),
}


class Ops(TorchDispatchMode):
    """Counts products by oneDNN, and looks at how what it multiplies by lies in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.count += 1
            assert args[1].is_contiguous() or args[1].mT.is_contiguous(), "read element by element"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any product of float32 matrices by oneDNN, on any processor, however small."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(matmul_room, "_is_faster", lambda: True)
    monkeypatch.setattr(matmul_room, "LEAST_OPS", 1)
    monkeypatch.setattr(matmul_room, "LEAST_SIZE", 1)
    monkeypatch.setattr(matmul_room, "OPS_PER_COPIED_ELEMENT", 0)


def close(actual: Tensor, expected: Tensor) -> bool:
    """To the rounding of float32 sums."""
    return bool((actual.double() - expected).norm() <= 2e-6 * expected.norm())


sizes = st.integers(1, 40)
layouts = st.sampled_from(list(LAYOUTS))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(m=sizes, k=sizes, n=sizes, left=layouts, right=layouts, stack=st.sampled_from([0, 1, 3]))
def test_every_layout(
    m: int, k: int, n: int, left: str, right: str, stack: int, onednn: None
) -> None:
    lead = (stack,) if stack else ()
    x, y = LAYOUTS[left](torch.randn(*lead, m, k)), LAYOUTS[right](torch.randn(*lead, k, n))
    expected = x.double() @ y.double()
    with Ops() as ops:
        found = product(x, y)
        assert found.is_contiguous()
        assert close(found, expected)
        out = torch.full_like(expected, torch.nan, dtype=torch.float32)
        assert product(x, y, out=out) is out
        assert close(out, expected)
    assert ops.count == 2 * max(1, stack)
    if not stack:
        into = torch.randn(m, n)
        expected += into.double()
        add_product(into, x, y)
        assert close(into, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stack_times_a_matrix(layout: str, onednn: None) -> None:
    x, y = LAYOUTS[layout](torch.randn(3, 7, 11)), torch.randn(11, 5)
    assert close(product(x, y), x.double() @ y.double())


def test_what_is_not_a_number_stays_where_it_is(onednn: None) -> None:
    x, y = torch.randn(20, 30), torch.randn(30, 40)
    x[3, 4], x[7, 8] = torch.nan, torch.inf
    torch.testing.assert_close(product(x, y), x @ y, equal_nan=True)
    assert product(x, y)[3].isnan().all()
    assert product(x, y).isnan().any(1).sum() == 1


# --- who takes it -----------------------------------------------------------------------------


def test_factors(onednn: None) -> None:
    for p, d in [(40, 30), (30, 40)]:
        factor, u = Outer(torch.randn(3, 20, p), torch.randn(3, 20, d)), torch.randn(p, d)
        g = factor.left.double().mT @ factor.right.double()
        with Ops() as ops:
            assert close(materialize(factor), g)
            assert close(total(factor), g.sum(0))
            assert close(dot(factor, u), (g * u).sum((1, 2)))
            into = torch.ones(p, d)
            add_total(factor, into)
            assert close(into, 1 + g.sum(0))
        assert ops.count >= 6


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_dots_beside_a_total(
    into: bool, rows: int, onednn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "share_dots", lambda *_, **__: True)
    monkeypatch.setattr(cost, "ROWS_ELEMENTS", rows * 30)
    factor = Outer(torch.randn(3, 20, 40), torch.randn(3, 20, 30))
    us = [torch.randn(40, 30) for _ in range(2)]
    g = factor.left.double().mT @ factor.right.double()
    before = torch.randn(40, 30) if into else None
    expected = g.sum(0) + (0 if before is None else before.double())
    dots, whole = dots_and_total(factor, us, with_total=True, into=before)
    assert whole is not None
    assert close(whole, expected)
    assert before is None or whole is before
    for got, u in zip(dots, us, strict=True):
        assert close(got, (g * u).sum((1, 2)))


class Net(nn.Module):
    """A tied table, and layers that go up and down."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 24)
        self.up, self.down = nn.Linear(24, 64), nn.Linear(64, 24)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return F.linear(x + self.down(torch.tanh(self.up(x))), self.table.weight)


def loss(module: nn.Module, ids: Tensor) -> Tensor:
    logits = module(ids[:, :-1]).transpose(1, 2)
    return F.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)


def quantities(module: nn.Module) -> dict[str, Any]:
    model_fn, params = gf.from_module(module, loss)
    train, val = (torch.randint(50, (n, 33), generator=_seeded()) for n in (8, 2))
    step = gf.ghost_value_and_grad(model_fn, params, train, val)
    projection = gf.kronecker_projection(
        params, rank_total=64, rank_min=4, kind="rademacher", seed=0
    )
    return {
        "dots": gf.ghost_dot_prod(model_fn, params, train, val),
        "dots of two runs": gf.ghost_dot_prod(model_fn, params, train, val, chunk_size=8),
        "pairs": gf.ghost_dot_prod(model_fn, params, train, val, reduction="none"),
        "step": step.dot_prods,
        **{f"grad {name}": g for name, g in step.grads.items()},
        "norms": gf.ghost_norm(model_fn, params, train),
        "gram": gf.ghost_gram(model_fn, params, train),
        "clipped": gf.ghost_clipped_grad(model_fn, params, train, max_norm=0.1).grads["up.weight"],
        "projected": gf.ghost_project(model_fn, params, train, projection),
    }


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_every_quantity(form: None, onednn: None) -> None:
    module = Net()
    with Ops() as ops:
        found = quantities(module)
    assert ops.count > 50
    expected = quantities(module.double())
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert close(value, expected[name]), name


def test_switched_off(onednn: None) -> None:
    before = torch.backends.mkldnn.set_flags(False)
    try:
        with Ops() as ops:
            quantities(Net())
    finally:
        torch.backends.mkldnn.set_flags(before[0])
    assert not ops.count


# --- who does not -----------------------------------------------------------------------------


def test_other_types(onednn: None) -> None:
    x, y = torch.randn(20, 30), torch.randn(30, 40)
    with Ops() as ops:
        for dtype in (torch.float64, torch.bfloat16):
            assert product(x.to(dtype), y.to(dtype)).dtype == dtype
        product(torch.empty(0, 30), y)
        product(x, torch.randn(30))
        product(x, y.expand(2, 30, 40))
    assert not ops.count


def test_small_ones_and_narrow_ones(onednn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(20, 30), torch.randn(30, 40)
    for name, least in [("LEAST_OPS", 20 * 30 * 40), ("LEAST_SIZE", 20)]:
        with monkeypatch.context() as patch, Ops() as ops:
            patch.setattr(matmul_room, name, least)
            product(x, y)
            assert ops.count == 1
            patch.setattr(matmul_room, name, least + 1)
            product(x, y)
            assert ops.count == 1


def test_copies_must_pay(onednn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `[20, 30]` by columns, times `[30, 40]`, 600 elements change their places; of `[40, 30]`
    times `[30, 5]` it is 5 * 70, by way of the transposed product."""
    large, small = torch.randn(20, 30), torch.randn(40, 30)
    for x, n, copied in [(large, 40, 600), (small, 5, 350)]:
        y, work = torch.randn(30, n), len(x) * 30 * n
        for limit, count in [(work // copied, 1), (work // copied + 1, 0)]:
            with monkeypatch.context() as patch, Ops() as ops:
                patch.setattr(matmul_room, "OPS_PER_COPIED_ELEMENT", limit)
                found = product(LAYOUTS["columns"](x), y)
            assert ops.count == count
            assert found.is_contiguous()
            assert close(found, x.double() @ y.double())
            with monkeypatch.context() as patch, Ops() as ops:
                patch.setattr(matmul_room, "OPS_PER_COPIED_ELEMENT", limit)
                product(LAYOUTS["rows with gaps"](x), y)
            assert ops.count == 1


def test_large_results_are_put_in_place_by_blocks(
    onednn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "ROWS_ELEMENTS", 3 * 40)
    x, y = torch.randn(20, 30), torch.randn(30, 40)
    with Ops() as ops, LiveBytes() as memory:
        out = product(x, y, out=torch.empty(20, 40))
        add_product(out, x, y)
    assert ops.count == 14
    assert memory.peak == 4 * (20 * 40 + 3 * 40)
    assert close(out, 2 * x.double() @ y.double())


def test_where_derivatives_are_wanted(onednn: None) -> None:
    x, y = torch.randn(20, 30), torch.randn(30, 40)
    with Ops() as ops:
        w = y.clone().requires_grad_()
        product(x, w).sum().backward()
        grad = torch.func.grad(lambda y: product(x, y).sum())(y)
        each = torch.vmap(lambda row: product(row[None], y))(x)
        _, moved = torch.func.jvp(lambda y: product(x, y), (y,), (torch.ones_like(y),))
    assert not ops.count
    expected = x.sum(0)[:, None].expand(30, 40)
    torch.testing.assert_close(w.grad, expected)
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(each[:, 0], x @ y)
    torch.testing.assert_close(moved, x @ torch.ones_like(y))
    with forward_ad.dual_level(), Ops() as ops:
        for grad_mode in (torch.enable_grad, torch.no_grad):
            with grad_mode():
                dual = product(x, forward_ad.make_dual(y, torch.ones_like(y)))
                tangent = forward_ad.unpack_dual(dual).tangent
                torch.testing.assert_close(tangent, x @ torch.ones_like(y))
    assert not ops.count
    with torch.no_grad(), Ops() as ops:
        assert close(product(x, w), x.double() @ y.double())
    assert ops.count == 1


def test_programs_that_are_recorded(onednn: None) -> None:
    """They may be run, and derived, where oneDNN is not."""

    def multiplied(x: Tensor, y: Tensor) -> Tensor:
        return product(x, y)

    x, y = torch.randn(20, 30), torch.randn(30, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        programs = [
            torch.jit.trace(multiplied, (x, y)),
            make_fx(multiplied)(x, y),
            make_fx(multiplied, tracing_mode="fake")(x, y),
        ]
    for program in programs:
        w = y.clone().requires_grad_()
        with Ops() as ops:
            program(x, w).sum().backward()
        assert not ops.count
        torch.testing.assert_close(w.grad, x.sum(0)[:, None].expand(30, 40))
    compiled = torch.compile(multiplied, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), x @ y)


def test_methods_of_kept_gradients_are_compiled() -> None:
    model_fn, params = gf.from_module(nn.Linear(8, 5), lambda m, x: m(x).pow(2).mean((1, 2)))
    book = gf.factored_grads(model_fn, params, torch.randn(4, 3, 8))
    compiled = torch.compile(lambda: book.gram(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), book.gram())


def test_autocast_rounds_no_contraction(onednn: None) -> None:
    x, y = torch.randn(20, 30), torch.randn(30, 40)
    with torch.autocast("cpu", torch.bfloat16), Ops() as ops:
        assert product(x, y).dtype == torch.float32
    assert ops.count == 1


def test_sizes_that_do_not_fit_are_told_by_torch(onednn: None) -> None:
    x, y = torch.randn(20, 30), torch.randn(31, 40)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        product(x, y)
    with pytest.raises(RuntimeError):
        product(x.expand(2, 20, 30), torch.randn(3, 30, 40))


def test_what_costs_are_made_of(onednn: None) -> None:
    x = torch.randn(3, 4)
    assert speed(x) == SPEED
    assert speed(x.bfloat16()) == SPEED  # widened first
    assert speed(x, torch.bfloat16) == cost.BFLOAT16_SPEED
    assert speed(x, torch.float16) == speed(x.double()) == 1
    assert torch.vmap(lambda row: row * speed(row))(x).equal(x)
    with FakeTensorMode():
        assert speed(torch.empty(3, 4)) == 1


def test_where_it_is_the_faster_one() -> None:
    """It is chosen on the machines it was measured on, and its speed is what costs are made of."""
    by_onednn = chosen()
    assert speed(torch.empty(1)) == (SPEED if by_onednn else 1)
    assert speed(torch.empty(1, dtype=torch.float64)) == 1
    known = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert by_onednn == (known and wide and _made_by_amd())
    x, y = torch.randn(512, 512), torch.randn(512, 512)
    with Ops() as ops:
        product(x, y)
    assert ops.count == by_onednn
