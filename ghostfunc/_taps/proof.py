"""Proof that a run's numbers are those of plain autograd.

A trace is made of a few samples. What it says of other batches (where samples lie, whose row is
whose, that samples do not talk to each other) is held against an oracle that knows no rule, no
layout and no tap, whenever something is new: the way through the program, the numbers among the
arguments of its ops, the values that Python reads, or the shapes.

    taps:             s_ip = <g_i^p, v^p>               for every sample i and parameter p
    plain autograd:   t_p  = <sum_i c_i g_i^p, v^p>     one backward pass, with random weights c
    proved:           sum_i c_i s_ip = t_p              for every parameter p

`v` is a random direction. The run that makes `s` multiplies the loss of every sample by a random
factor, and divides by it in the end. Few samples have a factor within 1.4 times another's, so the
number of a sample that is another's is off by as much, however alike their gradients are. The
weights `c_i` are random too, and as large as `1 / |s_i|`, so that a sample with a large gradient
hides no other. Plain autograd runs the samples in random parts, so their losses are compared in
other company at the same time.

What is read off the gradients is proved for two samples (`readings`): the run's own norms, scores,
projections and kept factors against those of whole gradients, as plain autograd has them. These
two are one of the parts, so a new shape costs two more passes over its samples (`comparison`).

`check="always"` proves every call. What is known already is proved with one sample, drawn at
random: sooner or later every sample of a training set is. What may reorder samples by their values
is proved with all of them in every run, whatever `check` says.

What a proof does not see:

- Gradients that are themselves rounding noise: below 16 units in the last place of their loss, or
  as far as units in the last place of the parameters move them.
- What is wrong by less than the tolerance: 1e-8 in float64, 2e-3 in float32, 0.1 in half precision,
  where errors of single samples in large batches pass.
- What this batch does not show: a branch that is not taken, or that reads values behind torch's
  back (through a pointer). Values that torch hands to Python are part of what is proved. Values
  that the function closes over are, where they are arguments of ops (`watch.plain_arguments`), or
  choose rows by their number.
- Coupling that is the same in every part as in the whole: that of two samples in one part, where no
  other sample is coupled. Another proof draws other parts.
- Whole numbers that move from sample to sample and count for nothing yet, where each sample of the
  traced batch has the same one (`movement`).
- What is no function of a sample's gradient: the shares of single positions (their sum is proved),
  and the sums over positions whose eigenvectors are the bases of a curvature (its second moments
  in these bases are proved). Numbers that vmap has several of.
- Squares with a `contract_dtype`: terms that are rounded may cancel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ghostfunc._base.freed import give_back
from ghostfunc._base.losses import check_finite
from ghostfunc._base.purity import distinct, prove_independent, were_compared
from ghostfunc._base.torch_private import any_symbolic
from ghostfunc._base.trees import tensors_of
from ghostfunc._base.types import Check, Randomness
from ghostfunc._taps.claim import NOT_THEIRS, Claim, Coupling
from ghostfunc._taps.comparison import Asked, Wrong, compare
from ghostfunc._trace.fitting import Disproved, TracedModel
from ghostfunc._trace.trace import WayTaken

SEEDS = (0, 1)
"""A mismatch is looked at with other numbers before it counts: half a unit in the last place may
decide a comparison in the model, and did so in one of two runs."""

FEW = 2
"""Samples whose numbers are held against their definition."""


def gradients_unproved(model: TracedModel, way: WayTaken, check: Check) -> bool:
    """Whether a run's gradients are still to be proved, or were found wrong."""
    if check == "never":
        return False
    known = model.proofs.get(model.proof_key(way))
    return not known or check == "always" or model.needs_proof_every_run(way)


def prove(claim: Claim, check: Check, randomness: Randomness) -> None:
    """Raise `Disproved` or `CoupledSamplesError` unless the claim holds, or was proved before.

    What is known already is proved again with one sample, drawn at random, if that is to be done
    `"always"`: the numbers that were read of it, and its loss beside another sample.
    """
    model = claim.model
    if any_symbolic(tensors_of(model.batch)):
        return
    if check == "never":  # by losses alone
        prove_independent(model, model.batch)
        return
    proofs, key = model.proofs, model.proof_key(claim.way)
    keys = key, (key, claim.asked())
    gradients, numbers = map(proofs.get, keys)
    if gradients is False or numbers is False:
        raise Disproved(f"{NOT_THEIRS} (found before)")
    by_values = model.needs_proof_every_run(claim.way)
    if gradients and numbers and check == "new" and not by_values:
        return
    check_finite(claim.losses)
    read = claim.read(False)
    few = FEW if numbers is None else int(check == "always")
    whole = gradients is None or by_values or (numbers is None and bool(read.sums))
    whole |= check == "always" and not read.readings
    # Samples that are the same, or do not show in their losses, prove nothing: calls go on proving.
    differ = model.n == 1 or (distinct(model.batch) and _distinct_losses(claim.losses))
    found = _compared(claim, Asked(whole, few, proofs.turn()), randomness)
    if isinstance(found, Coupling):
        raise found.error
    for key, asked, error in zip(keys, (whole, few > 0), found, strict=True):
        if asked and (error is not None or differ):
            proofs.put(key, error is None)
        if error is not None:
            raise error
    if whole and differ:
        were_compared(model, model.batch)
    if gradients is None or numbers is None:
        give_back()


def _distinct_losses(losses: Tensor) -> bool:
    """Whether losses differ by more than rounding."""
    off = (losses - losses[:1]).abs().max()
    return bool(off > 16 * torch.finfo(losses.dtype).eps * losses.abs().max())


def _compared(claim: Claim, asked: Asked, randomness: Randomness) -> Coupling | Wrong:
    """What is wrong with a claim, and was so with the random numbers of every seed. Samples that
    were found to be coupled are looked at again by themselves."""
    found: Coupling | Wrong = Wrong(None, None)
    for seed in SEEDS:
        with _draws(randomness, seed):
            found = compare(claim, seed, randomness, asked)
        if isinstance(found, Coupling):
            asked = asked._replace(apart=tuple(found.samples[:FEW]))
            continue
        asked = Asked(
            found.gradients is not None,
            asked.few if found.numbers is not None else 0,
            asked.turn,
        )
        if not asked.gradients and not asked.few:
            break
    return found


@contextlib.contextmanager
def _draws(randomness: Randomness, seed: int) -> Iterator[None]:
    """For models that draw random numbers, a state of the generators of their own."""
    if randomness == "error":
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
