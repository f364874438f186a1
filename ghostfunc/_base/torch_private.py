"""Private names of torch, all of them, each with the reason it is needed.

Other files import from here. A test asserts that every name exists, so that a new torch release
that drops one fails in one place.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef as CustomOpDef  # ops of torch.library
from torch._ops import (
    HigherOrderOperator as HigherOrderOperator,  # torch.cond and its kin
    OpOverload as OpOverload,  # one overload of such an op
    OpOverloadPacket as OpOverloadPacket,  # all of its overloads
)
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.autograd.graph import _MultiHandle
from torch.nn.modules import batchnorm
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import _pytree as _pytree  # the trees that torch.compile takes apart
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # documented there

F = TypeVar("F", bound=Callable[..., Any])

# --- modules -------------------------------------------------------------------------------------

BatchNorm = batchnorm._BatchNorm
"""Batch normalisation of any number of dimensions, the synchronised one included."""


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside what `torch.compile` made of it; the module itself if it made nothing."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # not loaded: it has made nothing
    if compiler is not None and isinstance(module, compiler.OptimizedModule):
        inside: nn.Module = module._orig_mod
        return inside
    return module


def modules_within(module: nn.Module) -> list[nn.Module]:
    """The modules of `module.modules()`, in another order, at a tenth of the cost."""
    found: dict[int, nn.Module] = {}
    level = {id(module): module}
    while level:
        found.update(level)
        held = [x for part in level.values() for x in part._modules.values()]
        level = {id(x): x for x in held if x is not None and id(x) not in found}
    return list(found.values())


def hooks_within(module: nn.Module) -> int:
    """The number of forward hooks in a module: with other hooks it is another program."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def gradient_hooks(p: Tensor) -> bool:
    """Whether `backward()` would call hooks on the gradient of a parameter."""
    return bool(p._backward_hooks) or bool(p._post_accumulate_grad_hooks)


def compiled_in_place(module: nn.Module) -> bool:
    """Whether `module.compile()` has been called."""
    return module._compiled_call_impl is not None


# --- fully_shard --------------------------------------------------------------------------------
# Nothing public tells FSDP2's hooks from others, nor the policies that a module was sharded with.


