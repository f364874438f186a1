"""TRL's own DPO loss of one pair at a time: `DPOTrainer._compute_loss` is asked, not written anew.

It is given the log-probabilities of the answers' tokens in place of a model, and says one number.
What it computes besides, for the log alone, is computed of zeros.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ghostfunc._base.errors import OptionError
from ghostfunc.hf._losses import Batch, need
from ghostfunc.hf._preferences import AnswerTokens

Weighted = Sequence[tuple[str, float]]
"""Loss types of TRL, each with its weight."""

ROWS = ("input_ids", "attention_mask", "completion_mask")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


def asked_losses(trainer: Any, losses: Weighted, said: AnswerTokens, batch: Batch) -> Tensor:
    """The trainer's loss of each pair by itself, `[n]`.

    Args:
        trainer: a `trl.DPOTrainer`, whose settings count.
        losses: the loss types that are added up.
        said: what the model says of the tokens of both answers.
        batch: the pairs, with what the reference says.
    """
    rows = {name: need(batch, name) for name in ROWS}
    reference = {name: need(batch, name)[:, None] for name in REFERENCE}

    def loss(said: AnswerTokens, inputs: dict[str, Tensor]) -> Tensor:
        return _ask(_Asked(trainer, losses), said, inputs)

    out: Tensor = torch.vmap(loss)(said, {**rows, **reference})
    return out


def refuse_mixed_pairs(trainer: Any, losses: Weighted) -> None:
    """Raise for a loss type that is not the mean of the pairs' own losses, as those that sort.

    TRL is asked about three random pairs at once, and about each.
    """
    n, t = 3, 6
    generator = torch.Generator("cpu").manual_seed(0)
    draw = partial(torch.randn, generator=generator, device="cpu")
    lengths = torch.tensor([[4, 2], [2, 3], [3, 5]], device="cpu")[..., None]
    mask = (torch.arange(t, device="cpu") < lengths + 1).long()
    completion = mask * (torch.arange(t, device="cpu") > 0)
    said = draw(n, 2, t - 1) * completion[..., 1:], draw(n, 2, t - 1)
    of_rows = tuple(x.transpose(0, 1).flatten(0, 1) for x in said)
    pairs = {"input_ids": mask, "attention_mask": mask, "completion_mask": completion}
    batch = {**pairs, **{name: draw(n) for name in REFERENCE}}
    rows = {k: x.transpose(0, 1).flatten(0, 1) for k, x in pairs.items()}
    for kind, _ in losses:
        by_itself = _Asked(trainer, [(kind, 1.0)], beta=1.0, device="cpu")
        together = float(_ask(by_itself, of_rows, {**batch, **rows}))
        each = float(asked_losses(by_itself, [(kind, 1.0)], said, batch).mean())
        if abs(together - each) > 1e-5 * abs(each):
            raise OptionError(
                f"loss_type={kind!r} is no sum over pairs: of three random pairs it is "
                f"{together:.6g}, and the mean of their own losses is {each:.6g} (it sorts them, "
                "say). A pair has no loss of its own then, and no value. Use another loss_type."
            )


def _ask(trainer: _Asked, said: AnswerTokens, inputs: Mapping[str, Tensor]) -> Tensor:
    logps, *squares = said
    nothing = torch.zeros(logps.shape, device=logps.device)
    outputs = SimpleNamespace(
        log_probs=logps,
        log_sum_sq_probs=squares[0] if squares else None,
        entropy=nothing,
        is_top1=nothing.bool(),
        mean_logits=_Unread(),
    )
    theirs = type(trainer.whole)._compute_loss
    loss: Tensor = theirs(trainer, lambda **_: outputs, dict(inputs), return_outputs=False)
    return loss


class _Asked:
    """Stands for the trainer in its own `_compute_loss`: its settings, and a log of its own.

    Attributes:
        whole: the trainer.
    """

    precompute_ref_logps = True
    """What the reference says is in the batch."""
    aux_loss_enabled = False
    """The loss of routers is held against the trainer's, and refused there."""

    def __init__(self, trainer: Any, losses: Weighted, **others: Any) -> None:
        self.whole: Any = trainer.whole if isinstance(trainer, _Asked) else trainer
        self.loss_types = [kind for kind, _ in losses]
        self.loss_weights = [weight for _, weight in losses]
        self.beta = others.get("beta", trainer.beta)
        self.accelerator = _OneProcess(others.get("device", trainer.accelerator.device))
        self._metrics: Any = defaultdict(lambda: defaultdict(list))
        self._total_train_tokens = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)


class _OneProcess:
    """Stands for the accelerator, which gathers numbers for the log."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def gather(self, x: Any) -> _Unread:
        return _Unread()

    gather_for_metrics = gather


class _Unread:
    """A stand-in for numbers that TRL averages for its log, over places that differ by pair. It
    reads as zero, so that no tensor is looked into, which a compiler could not follow."""

    def __getitem__(self, places: Any) -> _Unread:
        return self

    def __gt__(self, number: float) -> bool:
        return number < 0

    def chunk(self, parts: int, dim: int) -> tuple[_Unread, ...]:
        return (self,) * parts

    def sum(self) -> _Unread:
        return self

    mean = sum

    def item(self) -> int:
        return 0
