"""Train samples of each rank and validation samples of all of them in one run of a sharded model.

A run moves the parameters twice, and a gradient of them once. The validation gradient of all ranks'
samples, in a run of its own, is moved when it is summed up and when it is gathered again:

    two runs    the parameters twice, u summed up; the parameters twice, u gathered, the training
                gradient summed up
    one run     the parameters twice, the training gradient summed up

In one run every rank computes the validation samples of all. Then `u` comes up whole on every rank,
parameter by parameter, in the very backward pass that it is needed in, and is not moved at all.
"""

from __future__ import annotations

from ghostfunc._base.documents import Documents
from ghostfunc._base.errors import NonFiniteLossError
from ghostfunc._base.losses import FiniteLosses
from ghostfunc._base.processes.in_step import InStep
from ghostfunc._base.processes.pieces import (
    batch_of_all,
    few_of_all,
    held_whole,
    in_step,
    samples_of_all,
)
from ghostfunc._base.program import Program
from ghostfunc._base.remembered import Recent, memory
from ghostfunc._base.text_number import number_of_text
from ghostfunc._base.trees import batch_size, flatten
from ghostfunc._base.types import Check, ContractDtype, PyTree
from ghostfunc._quantities.readers import OneRunReader
from ghostfunc._transforms.scores.one_run import (
    OneRunResult,
    OneRuns,
    company_of,
    difference_of,
    key_of,
    one_batch_of,
    run_joined,
    shared_or_why_not,
    weights_of,
)


def in_one_run_of_all(
    program: Program,
    train: PyTree,
    val: PyTree,
    *,
    mean: bool,
    grads: bool,
    per_param: bool,
    contract_dtype: ContractDtype,
    check: Check,
    check_finite: bool,
) -> OneRunResult | None:
    """Scores of this rank's train samples with the gradient of all ranks' validation samples, and
    this rank's pieces of the training gradient; None where there is a reason for two runs.

    All ranks decide alike. One run is taken where all validation samples together are at most as
    many as the train samples of any rank: every rank computes at most twice the samples it has, and
    moves less than half of what two runs move. Otherwise the ranks would compute the same samples
    over and over. The other reasons are those of one process (`shared_or_why_not`).
    """
    ranks = in_step(program.model_fn)
    assert ranks is not None
    counts = few_of_all(program.model_fn, train, val, _outline(train, val))
    if not counts:
        return None
    val = batch_of_all(program.model_fn, val, counts)
    shared = _agreed(ranks, program, train, val, check)
    if shared is None:
        return None
    n, m = batch_size(train), batch_size(val)
    scales = (
        1 / samples_of_all(program.model_fn, n) if grads else 1.0,
        1 / m if mean else 1.0,
    )
    try:
        found = run_joined(
            program,
            one_batch_of(train, val),
            OneRunReader(n, contract_dtype),
            shared,
            weights_of(n, m, scales, program.leaves[0].device),
            grads=grads,
            check=check,
            per_param=per_param,
            finite=FiniteLosses(check_finite),
        )
    except NonFiniteLossError as error:
        raise NonFiniteLossError(
            f"Of {n} train samples of this rank, and after them all ranks' {m} validation samples, "
            f"{' + '.join(map(str, counts))} of ranks 0 to {len(counts) - 1}: {error}"
        ) from error
    company = company_of(found.trace)
    if company is not None:
        _found(program).put(key_of(program, train, val), company)
    if ranks.any("asking whether all ranks' samples share a run", company is not None):
        return None
    return found.of_train(n, scales[0], per_param=per_param)


def _found(program: Program) -> Recent[object, list[int] | str]:
    return memory(program.model_fn, OneRuns).found


def _agreed(
    ranks: InStep, program: Program, train: PyTree, val: PyTree, check: Check
) -> list[int] | None:
    """The parameters with several uses, where they are the same on all ranks and no rank has a
    reason for two runs."""
    key = key_of(program, train, val)
    known = _found(program).get(key)
    if ranks.any("asking whether all ranks know these batches", known is None):
        whole = held_whole(program, train)
        with ranks.apart("looking at new batches"):
            if known is None:
                known = _found(program).put(key, _look(whole, train, val, check))
        del whole
    told = ranks.all("comparing the uses of parameters", number_of_text(str(known)))
    return None if isinstance(known, str) or len(set(told)) > 1 else known


def _look(whole: Program, train: PyTree, val: PyTree, check: Check) -> list[int] | str:
    if batch_size(val) == 1 and check == "never":  # code may treat one in its own way
        return "a single validation sample, and no proof"
    return shared_or_why_not(whole, train, val, least=1)


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
