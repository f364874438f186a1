"""The numbers of one batch: losses, dot products, cosines and norms from one backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ghostfunc._base.errors import OptionError
from ghostfunc._base.trees import tensors_of
from ghostfunc._base.types import ModelFn, PyTree, Randomness
from ghostfunc._quantities.quantity import Dot, Quantity, SqNorm
from ghostfunc._transforms.vjp import ghost_vjp
from ghostfunc.data._table import HELPS

Wanted: TypeAlias = Literal["dot", "cosine", "norm", "loss"]
WANTED: tuple[Wanted, ...] = ("dot", "cosine", "norm", "loss")


def check_wanted(quantities: Sequence[str]) -> None:
    """Raise `OptionError` unless these are names of quantities."""
    if not isinstance(quantities, Iterable):
        raise OptionError(
            f"quantities is a {type(quantities).__name__}; expected a tuple of names."
        )
    wrong = [q for q in quantities if q not in WANTED]
    if isinstance(quantities, str) or wrong or not quantities:
        raise OptionError(
            f"quantities={quantities!r}: expected one or more of {', '.join(map(repr, WANTED))}, "
            "in a tuple."
        )


def columns_of(
    model_fn: ModelFn,
    params: PyTree,
    batch: PyTree,
    directions: Mapping[str, PyTree],
    quantities: Sequence[str],
    randomness: Randomness,
) -> dict[str, Float[Tensor, " n"]]:
    """The columns of one batch, in the order of `quantities`, then of `directions`."""
    read: dict[str, Quantity] = {}
    if {"dot", "cosine"} & set(quantities):
        read = {f"dot{name}": Dot(u) for name, u in directions.items()}
    if {"norm", "cosine"} & set(quantities):
        read["square"] = SqNorm()
    # A pass without taps has losses only; a cheap quantity keeps one way for all.
    out = ghost_vjp(model_fn, params, batch, read or {"square": SqNorm()}, randomness=randomness)
    totals = {name: torch.stack(tensors_of(x)).sum(0) for name, x in out.values.items()}
    columns: dict[str, Tensor] = {}
    for quantity in quantities:
        if quantity == "loss":
            columns["loss"] = out.losses.detach()
        elif quantity == "norm":
            columns["gradient_norm"] = totals["square"].sqrt()
        else:
            for name, u in directions.items():
                dots = totals[f"dot{name}"]
                if quantity == "cosine":
                    dots = _cosines(dots, totals["square"].sqrt(), norm_of(u))
                columns[f"{quantity}{HELPS}{name}"] = dots
    return {name: x.detach().cpu() for name, x in columns.items()}


def _cosines(dots: Tensor, norms: Tensor, norm: float) -> Tensor:
    lengths = norms * norm
    return torch.where(lengths > 0, dots / lengths.clamp(min=torch.finfo(dots.dtype).tiny), 0)


def norm_of(u: PyTree) -> float:
    """`||u||` of a pytree of tensors."""
    return float(torch.stack([x.double().square().sum() for x in tensors_of(u)]).sum().sqrt())


def named(given: Any, alone: bool) -> dict[str, Any]:
    """Directions or validation batches by the ends of their columns' names."""
    return {"": given} if alone else {f"/{name}": x for name, x in given.items()}
