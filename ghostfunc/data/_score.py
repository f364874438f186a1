"""Scores of every sample of a data set."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from ghostfunc._base.errors import BatchError, NonFiniteLossError, OptionError
from ghostfunc._base.fingerprint import frozen
from ghostfunc._base.options import (
    check_dataset,
    check_flags,
    check_model_fn,
    check_path,
    check_type,
    one_of,
)
from ghostfunc._base.processes.pieces import refuse_pieces
from ghostfunc._base.trees import (
    check_samples,
    flatten,
    flatten_like,
    flatten_params,
    map_tensors,
    yields_batches,
)
from ghostfunc._base.types import ModelFn, PyTree, Randomness
from ghostfunc._transforms.grads import direction as gradient_of
from ghostfunc.data._batches import (
    Collate,
    Dataset,
    Length,
    check_functions,
    check_limits,
    group as group_by_length,
    width,
)
from ghostfunc.data._budget import find_token_budget, padded_tokens
from ghostfunc.data._columns import check_wanted, columns_of, named
from ghostfunc.data._directions import as_before, outline
from ghostfunc.data._errors import ResumeError
from ghostfunc.data._parts import Columns, Parts, digest, has_recipe, read_recipe
from ghostfunc.data._processes import Processes
from ghostfunc.data._progress import Progress, progress_bar
from ghostfunc.data._table import Scores

PART = 128
"""Samples of a part: what is written at once, and within which samples are sorted by length."""

SAME = 1e-3
"""How far a score that is computed again may be from the stored one, relative to the largest."""


@dataclass(frozen=True)
class _Run:
    """All that decides the numbers."""

    model_fn: ModelFn
    params: PyTree
    dataset: Dataset
    directions: Mapping[str, PyTree]
    quantities: tuple[str, ...]
    collate: Collate
    length: Length | None
    batch_size: int | None
    randomness: Randomness

    def lengths(self, rows: range) -> list[int]:
        return [1 if self.length is None else self.length(self.dataset[i]) for i in rows]

    def batch(self, rows: Sequence[int]) -> PyTree:
        device = flatten_params(self.params)[0][0].device
        batch = self.collate([self.dataset[i] for i in rows])
        check_samples(batch, len(rows), "what collate returned")
        return map_tensors(lambda x: x.to(device), batch)

    def columns(self, rows: Sequence[int]) -> dict[str, Tensor]:
        try:
            return columns_of(
                self.model_fn,
                self.params,
                self.batch(rows),
                self.directions,
                self.quantities,
                self.randomness,
            )
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"Among the samples {list(rows)}, in order: {error}") from None


def score_dataset(
    model_fn: ModelFn,
    params: PyTree,
    dataset: Dataset,
    *,
    val: PyTree | None = None,
    direction: PyTree | None = None,
    quantities: Sequence[str] = ("dot", "loss"),
    collate: Collate | None = None,
    length: Length | None = None,
    token_budget: int | None = None,
    batch_size: int | None = None,
    ids: Sequence[Hashable] | None = None,
    resume: str | Path | None = None,
    recipe: Mapping[str, Any] | None = None,
    progress: bool = False,
    randomness: Randomness = "error",
    group: Any = None,
) -> Scores:
    """Score every sample of a data set against a validation gradient.

        dot_i = <g_i, u>,  cosine_i = dot_i / (||g_i|| ||u||),  u = mean_j d loss_val[j] / d params

    Samples of like length share a batch, within parts of 128 samples; the batches depend on the
    data and the options alone. Only one batch is in memory at a time. The first batch of every
    shape is proved, and takes several times as long: `gf.data.padded(..., max_length=...)` makes
    few shapes.

    Args:
        model_fn: pure, `model_fn(params, batch) -> losses [n]`.
        params: pytree of floating-point tensors.
        dataset: map-style.
        val: a batch, or an iterable of batches such as `gf.data.batches(...)`; or a dict of those,
            each of which gets columns of its own.
        direction: instead, a pytree like `params`; or a dict of those.
        quantities: which columns: "dot", "cosine", "norm", "loss".
        collate: makes a batch, a pytree of tensors `[n, ...]`, of a list of samples; by default
            `torch.utils.data.default_collate`.
        length: tokens of a sample, for batches of like length; 1 by default.
        token_budget: the most tokens of a batch, padding included. By default found from what a
            sample takes (`gf.data.find_token_budget`), and told in `facts`.
        batch_size: the most samples of a batch.
        ids: of the samples; by default their indices.
        resume: a folder. Parts that are done are written to it, and read from it by a later call
            with the same model, data and options: a run that was stopped gives the same bits.
        recipe: what else decides the numbers (a hash of the data), to be the same at a resumption.
        progress: show a bar with what is under way, tokens per second and about how long it takes
            yet (needs tqdm).
        randomness: "error" or "different".
        group: a process group of `torch.distributed`, whose ranks share the work: whoever is done
            with a part of 128 samples takes the next. All of them are given the same, and get all
            scores. The direction and the token budget are those of rank 0. With `resume`, give all
            ranks one folder; a resumed run may have another number of ranks.

    Returns:
        `Scores`: columns `dot_higher_helps`, `cosine_higher_helps`, `gradient_norm`, `loss`, as
        asked for; of several directions `dot_higher_helps/name`. Units: dots are loss^2 per
        parameter^2, norms loss per parameter.

    Raises:
        BatchError: the data set is empty, or a batch is not one.
        NonFiniteLossError: a sample has no finite loss; the message lists the batch.
        OptionError: an option has a value that does not exist.
        RankError: with a `group`, another rank failed, is gone, or was given something else.
        ResumeError: the folder holds another run, or is damaged.

    Example:
        scores = gf.score_dataset(model_fn, params, pool, val=target, collate=gf.data.padded(0))
        best = scores.top(100).ids
    """
    processes = Processes(group, "score_dataset")
    with processes.phase("reading its arguments") as phase:
        refuse_pieces(model_fn, "gf.data.score_dataset")
        check_wanted(quantities)
        check_limits(token_budget, batch_size)
        one_of("randomness", randomness, ("error", "different"))
        check_model_fn(model_fn)
        check_dataset(dataset)
        check_flags(progress=progress)
        check_functions(collate, length)
        _check_resume(resume, recipe)
        n = len(dataset)
        if not n:
            raise BatchError(f"the data set ({type(dataset).__name__}) is empty; expected samples.")
        ids = range(n) if ids is None else ids
        _check_ids(ids, n)
        us = _directions(model_fn, params, val, direction, quantities, randomness)
        wanted = tuple(dict.fromkeys(quantities))
        how = collate or default_collate, length, batch_size, randomness
        run = _Run(model_fn, params, dataset, us, wanted, *how)
        folder = None if resume is None else Path(resume)
        if token_budget is None:
            token_budget = _budget(run, folder)
        if phase is not None:
            phase.alike = f"{n} samples, {_outline(us)}"
    token_budget = processes.of_first(token_budget, "agreeing on the token budget")
    us = processes.tensors_of_first(us, "agreeing on the direction")
    facts = {"samples": n, "token_budget": token_budget, "quantities": list(wanted)}
    done = _computed(replace(run, directions=us), facts, folder, recipe or {}, processes, progress)
    parts_of = {name: np.concatenate([part[name] for part in done]) for name in done[0]}
    return Scores(ids, {name: torch.from_numpy(x) for name, x in parts_of.items()}, facts)


def _outline(us: Mapping[str, PyTree]) -> str:
    """Names and shapes of directions."""
    leaves = {name: flatten_params(u)[0] for name, u in us.items()}
    return str({k: [(tuple(x.shape), str(x.dtype)) for x in row] for k, row in leaves.items()})


def _computed(
    run: _Run,
    facts: dict[str, Any],
    folder: Path | None,
    more: Mapping[str, Any],
    processes: Processes,
    progress: bool,
) -> list[Columns]:
    """The columns of all parts, in order."""
    n, budget = facts["samples"], facts["token_budget"]
    ranges = [range(start, min(start + PART, n)) for start in range(0, n, PART)]
    parts: Parts | None = None
    done: dict[int, Columns] = {}
    with processes.phase("opening the run") as phase:
        alone = phase is None
        recipe = {} if folder is None and alone else _recipe(run, facts, more)
        if phase is not None:
            phase.alike = str(recipe)
        if folder is not None and processes.first:
            own = {name: outline(u) for name, u in run.directions.items()}
            if has_recipe(folder):
                own = as_before(read_recipe(folder).get("directions"), own)
            recipe["directions"] = own
            parts = Parts(folder, recipe)
            found = {number: parts.load(number) for number in range(len(ranges))}
            done = {number: x for number, x in found.items() if x is not None}
            _compare(run, ranges, budget, done)
    recipe = processes.of_first(recipe, "agreeing on what the run is")
    missing = [number for number in range(len(ranges)) if number not in done]
    missing = processes.of_first(missing, "looking what is done")
    with (
        processes.phase("scoring"),
        progress_bar(n, "scoring", shown=progress and processes.first) as bar,
        processes.dealing(len(missing)) as dealt,
    ):
        if folder is not None and parts is None:  # the first has written what the run is
            parts = Parts(folder, recipe)
        bar.advance(sum(map(len, ranges)) - sum(len(ranges[i]) for i in missing), 0)
        taken = 0
        for at in dealt:
            bar.advance(sum(len(ranges[i]) for i in missing[taken:at]), 0)  # by others
            done[missing[at]] = _part(run, ranges[missing[at]], budget, bar)
            taken = at + 1
            if parts is not None:
                parts.save(missing[at], done[missing[at]])
        bar.advance(sum(len(ranges[i]) for i in missing[taken:]), 0)
    done = processes.joined(done, "bringing scores together")
    return [done[number] for number in range(len(ranges))]


def in_parts(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """The batches of a whole data set, in order: indices of samples."""
    found: list[list[int]] = []
    for start in range(0, len(lengths), PART):
        own = group_by_length(lengths[start : start + PART], token_budget, None)
        found += [[start + i for i in at] for at in own]
    return found


def _check_resume(resume: object, recipe: object) -> None:
    if resume is not None:
        check_path("resume", resume)
    if recipe is not None:
        check_type("recipe", recipe, Mapping, "a dict of what else decides numbers, or None")


def _check_ids(ids: Any, n: int) -> None:
    check_type("ids", ids, (Sequence, Tensor, np.ndarray), "a sequence of names of samples")
    if len(ids) != n:
        raise OptionError(f"{len(ids)} ids for {n} samples; expected one each.")


def _directions(
    model_fn: ModelFn,
    params: PyTree,
    val: PyTree,
    direction: PyTree,
    quantities: Sequence[str],
    randomness: Randomness,
) -> dict[str, PyTree]:
    """Every direction, by the end of its columns' names."""
    if val is None and direction is None and not {"dot", "cosine"} & set(quantities):
        return {}
    if (val is None) == (direction is None):
        given = "both" if val is not None else "neither"
        raise OptionError(f"Give exactly one of val and direction; {given} was given.")
    if val is not None:
        if isinstance(val, Mapping) and not val:
            raise BatchError("val is empty: expected a batch, batches, or a dict of those.")
        several = isinstance(val, Mapping) and all(
            isinstance(x, Mapping) or yields_batches(x) for x in val.values()
        )
        return {
            name: gradient_of(model_fn, params, batch, randomness=randomness)
            for name, batch in named(val, alone=not several).items()
        }
    leaves, spec = flatten_params(params)
    several = isinstance(direction, Mapping) and flatten(direction)[1] != flatten(params)[1]
    us = named(direction, alone=not several)
    for name, u in us.items():
        flatten_like(u, leaves, spec, f"direction{name}")
    return us


