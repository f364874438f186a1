"""What train gradients are dotted with: one validation batch or direction, or a dict of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ghostfunc._base.errors import BatchError, OptionError
from ghostfunc._base.trees import ParamSpec, batch_size, flatten, flatten_like, map_leaves
from ghostfunc._base.types import PyTree
from ghostfunc._transforms.factored import FactoredGrads


@dataclass(frozen=True)
class Targets:
    """Validation batches, or directions; one of the two is empty.

    Attributes:
        names: what they are called; None where one was given by itself.
        vals: batches.
        directions: leaves of pytrees like `params`, or validation gradients kept factored.
    """

    names: tuple[Any, ...] | None
    vals: tuple[PyTree, ...]
    directions: tuple[list[Tensor] | FactoredGrads, ...]

    def __len__(self) -> int:
        return len(self.vals) + len(self.directions)

    def title(self, k: int) -> str:
        """What the caller knows one of the directions by."""
        return "direction" if self.names is None else f"direction[{self.names[k]!r}]"

    def named(self, results: Sequence[Any]) -> Any:
        """One result for each of them, as the caller gave them: alone, or in a dict."""
        if self.names is None:
            (alone,) = results
            return alone
        return dict(zip(self.names, results, strict=True))


def make_targets(
    val: PyTree | None,
    direction: PyTree | None,
    train: PyTree,
    leaves: Sequence[Tensor],
    spec: ParamSpec,
) -> Targets:
    """Exactly one of `val` and `direction`, validated."""
    if (val is None) == (direction is None):
        given = "both" if val is not None else "neither"
        raise OptionError(f"Give exactly one of val and direction; {given} was given.")
    if val is not None:
        names = tuple(val) if _several_batches(val, train) else None
        vals = (val,) if names is None else tuple(val.values())
        for name, batch in zip(names or (None,), vals, strict=True):
            batch_size(batch, "val" if names is None else f"val[{name!r}]")
        return Targets(names, vals, ())
    if isinstance(direction, dict) and _several_directions(direction, leaves, spec):
        us = [_direction(u, leaves, spec, f"direction[{k!r}]") for k, u in direction.items()]
        return Targets(tuple(direction), (), tuple(us))
    return Targets(None, (), (_direction(direction, leaves, spec, "direction"),))


def _direction(
    direction: PyTree, leaves: Sequence[Tensor], spec: ParamSpec, what: str
) -> list[Tensor] | FactoredGrads:
    if not isinstance(direction, FactoredGrads):
        return flatten_like(direction, leaves, spec, what)
    given = [tuple(x.shape) for x in direction.leaves]
    wanted = [tuple(x.shape) for x in leaves]
    if given != wanted:
        raise OptionError(
            f"{what} holds gradients of other parameters than these: of shapes {given}, expected "
            f"{wanted}. Make it by gf.factored_grads(model_fn, params, val) with these params."
        )
    return direction


def _several_directions(
    direction: dict[Any, PyTree], leaves: Sequence[Tensor], spec: ParamSpec
) -> bool:
    """Whether every value is like `params`; then the dict, a finite tree, is not."""
    wanted = flatten(spec.unflatten(leaves))[1]
    return bool(direction) and all(
        isinstance(u, FactoredGrads) or flatten(u)[1] == wanted for u in direction.values()
    )


def _several_batches(val: PyTree, train: PyTree) -> bool:
    """Whether `val` is a dict of batches rather than a batch.

    The structure of `train` tells: what is structured like it is a batch. A finite tree is not both
    structured exactly like `train` and a dict of such trees. Where nothing matches exactly (a key
    more or less), all keys in common must agree, and only one reading may be left.
    """
    if not isinstance(val, dict) or not val:
        return False
    wanted = flatten(train)[1]
    if flatten(val)[1] == wanted:
        return False
    if all(flatten(x)[1] == wanted for x in val.values()):
        return True
    one, several = _alike(val, train), all(_alike(x, train) for x in val.values())
    if one == several:
        raise BatchError(
            f"val may be one batch or a dict of batches, and {'both' if one else 'neither'} can be "
            f"meant here: val is {_outline(val)}, train is {_outline(train)}. A batch has the "
            "structure of train (it may have other keys besides); in a dict of batches every value "
            "has. Or pass direction=gf.direction(model_fn, params, val), which takes one batch of "
            "any structure."
        )
    return several


def _alike(x: PyTree, train: PyTree) -> bool:
    """Whether two trees agree in what they have in common, and have something in common."""
    if isinstance(x, Mapping) and isinstance(train, Mapping):
        common = x.keys() & train.keys()
        return bool(common) and all(_alike(x[k], train[k]) for k in common)
    if isinstance(x, Tensor) or isinstance(train, Tensor):
        return isinstance(x, Tensor) and isinstance(train, Tensor)
    return flatten(x)[1] == flatten(train)[1]


def _outline(tree: PyTree) -> str:
    outlined = map_leaves(lambda x: _Shape(x), tree)
    return repr(outlined)


class _Shape:
    """Prints as a tensor's shape."""

    def __init__(self, x: object) -> None:
        self._text = str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__

    def __repr__(self) -> str:
        return self._text
