"""What is logged of the scores, beside the training loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ghostfunc.hf._micro_batch import Values

QUANTILES = (0.1, 0.5, 0.9)


class Metrics:
    """Numbers of the samples scored since they were last taken.

        ghost/harmful_share     how many of them raised the score set's loss
        ghost/mean_value        the mean of their values
        ghost/norm_q50          quantiles of the norms of their weighted gradients; none where
                                squares of them underflow (losses times 1e-20 in float32)
        ghost/cosine            of the step's gradient and the score set's, mean over steps

    Of several score sets each has its own, `ghost/<name>/mean_value`.
    """

    def __init__(self, names: list[str]) -> None:
        single = len(names) == 1
        self._labels = ["ghost/" if single else f"ghost/{name}/" for name in names]
        self._names = names
        self._columns: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._cosines: list[list[Tensor]] = []

    def add(self, values: Values) -> None:
        """The samples of a micro-batch."""
        self._columns.append(values.columns.detach().double().cpu())
        if values.norms is not None:
            self._norms.append(values.norms.detach().double().cpu())

    def cosines(self, module: nn.Module, gradients: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The angle between the step's gradient, in `.grad`, and every score set's."""
        named = dict(module.named_parameters())
        row = []
        for u in gradients.values():
            pairs = [(named[k].grad, x) for k, x in u.items()]
            met = [(g.float(), x.float()) for g, x in pairs if g is not None]
            dot, ours, theirs = (
                torch.stack([(a * b).sum() for a, b in rows]).sum()
                for rows in (met, [(g, g) for g, _ in met], [(x, x) for _, x in met])
            )
            row.append(dot / (ours * theirs).sqrt())
        self._cosines.append(row)

    def taken(self) -> dict[str, float]:
        """The numbers, which then begin anew."""
        out: dict[str, float] = {}
        if self._columns:
            columns = torch.cat(self._columns)
            for label, column in zip(self._labels, columns.T, strict=True):
                out[f"{label}harmful_share"] = float((column > 0).double().mean())
                out[f"{label}mean_value"] = float(column.mean())
        norms = torch.cat(self._norms) if self._norms else torch.zeros(0, device="cpu")
        if len(norms) and not bool(norms.isnan().any()):
            for q in QUANTILES:
                out[f"ghost/norm_q{round(100 * q)}"] = float(norms.quantile(q))
        if self._cosines:
            for label, column in zip(self._labels, zip(*self._cosines, strict=True), strict=True):
                out[f"{label}cosine"] = float(torch.stack(list(column)).mean())
        self._columns, self._norms, self._cosines = [], [], []
        return out


class StepTaken(TrainerCallback):
    """Tells when the optimizer has been asked for a step."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._tell()