def _budget(run: _Run, folder: Path | None) -> int:
    """What the folder says, or what a sample says."""
    if folder is not None and has_recipe(folder):
        found = read_recipe(folder).get("token_budget")
        if not isinstance(found, int):
            raise ResumeError(f"{folder}/run.json has no token_budget. Choose another folder.")
        return found
    lengths = run.lengths(range(min(len(run.dataset), 2)))
    batch = run.batch(range(len(lengths)))
    return find_token_budget(run.model_fn, run.params, batch, tokens=padded_tokens(lengths))


def _recipe(run: _Run, facts: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **facts,
        "batch_size": run.batch_size,
        "part": PART,
        "params": digest(run.params),
        "frozen": frozen(run.model_fn, run.params),
        **more,
    }


def _compare(
    run: _Run, ranges: Sequence[range], token_budget: int, done: Mapping[int, Columns]
) -> None:
    """Compute a batch of the last finished part again: samples that were put in or left out have
    moved those at the end."""
    if not done or run.randomness == "different":  # random numbers are others each time
        return
    last = max(done)
    rows = ranges[last]
    at = group_by_length(run.lengths(rows), token_budget, run.batch_size)[-1]
    _check_same(run, done[last], [rows[i] for i in at], at)


def _part(run: _Run, rows: range, token_budget: int, bar: Progress) -> Columns:
    lengths = run.lengths(rows)
    columns: Columns = {}
    for at in group_by_length(lengths, token_budget, run.batch_size):
        longest = max(lengths[i] for i in at)
        bar.begin(f"{len(at)} of up to {longest:,} tokens", (len(at), width(longest)))
        for name, x in run.columns([rows[i] for i in at]).items():
            if name not in columns:
                columns[name] = np.empty(len(rows), dtype=x.numpy().dtype)
            columns[name][at] = x.numpy()
        bar.advance(len(at), padded_tokens([lengths[i] for i in at]))
    return columns


def _check_same(run: _Run, found: Columns, rows: Sequence[int], at: list[int]) -> None:
    """Raise unless the samples of one batch get the scores that are stored."""
    for name, x in run.columns(rows).items():
        if name not in found:
            raise ResumeError(f"the finished part has no column {name!r}. Choose another folder.")
        stored = torch.from_numpy(found[name])
        off = float((x.double() - stored[at].double()).abs().max())
        if off > SAME * float(stored.abs().max()):
            raise ResumeError(
                f"samples {list(rows)[:5]} were computed again, and {name} differs from what is "
                f"stored by {off:.3g}: the data, the model or its code have changed since. Choose "
                "another folder."
            )