def is_fsdp_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` was called with this very module."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    return loaded is not None and isinstance(module, loaded.FSDPModule)


def all_gather(out: Tensor, x: Tensor, group: Any) -> None:
    """`out` becomes the ranks' `x`, one after the other. Its name depends on the release."""
    names = vars(torch.distributed)
    names["all_gather_single" if "all_gather_single" in names else "all_gather_into_tensor"](
        out, x, group=group
    )


def reduce_scatter(out: Tensor, x: Tensor, group: Any) -> None:
    """`out` becomes this rank's part of the sum of the ranks' `x`."""
    names = vars(torch.distributed)
    names["reduce_scatter_single" if "reduce_scatter_single" in names else "reduce_scatter_tensor"](
        out, x, group=group
    )


def fsdp_hooks(unit: Any) -> list[tuple[dict[int, Any], int]]:
    """FSDP2's own forward hooks of a module: tables of hooks, and the number in each."""
    state = unit._get_fsdp_state()
    found: dict[tuple[int, int], tuple[dict[int, Any], int]] = {}
    for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
        for one in handle.handles if isinstance(handle, _MultiHandle) else (handle,):
            hooks = one.hooks_dict_ref()
            if hooks is unit._forward_pre_hooks or hooks is unit._forward_hooks:
                found[id(hooks), one.id] = hooks, one.id
    return list(found.values())


def fsdp_policies(unit: Any) -> tuple[Any, list[Any]]:
    """The mixed-precision policy of a module, and whether its parameters are kept on the CPU."""
    state = unit._get_fsdp_state()
    params = [p for group in state._fsdp_param_groups for p in group.fsdp_params]
    return state._mp_policy, [p.offload_to_cpu for p in params]


def fsdp_meshes(module: nn.Module) -> dict[int, Any]:
    """The mesh that `fully_shard` has cut each parameter over, by the parameter's identity. Where
    the parameter lies tells which it is: loading may have put another one there."""
    units: list[Any] = list(filter(is_fsdp_unit, module.modules()))
    return {
        id(getattr(p._module_info.module, p._module_info.param_name)): p.mesh_info.mesh
        for unit in units
        for group in unit._get_fsdp_state()._fsdp_param_groups
        for p in group.fsdp_params
    }


def plan_hooks(module: nn.Module) -> list[tuple[dict[int, Any], int]]:
    """The forward hooks that tensor parallel plans have given a module, as `fsdp_hooks`. Functions
    of torch's own, they are known by where they were defined."""
    return [
        (hooks, number)
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for number, hook in hooks.items()
        if inspect.isfunction(hook) and hook.__module__.startswith("torch.distributed.tensor")
    ]


# --- process groups ------------------------------------------------------------------------------


def group_store(group: Any) -> Any:
    """The store by which the processes of a group met: it outlives connections between them."""
    return torch.distributed.distributed_c10d._get_process_group_store(group)


# --- torch.func ---------------------------------------------------------------------------------
# torch.func does not say whether a transform is active, nor what a wrapped tensor wraps.


def in_transform() -> bool:
    """Whether a `torch.func` transform is active."""
    active: bool = torch._C._functorch.peek_interpreter_stack() is not None
    return active


def depth() -> int:
    """The number of active `torch.func` transforms."""
    interpreter: Any = torch._C._functorch.peek_interpreter_stack()
    return 0 if interpreter is None else int(interpreter.level())


def in_forward_mode() -> bool:
    """Whether one of the active transforms is `torch.func.jvp`."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


def watched() -> bool:
    """Whether an operation is derived or recorded by more than plain autograd."""
    return (
        in_transform()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None  # torch.jit
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None  # make_fx
    )


Autocasting: TypeAlias = tuple[tuple[str, bool, torch.dtype], ...]


def autocasting(*devices: str) -> Autocasting:
    """Whether, and to what, `torch.autocast` rounds now."""
    return tuple(
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in dict.fromkeys(("cpu", *devices))
        if device == "cpu" or torch.amp.is_autocast_available(device)
    )


@contextmanager
def cast_as(state: Autocasting) -> Iterator[None]:
    """What is computed here is rounded as it was at another time."""
    if state == autocasting(*(device for device, _, _ in state)):
        yield
        return
    with ExitStack() as stack:
        for device, enabled, dtype in state:
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
        yield


def unrounded(x: Tensor) -> AbstractContextManager[None]:
    """What is computed here, of tensors like `x`, has their own dtypes, whatever `torch.autocast`
    the caller or the model is in."""
    state = autocasting(x.device.type)
    if not any(enabled for _, enabled, _ in state):
        return nullcontext()
    return cast_as(tuple((device, False, dtype) for device, _, dtype in state))


def wrapped(x: Tensor) -> bool:
    """Whether a transform has wrapped `x`."""
    inside: bool = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return inside


def differentiated(x: Tensor) -> bool:
    """Whether an active transform takes derivatives of the tensors that are made of `x`."""
    return wrapped(x) and x.requires_grad


def batched(x: Tensor) -> bool:
    """Whether `torch.vmap` has wrapped `x`."""
    inside: bool = torch._C._functorch.is_batchedtensor(x)
    return inside


def batched_within(x: Tensor) -> bool:
    """Whether one of the active `torch.vmap` has wrapped `x`, or what is inside of it."""
    while wrapped(x):
        if batched(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def innermost(x: Tensor) -> Tensor:
    """The tensor without the wrappers of transforms."""
    while wrapped(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def address(x: Tensor) -> int:
    """The address of a tensor's memory; tensors with a common one are views of each other. That of
    a sparse tensor is its values'."""
    x = innermost(x)
    if x.layout != torch.strided:
        x = x._values() if x.layout == torch.sparse_coo else x.values()
    return x.untyped_storage().data_ptr()


def followed() -> bool:
    """Whether tensors may be a `torch.func` transform's, or have tangents of forward mode."""
    inside: Any = torch._C._functorch.peek_interpreter_stack()
    return inside is not None or forward_ad._current_level >= 0


def dual(x: Tensor) -> bool:
    """Whether `torch.autograd.forward_ad` follows `x`, outside `torch.func`."""
    if forward_ad._current_level < 0 or in_transform():
        return False
    return forward_ad.unpack_dual(x).tangent is not None


# --- modes ---------------------------------------------------------------------------------------
# A region that runs again must know which modes watch it, and hide its own work from them.

SET_GRAD_ENABLED: Any = torch._C._set_grad_enabled
"""The function that arrives when `torch.no_grad` is entered or left, also by an exception."""


def function_modes() -> Sequence[TorchFunctionMode]:
    """The active torch-function modes, outermost first."""
    return _get_current_function_mode_stack()


_modes_active: Callable[[], int] = torch._C._len_torch_function_stack


def ambient(device: str) -> tuple[Hashable, ...]:
    """What the caller has set that makes another program of the same calls: the default dtype, what
    `torch.autocast` rounds to, and the types of torch-function modes, which may return what they
    please: of the products that ghost mode makes, too, and of none that autograd makes."""
    rounded = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    modes = tuple(map(type, foreign_modes())) if _modes_active() else ()
    return torch.get_default_dtype(), rounded, modes


def foreign_modes() -> list[TorchFunctionMode]:
    """The active modes that are neither torch's own, which change no value, nor this package's."""
    own = "torch.", "ghostfunc."
    return [x for x in function_modes() if not f"{type(x).__module__}.".startswith(own)]


def without_torch_functions() -> AbstractContextManager[None]:
    """No mode sees what is called inside."""
    return torch._C.DisableTorchFunction()


def with_torch_functions() -> AbstractContextManager[None]:
    """Inside `without_torch_functions`: modes see calls again."""
    return torch._C._EnableTorchFunction()


def version(x: Tensor) -> int:
    """A number that every in-place write to the tensor raises."""
    (number,) = versions([x])
    return number


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """The `version` of each tensor; 0 for a tensor of inference mode, which torch does not count
    writes to."""
    inside = map(innermost, tensors) if in_transform() else tensors
    return [0 if x.is_inference() else x._version for x in inside]


def tensors_of_module(module: nn.Module) -> list[dict[str, Any]]:
    """The module's own dicts of parameters and buffers, for identity without copies."""
    return [module._parameters, module._buffers]


def lend_to(module: nn.Module, attribute: str, x: Tensor) -> bool:
    """Put a tensor in place of the module's own; False if the module has none of that name."""
    held = module._parameters if attribute in module._parameters else module._buffers
    if attribute not in held:
        return False
    held[attribute] = x  # type: ignore[assignment]
    return True


# --- ops that arrive in programs ----------------------------------------------------------------

PACK_PADDED_SEQUENCE: Any = torch._pack_padded_sequence
GROUPED_MM: Any = torch._grouped_mm
"""What transformers' mixture-of-experts layers called before `F.grouped_mm`."""


def divide_all(tensors: Sequence[Tensor], by: float) -> list[Tensor]:
    """Every tensor divided by a number, in one call where no transform watches."""
    if not tensors or in_transform():
        return [x / by for x in tensors]
    return list(torch._foreach_div(list(tensors), by))


# --- the compiler ---------------------------------------------------------------------------------


PLAIN = frozenset((Tensor, nn.Parameter))
"""The types of ordinary tensors: no subclass, no one that a transform or the compiler made."""


def symbolic(x: Tensor) -> bool:
    """Whether `x` stands for a tensor without values, as the compiler's do."""
    return isinstance(innermost(x), (FakeTensor, FunctionalTensor))


def any_symbolic(tensors: Sequence[Tensor]) -> bool:
    """Whether one of the tensors is symbolic. Outside transforms none is wrapped."""
    if PLAIN.issuperset(map(type, tensors)) and not in_transform():
        return False
    return any(map(symbolic, tensors))


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal; of symbols, whether that is known without tying a compiled
    program to it."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # loads sympy

    return statically_known_true(a == b)


def known(size: int) -> int:
    """A size; where it is a symbol of a compiled program for all lengths, its value in the call at
    hand. Costs are weighed with that, which does not tie the program to it."""
    if not isinstance(size, torch.SymInt):
        return size
    from torch.fx.experimental.symbolic_shapes import optimization_hint  # loads sympy

    return optimization_hint(size)


def constant_at_compile_time(function: F) -> F:
    """Have the compiler call a function while it reads the program, and take its result for a
    constant: `torch.compiler.assume_constant_result`, without loading the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def nonstrict_trace(function: F) -> F:
    """Have the compiler record what a function does without reading its Python. Loads it."""
    return torch._dynamo.nonstrict_trace(function)  # type: ignore[return-value]


# --- oneDNN ---------------------------------------------------------------------------------------
# The only way to choose the library that multiplies two matrices; inductor takes the same op.


def onednn_allowed() -> bool:
    """Whether `torch.backends.mkldnn` is switched on."""
    allowed: bool = torch._C._get_mkldnn_enabled()
    return allowed


def has_onednn_linear() -> bool:
    """Whether torch was built with oneDNN's linear layer."""
    return torch._C._dispatch_has_kernel("mkldnn::_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.mT` by oneDNN."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out
