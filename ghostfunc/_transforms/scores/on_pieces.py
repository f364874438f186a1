"""Train samples of each rank and validation samples of all of them in one run of a sharded model.

A run moves the parameters twice, and a gradient of them once. The validation gradient of all ranks'
samples, in a run of its own, is moved when it is summed up and when it is gathered again. Models
moved for a step:

    two runs           7    the parameters twice, u summed up; the parameters twice, u gathered, the
                            training gradient summed up
    one run, own rows  5    the parameters twice, u summed up and gathered, the training gradient
                            summed up
    one run, all rows  3    the parameters twice, the training gradient summed up

With its own rows, a rank computes what it computes in two runs. Its summand of `u` comes up
parameter by parameter, in the very backward pass that `u` is needed in, and is summed up there.
With all rows every rank computes the validation samples of all. Then `u` comes up whole, and is not
moved at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ghostfunc._base.documents import Documents
from ghostfunc._base.errors import NonFiniteLossError
from ghostfunc._base.processes.in_step import InStep
from ghostfunc._base.processes.pieces import (
    batch_of_all,
    copies_of_samples,
    few_of_all,
    held_whole,
    in_step,
    samples_of_all,
)
from ghostfunc._base.program import Program
from ghostfunc._base.remembered import Recent, memory
from ghostfunc._base.text_number import number_of_text
from ghostfunc._base.trees import batch_size, flatten
from ghostfunc._base.types import PyTree
from ghostfunc._quantities.readers import OneRunReader
from ghostfunc._transforms.scores.one_run import (
    OneRunResult,
    OneRuns,
    Sharing,
    company_of,
    difference_of,
    run_joined,
    shared_or_why_not,
)


def in_one_run_of_all(asked: Sharing) -> OneRunResult | None:
    """Scores of this rank's train samples with the gradient of all ranks' validation samples, and
    this rank's pieces of the training gradient; None where there is a reason for two runs.

    All ranks decide alike. Every rank computes the validation samples of all where no rank then has
    more than twice the samples that are its own, and its own elsewhere. The reasons for two runs
    are those of one process (`shared_or_why_not`).
    """
    program, ranks = asked.program, in_step(asked.program.model_fn)
    assert ranks is not None
    own = _outline(asked.train, asked.val)
    if ranks.any("asking whether batches are alike", own is None):
        return None
    counts = few_of_all(program.model_fn, asked.train, asked.val, str(own))
    if counts:
        asked = replace(asked, val=batch_of_all(program.model_fn, asked.val, counts))
    shared = _agreed(ranks, asked)
    if shared is None:
        return None
    n, m = batch_size(asked.train), batch_size(asked.val)
    copies = 1 if counts else copies_of_samples(program.model_fn)
    theirs = m if counts else samples_of_all(program.model_fn, m)
    scales = (
        1 / samples_of_all(program.model_fn, n) if asked.grads else 1.0,
        1 / (theirs * copies if asked.mean else copies),
    )
    readers = [_reader(asked, n, None if counts else ranks, name) for name in program.spec.names]
    try:
        found = run_joined(asked, readers, shared, scales)
    except NonFiniteLossError as error:
        raise NonFiniteLossError(
            f"Of {n} train samples of this rank, and after them {_told(counts, m)}: {error}"
        ) from error
    company = company_of(found.trace)
    if company is not None:
        _found(program).put(asked.key, company)
    if ranks.any("asking whether all ranks' samples share a run", company is not None):
        return None
    return found.of_train(n, scales[0], per_param=asked.per_param)


def _reader(asked: Sharing, n: int, ranks: InStep | None, name: str) -> OneRunReader:
    """Of one parameter; with `ranks`, every rank's validation samples have a summand of `u`."""
    place = f"adding up the validation gradient of {name!r}"
    sum_up = None if ranks is None else partial(ranks.add_up, place)
    return OneRunReader(n, asked.contract_dtype, sum_up=sum_up)


def _told(counts: Sequence[int], m: int) -> str:
    """Whose validation samples share a run with train samples."""
    if not counts:
        return f"its {m} validation samples"
    own = " + ".join(map(str, counts))
    return f"all ranks' {m} validation samples, {own} of ranks 0 to {len(counts) - 1}"


def _found(program: Program) -> Recent[object, list[int] | str]:
    return memory(program.model_fn, OneRuns).found


def _agreed(ranks: InStep, asked: Sharing) -> list[int] | None:
    """The parameters with several uses, where they are the same on all ranks and no rank has a
    reason for two runs."""
    program, key = asked.program, asked.key
    known = _found(program).get(key)
    if ranks.any("asking whether all ranks know these batches", known is None):
        whole = held_whole(program, asked.train)
        with ranks.apart("looking at new batches"):
            if known is None:
                known = _found(program).put(key, _look(replace(asked, program=whole)))
        del whole
    told = ranks.all("comparing the uses of parameters", number_of_text(str(known)))
    return None if isinstance(known, str) or len(set(told)) > 1 else known


def _look(asked: Sharing) -> list[int] | str:
    if batch_size(asked.val) == 1 and asked.check == "never":  # code may treat one in its own way
        return "a single validation sample, and no proof"
    return shared_or_why_not(asked.program, asked.train, asked.val, least=0)


def _outline(train: PyTree, val: PyTree) -> str | None:
    """What validation batches of all ranks have to have in common to be one batch; None where this
    rank's is not one with its train samples."""
    if isinstance(val, Documents) or difference_of(train, val) is not None:
        return None
    leaves, treedef = flatten(val)
    first: dict[int, int] = {}
    ties = [first.setdefault(id(x), i) for i, x in enumerate(leaves)]
    rows = [(tuple(x.shape[1:]), str(x.dtype), x.device.type) for x in leaves]
    return f"{treedef} of rows {rows}, {ties}"
