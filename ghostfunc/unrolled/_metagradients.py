"""Metagradients: the derivative of a final loss by every sample's weight, through training."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ghostfunc._base.errors import RandomnessError
from ghostfunc._base.fingerprint import fingerprint
from ghostfunc._base.losses import check_losses
from ghostfunc._base.options import check_flags, check_model_fn, check_path, check_type, one_of
from ghostfunc._base.side_effects import Draws
from ghostfunc._base.torch_private import unrounded
from ghostfunc._base.trees import batch_size
from ghostfunc._base.types import ModelFn, PyTree
from ghostfunc.curvature import _files
from ghostfunc.shapley import Scores
from ghostfunc.unrolled._adjoint import Adjoint, Hvp, step_back
from ghostfunc.unrolled._errors import UnrolledError
from ghostfunc.unrolled._forward import Trained, bar
from ghostfunc.unrolled._training import State, differing


class StepValues(NamedTuple):
    """The metagradients of one step.

    Attributes:
        ids: of its samples, `[n]`.
        values: `dL / d(their weights in this step)`, `[n, q]`.
    """

    ids: Int[Tensor, " n"]
    values: Float[Tensor, "n q"]


class Metagradients(NamedTuple):
    """What `metagradients` returns.

    Attributes:
        losses: the final losses L, `[q]`.
        scores: `ids`, `values [samples, q]`, the sums over all steps, and `counts`.
        steps: the values of every step, in order.
        params: `dL / d(initial parameters)`, a pytree like `params` of `[q, *shape]`.
    """

    losses: Float[Tensor, " q"]
    scores: Scores
    steps: tuple[StepValues, ...]
    params: PyTree


def metagradients(
    trained: Trained,
    val: PyTree,
    *,
    val_fn: ModelFn | None = None,
    reduction: Literal["mean", "none"] = "mean",
    hvp: Hvp = "forward",
    vectorize: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Metagradients:
    """The exact derivative of final losses by every sample's weight at every step.

        value_ti = d L(theta_T) / d c_ti = <g_i(theta_t), u_t> / N_t

    `c_ti` multiplies sample i's loss in step t (see `Training`), and `u_t` is the derivative of L
    by the gradient that the optimizer gets in step t: `J^T lambda_(t+1)`, J the optimizer's
    derivative. The adjoint `lambda_t = dL / d(theta_t, state_t)` is carried back through the
    whole run: states are replayed from those that were kept, one stretch at a time.

    **Sign and scale.** Values are in units of the loss. A NEGATIVE VALUE IS A SAMPLE THAT HELPS:
    more weight on it lowers the loss, as in `gf.shapley`. To first order, leaving sample i out of
    the run changes L by minus its score.

    Args:
        trained: what `gf.unrolled.train` returned.
        val: m validation samples, a pytree of tensors `[m, ...]`.
        val_fn: their losses, if not those of the run: `val_fn(params, val) -> losses [m]`.
        reduction: "mean" for the mean loss (q = 1), or "none" for every sample's own (q = m).
        hvp: "forward" (`vjp` over `jvp`) or "reverse" (`grad` over `grad`, for ops without
            forward-mode AD).
        vectorize: carry the q adjoints back together, by vmap; False takes one after the other.
        checkpoint: a file that keeps the adjoint after every stretch; a call that was killed goes
            on from there.
        progress: show a progress bar (needs tqdm).

    Returns:
        `Metagradients(losses, scores, steps, params)`.

    Raises:
        UnrolledError: kept states or the checkpoint are those of another run, or cut short; or a
            replayed stretch does not end where it did in training.
        RandomnessError: the final losses draw random numbers.
        GhostError: another of its children.

    Reference:
        Ilyas and Engstrom, "MAGIC: Near-Optimal Data Attribution for Deep Learning", 2025.
        Engstrom et al., "Optimizing ML Training with Metagradient Descent", 2025.
    """
    one_of("reduction", reduction, ("mean", "none"))
    one_of("hvp", hvp, ("forward", "reverse"))
    check_type("trained", trained, Trained, "what gf.unrolled.train returns")
    check_flags(vectorize=vectorize, progress=progress)
    if val_fn is not None:
        check_model_fn(val_fn, "val_fn")
    if checkpoint is not None:
        check_path("checkpoint", checkpoint)
    training, states = trained.training, trained.states
    losses, last = _final(trained, val, val_fn or training.model_fn, reduction)
    about = {
        "kind": "adjoint",
        **training.about(),
        "objective": fingerprint([f"adjoint {i}" for i in range(len(last.params))], last.params),
    }
    step, adjoint, found = _resumed(checkpoint, about, len(training), last)
    with bar(progress, "metagradients", len(training), len(training) - step) as advance:
        while step > 0:
            start = (step - 1) // states.every * states.every
            replayed, state = [], states.get(start)
            for t in range(start, step):
                gradient = training.gradient(state, t)
                replayed.append((state, gradient))
                state = training.after(state, gradient, t)
            _check_replayed(replayed[0][0], state, states.get(step), start, step)
            while step > start:
                step -= 1
                state, gradient = replayed.pop()
                adjoint, dots = step_back(training, state, gradient, step, adjoint, hvp, vectorize)
                micros = training.micros(step)
                total = sum(len(m.ids) for m in micros)
                ids = torch.cat([m.ids.cpu().long() for m in micros])
                found[step] = StepValues(ids, torch.cat(dots).cpu() / total)
                advance()
            _keep(checkpoint, about, step, adjoint, found)
    steps = tuple(found[t] for t in range(len(training)))
    return Metagradients(losses, _summed(steps), steps, training.unflatten(adjoint.params))


def _check_replayed(first: State, replayed: State, kept: State, start: int, step: int) -> None:
    """Raise `UnrolledError` unless a stretch ends where it did when the model was trained."""
    moved, off = (
        math.sqrt(sum(float((x.double() - y.double()).square().sum()) for x, y in pairs))
        for pairs in (
            zip(kept.params, first.params, strict=True),
            zip(kept.params, replayed.params, strict=True),
        )
    )
    coarsest = max(torch.finfo(x.dtype).eps for x in kept.params)
    if not off <= max(1e-3, 8 * coarsest) * moved:
        raise UnrolledError(
            f"steps {start} to {step - 1} do not lead to the state that was kept after them: "
            f"parameters are {off:.3g} away from it, and these steps moved them by {moved:.3g}. "
            "Something is not what it was when gf.unrolled.train ran: the data or the learning "
            "rate of a step, the module's mode (train or eval), its frozen parameters or buffers, "
            "autocast, or the loss. Call gf.unrolled.train again."
        )


def _final(
    trained: Trained, val: PyTree, val_fn: ModelFn, reduction: str
) -> tuple[Tensor, Adjoint]:
    """The final losses, and their derivative by the final parameters."""
    training, m = trained.training, batch_size(val, "val")

    def losses(p: list[Tensor]) -> Tensor:
        out = check_losses(val_fn(training.unflatten(p), val), m)
        return out.mean()[None] if reduction == "mean" else out

    draws = Draws()
    with torch.enable_grad():
        params = [x.detach().requires_grad_() for x in trained.final.params]
        with draws:
            out = losses(params)
    if draws.seen:
        raise RandomnessError(
            "the losses of val draw random numbers (dropout in training mode?), so they have no "
            "derivative of their own. Pass val_fn=, the losses in evaluation mode."
        )
    with unrounded(out):
        rows = [
            torch.autograd.grad(
                loss, params, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for loss in out
        ]
    stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
    q = len(out)
    slots = [x.new_zeros(q, *x.shape) for x in trained.final.slots]
    return out.detach(), Adjoint(stacked, slots)


def _summed(steps: tuple[StepValues, ...]) -> Scores:
    ids = torch.cat([s.ids for s in steps])
    values = torch.cat([s.values for s in steps]).double()
    met, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    sums = values.new_zeros(len(met), values.shape[1]).index_add(0, inverse, values)
    return Scores(met, sums, counts)


def _keep(
    checkpoint: str | os.PathLike[str] | None,
    about: dict[str, object],
    step: int,
    adjoint: Adjoint,
    found: dict[int, StepValues],
) -> None:
    if checkpoint is None:
        return
    tensors = {f"params {i}": x.cpu() for i, x in enumerate(adjoint.params)}
    tensors |= {f"slots {i}": x.cpu() for i, x in enumerate(adjoint.slots)}
    for t, values in found.items():
        tensors |= {f"ids {t}": values.ids, f"values {t}": values.values}
    _files.write(checkpoint, tensors, {**about, "step": step}, UnrolledError)


def _resumed(
    checkpoint: str | os.PathLike[str] | None,
    about: dict[str, object],
    total: int,
    last: Adjoint,
) -> tuple[int, Adjoint, dict[int, StepValues]]:
    """Where to go on, the adjoint there, and the values of the steps behind it."""
    if checkpoint is None or not Path(checkpoint).exists():
        return total, last, {}
    tensors, kept = _files.read(checkpoint, UnrolledError)
    wrong = differing(kept, about)
    if wrong:
        raise UnrolledError(
            f"{os.fspath(checkpoint)!r} belongs to other metagradients: it differs in "
            f"{', '.join(wrong)}. Delete the file, or give another checkpoint path."
        )
    names = [f"params {i}" for i in range(len(last.params))]
    names += [f"slots {i}" for i in range(len(last.slots))]
    _files.check_entries(checkpoint, {**tensors, **kept}, [*names, "step"], UnrolledError)
    device = last.params[0].device
    params, slots = (
        [tensors[f"{name} {i}"].to(device) for i in range(len(like))]
        for name, like in (("params", last.params), ("slots", last.slots))
    )
    step = int(kept["step"])
    found = {t: StepValues(tensors[f"ids {t}"], tensors[f"values {t}"]) for t in range(step, total)}
    return step, Adjoint(params, slots), found
