"""What the heads of Hugging Face classifiers train: squared error, cross-entropy or binary
cross-entropy, by the model's `config.problem_type` and `config.num_labels`."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostfunc._base.dtypes import wide
from ghostfunc._base.errors import BatchError, OptionError
from ghostfunc.hf._logits import IGNORED

Problem: TypeAlias = Literal[
    "regression", "single_label_classification", "multi_label_classification"
]
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


class Head(NamedTuple):
    """The head of a classifier.

    Attributes:
        problem: `config.problem_type`; None where the first batch would decide.
        num_labels: `config.num_labels`, the width of the logits; None for a module without config.
        name: the class of the model, for messages.
    """

    problem: str | None
    num_labels: int | None
    name: str


def head_of(model: nn.Module) -> Head:
    """The head of a classifier, as its config says now."""
    name = type(model).__name__
    try:
        config = model.config
    except AttributeError:  # a module that only gives `.logits`
        return Head(None, None, name)
    head = Head(config.problem_type, config.num_labels, name)  # type: ignore[union-attr, arg-type]
    if head.problem is not None and head.problem not in PROBLEMS:
        raise OptionError(
            f"The config of {name} has problem_type={head.problem!r}. Use one of: "
            f"{', '.join(PROBLEMS)}; or None, and num_labels and the labels' dtype decide."
        )
    return head


def problem_of(head: Head, labels: Tensor, num_labels: int) -> str:
    """The problem that the model's own loss would train on these labels."""
    if head.problem is not None:
        return head.problem
    if num_labels == 1:
        return "regression"
    if labels.dtype in (torch.int64, torch.int32):
        return "single_label_classification"
    return "multi_label_classification"


def head_losses(head: Head, logits: Tensor, labels: Tensor) -> Tensor:
    """Each sample's loss `[n]` as the model's own loss has it; 0 where its label is -100.

    Args:
        head: of `head_of`.
        logits: `[n, L]`.
        labels: `[n]` or `[n, 1]` for one label or one output, else `[n, L]`.

    Raises:
        BatchError: labels that the model's own loss refuses, or would stretch over the batch.
    """
    if logits.ndim != 2 or (head.num_labels is not None and logits.shape[1] != head.num_labels):
        width = "L" if head.num_labels is None else head.num_labels
        raise BatchError(
            f"The logits of {head.name} are {list(logits.shape)}; a classifier's are [n, {width}], "
            "with config.num_labels columns."
        )
    n, width = logits.shape
    problem = problem_of(head, labels, width)
    one_each = labels.numel() == n and labels.shape[:1] == (n,)
    if problem == "regression" and width == 1:
        _expect(one_each, head, problem, labels, f"[{n}] or [{n}, 1]")
        return (wide(logits.flatten()) - labels.flatten()).square()
    if problem == "regression":
        _expect(labels.shape == logits.shape, head, problem, labels, f"[{n}, {width}]")
        return (wide(logits) - labels).square().mean(1)
    if problem == "multi_label_classification":
        fits = labels.shape == logits.shape and labels.is_floating_point()
        _expect(fits, head, problem, labels, f"[{n}, {width}] of a floating-point dtype")
        # Of mixed dtypes torch returns the labels': that may be the narrower one.
        logits, labels = wide(logits), wide(labels)
        dtype = torch.promote_types(logits.dtype, labels.dtype)
        losses = F.binary_cross_entropy_with_logits(
            logits.to(dtype), labels.to(dtype), reduction="none"
        )
        return losses.mean(1)
    integers = labels.dtype == torch.int64  # torch's cross-entropy takes no others
    _expect(one_each and integers, head, problem, labels, f"[{n}] or [{n}, 1] of torch.int64")
    return F.cross_entropy(wide(logits), labels.flatten(), reduction="none", ignore_index=IGNORED)


def head_counts(head: Head, labels: Tensor) -> Tensor:
    """1 for every sample with a label, 0 for those that the loss ignores, `[n]`."""
    width = 1 if head.num_labels is None else head.num_labels
    if head.num_labels is not None and problem_of(head, labels, width) != PROBLEMS[1]:
        return torch.ones(len(labels), dtype=torch.int64, device=labels.device)
    if labels.is_floating_point():
        return torch.ones(len(labels), dtype=torch.int64, device=labels.device)
    return (labels.reshape(len(labels), -1) != IGNORED).all(1).long()


def _expect(fits: bool, head: Head, problem: str, labels: Tensor, expected: str) -> None:
    if not fits:
        reason = (
            f"config.problem_type={head.problem!r}"
            if head.problem is not None
            else f"num_labels={head.num_labels} and labels of {labels.dtype}"
        )
        raise BatchError(
            f"{head.name} trains {problem} here ({reason}): labels must be {expected}; got "
            f"{list(labels.shape)} of {labels.dtype}. Give such labels, or set "
            "config.problem_type to what you mean."
        )
