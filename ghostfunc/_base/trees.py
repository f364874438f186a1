"""Pytrees of parameters and batches: one place that flattens, names and validates them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from ghostfunc._base.dense_gradients import dense
from ghostfunc._base.errors import BatchError, ParamsError, TransformError
from ghostfunc._base.locks import ForkSafeLock
from ghostfunc._base.processes.dtensors import described, is_dtensor
from ghostfunc._base.torch_private import PLAIN
from ghostfunc._base.types import PyTree

NAMESPACE = "ghostfunc"
"""Where optree keeps types of mappings, so that nobody else's trees change."""

_registering = ForkSafeLock()
_registered: set[type] = set()


def flatten(tree: PyTree) -> tuple[list[Any], optree.PyTreeSpec]:
    """Leaves and structure of any pytree; None is a leaf."""
    leaves, treedef = optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)
    return leaves, treedef


def map_leaves(function: Callable[[Any], Any], tree: PyTree) -> PyTree:
    """The same tree with every leaf x replaced by `function(x)`."""
    return optree.tree_map(function, tree, namespace=NAMESPACE)


def unflatten(treedef: optree.PyTreeSpec, leaves: Iterable[Any]) -> Any:
    """The inverse of `flatten`."""
    return optree.tree_unflatten(treedef, leaves)


def tensors_of(tree: PyTree) -> list[Tensor]:
    """The tensors among the leaves of any pytree."""
    return [x for x in flatten(tree)[0] if isinstance(x, Tensor)]


def map_tensors(f: Callable[[Tensor], Tensor], batch: PyTree) -> PyTree:
    """`f` of every leaf of a batch. Leaves that are one tensor stay one."""
    made: dict[int, Tensor] = {}

    def of_leaf(x: Tensor) -> Tensor:
        if id(x) not in made:
            made[id(x)] = f(x)
        return made[id(x)]

    return map_leaves(of_leaf, batch)


def first_tensor(args: PyTree, kwargs: PyTree) -> Tensor | None:
    """The first tensor that a call is given, in a list or by keyword, too."""
    return next(iter(tensors_of((args, kwargs))), None)


@dataclass(frozen=True)
class ParamSpec:
    """The structure of `params`: how to unflatten it, and what each leaf is called."""

    treedef: optree.PyTreeSpec
    names: tuple[str, ...]

    def unflatten(self, leaves: Sequence[object]) -> PyTree:
        return optree.tree_unflatten(self.treedef, leaves)


def _fault(x: Tensor) -> str | None:
    """Why no gradient can be taken with such a tensor, and what to do; None if one can."""
    if type(x) not in PLAIN and is_dtensor(x):
        return (
            f"{described(x)}: pass the tensor itself, x.full_tensor(), or, of a module that "
            "fully_shard has sharded, the params that gf.from_module returns"
        )
    odd = x.is_nested or x.is_quantized or x.is_meta or x.is_inference()
    if not odd and x.layout == torch.strided:
        return None
    if x.is_nested:
        return "a nested tensor: pad it (torch.nested.to_padded_tensor) and pass a mask"
    if x.is_quantized:
        return "quantized: pass x.dequantize()"
    if x.layout != torch.strided:
        return f"sparse ({x.layout}): pass x.to_dense()"
    if x.is_meta:
        return 'on the device "meta", where tensors have no values: materialize it first'
    return "an inference tensor, which autograd refuses: pass x.clone(), made outside of it"


def flatten_params(params: PyTree, what: str = "params") -> tuple[list[Tensor], ParamSpec]:
    """Leaves of `params` and their structure; `ParamsError` if a leaf is no float tensor. `what`
    the caller calls them."""
    if torch.is_inference_mode_enabled():
        raise TransformError(
            "Gradients cannot be taken inside torch.inference_mode(). Leave it for this call; "
            "torch.no_grad() is no obstacle."
        )
    paths, leaves, treedef = optree.tree_flatten_with_path(params)
    names = tuple([".".join(map(str, path)) or what for path in paths])
    if not leaves:
        raise ParamsError(
            f"{what} has no tensors in it. Every quantity is about gradients with respect to "
            "params: pass at least one tensor. (from_module tracks only parameters with "
            "requires_grad=True.)"
        )
    for name, leaf in zip(names, leaves, strict=True):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and _fault(leaf) is None:
            continue
        if not isinstance(leaf, Tensor):
            raise ParamsError(
                f"{what} leaf {name!r} is a {type(leaf).__name__}, not a tensor. Keep settings "
                "out of params: close over them in model_fn."
            )
        if leaf.is_complex():
            raise ParamsError(
                f"{what} leaf {name!r} has dtype {leaf.dtype}, which is complex. Gradients are "
                "with respect to real numbers: pass torch.view_as_real(x), and have model_fn call "
                "torch.view_as_complex."
            )
        if not leaf.is_floating_point():
            raise ParamsError(
                f"{what} leaf {name!r} has dtype {leaf.dtype}; gradients need a floating-point "
                "dtype. Close over integer tensors in model_fn instead."
            )
        raise ParamsError(f"{what} leaf {name!r} is {_fault(leaf)}.")
    return leaves, ParamSpec(treedef, names)


