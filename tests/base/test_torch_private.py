"""The private names of torch that ghostfunc leans on exist, and say what they are taken for."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from ghostfunc._base import torch_private as private


def test_transforms_are_seen() -> None:
    seen: list[tuple[bool, int, bool, bool, bool]] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(
            (
                private.in_transform(),
                private.depth(),
                private.in_forward_mode(),
                private.wrapped(x),
                private.batched(x),
            )
        )
        return (x * 1.0).sum()

    x = torch.ones(2, 3)
    look(x)
    torch.func.grad(look)(x)
    torch.vmap(look)(x)
    torch.func.jvp(look, (x,), (x,))
    assert seen == [
        (False, 0, False, False, False),
        (True, 1, False, True, False),
        (True, 1, False, True, True),
        (True, 1, True, True, False),
    ]


def test_innermost_and_address() -> None:
    x = torch.ones(2, 3)
    found = []
    torch.vmap(torch.func.grad(lambda y: found.append(private.innermost(y)) or y.sum()))(x)
    assert type(found[0]) is torch.Tensor
    assert private.address(found[0]) == private.address(x) == private.address(x[1:].view(3)[:0])


def test_watched() -> None:
    watched: list[bool] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        watched.append(private.watched())
        return x + 1

    x = torch.ones(2)
    look(x)
    make_fx(look)(x)
    with forward_ad.dual_level():
        look(x)
    assert watched == [False, True, True]


def test_modes_and_versions() -> None:
    class Mode(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.calls += 1
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with Mode() as mode:
        assert list(private.function_modes()) == [mode]
        with private.without_torch_functions():
            before = private.version(x)
            x.add_(1)
            assert mode.calls == 0
            with private.with_torch_functions():
                x.add_(1)
    assert mode.calls == 1
    assert private.version(x) == before + 2


def test_no_grad_arrives_as_one_function() -> None:
    arrived = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            arrived.append(func)
            return func(*args, **(kwargs or {}))

    with Mode(), torch.no_grad():
        pass
    assert arrived.count(private.SET_GRAD_ENABLED) == len(arrived) == 2


def test_types() -> None:
    assert issubclass(nn.BatchNorm2d, private.BatchNorm)
    assert issubclass(nn.SyncBatchNorm, private.BatchNorm)
    assert isinstance(torch.ops.aten.add.Tensor, private.OpOverload)
    layer = nn.BatchNorm1d(2)
    own = private.tensors_of_module(layer)
    assert [set(x) for x in own] == [
        set(dict(layer.named_parameters())),
        set(dict(layer.named_buffers())),
    ]
    with FakeTensorMode():
        assert private.symbolic(torch.ones(2))
    assert not private.symbolic(torch.ones(2))


def test_onednn() -> None:
    if private.has_onednn_linear():
        x, w = torch.randn(3, 4), torch.randn(5, 4)
        torch.testing.assert_close(private.onednn_linear(x, w), x @ w.mT)
    assert isinstance(private.onednn_allowed(), bool)


def test_ops_and_compiler() -> None:
    assert callable(private.PACK_PADDED_SEQUENCE)
    assert callable(private.GROUPED_MM)
    assert callable(private.nonstrict_trace(lambda x: x))
    function = private.constant_at_compile_time(lambda: 1)
    assert vars(function)["_dynamo_marked_constant"] is True


def test_modules_that_are_compiled_or_hooked() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    assert private.uncompiled(module) is module
    assert private.uncompiled(torch.compile(module)) is module
    assert not private.compiled_in_place(module)
    module.compile()
    assert private.compiled_in_place(module)
    assert private.hooks_within(module) == 0
    module[0].register_forward_hook(lambda m, x, y: None)
    module.register_forward_pre_hook(lambda m, x: None)
    assert private.hooks_within(module) == 2
