"""Scores of a whole run: pure functions on a state that can be saved with `torch.save`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ghostfunc._base.errors import OptionError
from ghostfunc._base.options import check_type, check_whole
from ghostfunc._base.reprs import brief

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""Dtypes of ids."""

State: TypeAlias = dict[str, Tensor]
"""`ids [s]` in ascending order, `values [s, sets]` and `counts [s]`: plain tensors."""


class Scores(NamedTuple):
    """What a run made of its samples.

    Attributes:
        ids: ids of the samples met, ascending, `[s]`.
        values: what each changed every validation loss by, `[s, sets]`, float64. Negative: it
            lowered the loss, the sample helped.
        counts: how often each was trained on, `[s]`.
    """

    ids: Int[Tensor, " s"]
    values: Float[Tensor, "s sets"]
    counts: Int[Tensor, " s"]

    def __repr__(self) -> str:
        return brief("Scores", **self._asdict())


def init(num_sets: int = 1) -> State:
    """The state before the first step.

    Args:
        num_sets: number of validation sets.

    Returns:
        A dict of tensors; `torch.save` it, and `torch.load(..., weights_only=True)` gives it back.
    """
    check_whole("num_sets", num_sets)
    empty = torch.zeros(0, dtype=torch.int64, device="cpu")
    return {
        "ids": empty,
        "values": torch.zeros(0, num_sets, dtype=torch.float64, device="cpu"),
        "counts": empty.clone(),
    }


def update(state: State, ids: Tensor | Sequence[int], values: Float[Tensor, "n sets"]) -> State:
    """Add the values of one step (or of one micro-batch) to the state.

    Args:
        state: from `init` or `update`; it stays as it is.
        ids: an integer per sample, `[n]`, whatever names it. Epochs and repeats add up.
        values: `[n, sets]`, or `[n]` for one set: `gf.shapley.step(...).values`.

    Returns:
        A new state.

    Raises:
        OptionError: shapes or dtypes that do not fit, or values that are not finite: where a loss
            scaler skips a step, leave its values out, for they changed nothing.
    """
    _check_state("state", state)
    ids = _whole(ids)
    check_type("values", values, Tensor, f"a tensor [{len(ids)}, sets], a row per id")
    if values.is_complex():
        raise OptionError(f"values must be real numbers; got {values.dtype}.")
    values = values.detach().cpu().double()
    values = values[:, None] if values.ndim == 1 else values
    num_sets = state["values"].shape[1]
    if values.shape != (len(ids), num_sets):
        raise OptionError(
            f"values must be [{len(ids)}, {num_sets}], a row per id and a column per validation "
            f"set; got {tuple(values.shape)}."
        )
    finite = values.isfinite().all(1)
    if not bool(finite.all()):
        raise OptionError(
            f"The values of samples {ids[~finite].tolist()[:5]} are not finite. If a loss scaler "
            "skipped this step, leave its values out; else look at these samples."
        )
    met, inverse = torch.unique(ids.long(), return_inverse=True)
    state = _with_rows(state, met)
    rows = torch.searchsorted(state["ids"], met)[inverse]
    return {
        "ids": state["ids"],
        "values": state["values"].index_add(0, rows, values),
        "counts": state["counts"].index_add(0, rows, torch.ones_like(rows)),
    }


def merge(state: State, other: State) -> State:
    """The sum of two states, of two processes that trained on different samples, say."""
    _check_state("state", state)
    _check_state("other", other)
    if state["values"].shape[1] != other["values"].shape[1]:
        raise OptionError(
            f"States of {state['values'].shape[1]} and {other['values'].shape[1]} validation sets "
            "cannot be merged."
        )
    state = _with_rows(state, other["ids"])
    rows = torch.searchsorted(state["ids"], other["ids"])
    return {
        "ids": state["ids"],
        "values": state["values"].index_add(0, rows, other["values"]),
        "counts": state["counts"].index_add(0, rows, other["counts"]),
    }


def finalize(state: State) -> Scores:
    """The scores: what every sample changed the validation losses by, over all its steps."""
    _check_state("state", state)
    return Scores(state["ids"], state["values"], state["counts"])


def _whole(ids: Tensor | Sequence[int]) -> Tensor:
    """`ids` as a tensor `[n]` of integers on the CPU; `OptionError` for what is none."""
    check_type("ids", ids, (Tensor, Sequence), "a tensor or a list of integers")
    try:
        found = torch.as_tensor(ids, device="cpu").cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"ids must be integers [n]: {error}.") from error
    none = not isinstance(ids, Tensor) and not len(ids)
    if found.ndim != 1 or not (none or found.dtype in WHOLE):
        raise OptionError(f"ids must be integers [n]; got {tuple(found.shape)} of {found.dtype}.")
    return found.long()


def _check_state(name: str, state: object) -> None:
    """Raise `OptionError` unless it is a state."""
    if not isinstance(state, Mapping) or set(state) != {"ids", "values", "counts"}:
        raise OptionError(
            f"{name} is a {type(state).__name__}; expected what gf.shapley.init or update returns."
        )
    ids, values, counts = (state[key] for key in ("ids", "values", "counts"))
    dtypes = [x.dtype if isinstance(x, Tensor) else None for x in (ids, values, counts)]
    if dtypes == [torch.int64, torch.float64, torch.int64]:
        s = len(ids) if ids.ndim == 1 else -1
        alike = values.ndim == 2 and len(values) == s and counts.shape == (s,)
        if alike and bool((ids[1:] > ids[:-1]).all()):
            return
    raise OptionError(
        f"{name} is no state: its ids must ascend, `[s]`, with values `[s, sets]` in float64 and "
        "counts `[s]`. Take it from gf.shapley.init, update or merge alone."
    )


def _with_rows(state: State, ids: Tensor) -> State:
    """The state with rows, of zeros where new, for all of `ids` (ascending, without repeats)."""
    new = ids[~torch.isin(ids, state["ids"], assume_unique=True)]
    if not len(new):
        return state
    own = torch.ones(len(state["ids"]) + len(new), dtype=torch.bool, device="cpu")
    own[torch.searchsorted(state["ids"], new) + torch.arange(len(new), device="cpu")] = False

    def widened(x: Tensor) -> Tensor:
        out = x.new_zeros(len(own), *x.shape[1:])
        out[own] = x
        return out

    grown = {name: widened(x) for name, x in state.items()}
    grown["ids"][~own] = new
    return grown