def flatten_like(
    tree: PyTree, leaves: Sequence[Tensor], spec: ParamSpec, what: str
) -> list[Tensor]:
    """Leaves of `tree`, which must have the structure and the shapes of `params`."""
    paths, got, treedef = optree.tree_flatten_with_path(tree)
    if treedef != spec.treedef:
        names = {".".join(str(k) for k in path) or "params" for path in paths}
        missing = [n for n in spec.names if n not in names]
        extra = sorted(names.difference(spec.names))
        raise ParamsError(
            f"{what} must be a pytree like params. Missing: {missing or 'nothing'}; "
            f"not in params: {extra or 'nothing'}; structure given: {treedef}."
        )
    got = [dense(x) if isinstance(x, Tensor) else x for x in got]
    for name, leaf, param in zip(spec.names, got, leaves, strict=True):
        if not isinstance(leaf, Tensor) or leaf.shape != param.shape:
            found = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ParamsError(
                f"{what} leaf {name!r} must have the shape of the parameter, "
                f"{tuple(param.shape)}, but is {found}."
            )
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise ParamsError(
                f"{what} leaf {name!r} has dtype {leaf.dtype}; expected a floating-point dtype "
                f"such as the parameter's, {param.dtype}. Convert it: x.to({param.dtype})."
            )
    return got


def _know_mappings(batch: PyTree) -> None:
    """Have optree look into mappings that are no dict, such as `UserDict` and the `BatchEncoding`
    of tokenizers; `model_fn` gets mappings of the same type."""
    while unknown := {
        type(x) for x in flatten(batch)[0] if isinstance(x, Mapping) and type(x) not in _registered
    }:
        with _registering:
            for cls in unknown - _registered:
                _register(cls)


def _register(cls: type) -> None:
    def unflatten_mapping(keys: Any, values: Iterable[Any]) -> Any:
        return cls(dict(zip(keys, values, strict=True)))

    def flatten_mapping(x: Any) -> tuple[list[Any], tuple[Any, ...], tuple[Any, ...]]:
        # In one order, as dicts are flattened: batches with the same keys have one structure.
        keys = tuple(sorted(x, key=str))
        return [x[k] for k in keys], keys, keys

    optree.register_pytree_node(cls, flatten_mapping, unflatten_mapping, namespace=NAMESPACE)
    _registered.add(cls)


def batch_size(batch: PyTree, what: str = "batch") -> int:
    """The number of samples in `batch`; `BatchError` unless every leaf agrees on it.

    Every public function begins here: from then on all mappings in the batch are known.
    """
    _know_mappings(batch)
    paths, leaves, _ = optree.tree_flatten_with_path(batch, namespace=NAMESPACE)
    if not leaves:
        raise BatchError(f"{what} has no tensors in it; expected a pytree of [n, ...] tensors.")
    sizes: dict[str, int] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        name = what + "".join(f"[{k!r}]" for k in path)
        if not isinstance(leaf, Tensor):
            raise BatchError(
                f"{name} is a {type(leaf).__name__}; every leaf of a batch must be a tensor with "
                "a leading sample axis. Close over other things in model_fn, or drop them."
            )
        if (fault := _fault(leaf)) is not None:
            raise BatchError(f"{name} is {fault}.")
        if leaf.ndim == 0:
            raise BatchError(
                f"{name} is a scalar tensor: it has no sample axis. Expand it to [n], or close "
                "over it in model_fn."
            )
        sizes[name] = int(leaf.shape[0])  # a number of its own in a compiled program too
    counts = set(sizes.values())
    if len(counts) > 1:
        listing = ", ".join(f"{k}: {v}" for k, v in sizes.items())
        raise BatchError(f"The leaves of {what} hold unequal numbers of samples ({listing}).")
    n = counts.pop()
    if n == 0:
        raise BatchError(f"{what} is empty (its leaves have 0 samples); pass at least one sample.")
    return n


def check_samples(batch: PyTree, n: int, what: str) -> None:
    """Raise `BatchError` unless the batch holds n samples."""
    found = batch_size(batch, what)
    if found != n:
        raise BatchError(
            f"{what} holds {found} samples, made of {n}: expected one row for each, in their order."
        )


def yields_batches(val: object) -> bool:
    """Whether this is an iterable of batches (a loader, a generator) rather than one batch: a list
    of tensors is a batch, and so is every tree that optree looks into."""
    if isinstance(val, (Tensor, Mapping, str, bytes)) or not isinstance(val, Iterable):
        return False
    leaves, treedef = flatten(val)
    return treedef.is_leaf() and leaves[0] is val


def take(batch: PyTree, index: Sequence[int]) -> PyTree:
    """The samples `index` of `batch`, as a new batch. Leaves that are one tensor stay one:
    attention asks whether its key is its value."""
    return map_tensors(lambda x: x[torch.tensor(list(index), device=x.device)], batch)
