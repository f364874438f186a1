"""A collator may put all samples of a batch into one row: each sample is a document of that row.

DataCollatorWithFlattening of transformers and `padding_free` of TRL make `[1, T]` of n samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor

from ghostfunc._base.documents import Documents
from ghostfunc._base.errors import BatchError
from ghostfunc._base.segments import documents
from ghostfunc.hf._logits import IGNORED
from ghostfunc.hf._losses import Batch

BOUNDARIES = ("position_ids", "seq_idx", "cu_seq_lens_q")
"""What says where the samples of a row begin."""

BESIDE = ("cu_seq_lens_k", "max_length_q", "max_length_k", "shift_labels")
"""What such collators add that follows from the rest."""

WEIGHT = "ghost_weight"
Samples: TypeAlias = Batch | Documents


def samples_of_row(batch: Mapping[str, Any], n: int) -> Documents | None:
    """The n samples of one row as documents; None for a batch of other rows, and for a single
    sample by itself.

    Raises:
        BatchError: the row has another number of documents.
    """
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if n == 1 and not any(name in batch for name in BOUNDARIES[1:]):
        return None
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor):
        return None
    if ids.ndim != 2 or len(ids) != 1 or labels.shape != ids.shape:
        return None
    rows = {k: x for k, x in batch.items() if k not in ("labels", *BESIDE)}
    if not any(name in rows for name in BOUNDARIES):
        return None
    docs = documents(rows)
    if len(docs) != n:
        raise BatchError(
            f"The collator made one row of {n} samples, in which {len(docs)} documents begin: it "
            "is not known which are whose. Give samples of one document each (packing=False); or, "
            "to gf.hf.SFTMixin, rows whose seq_lengths add up to their length, as TRL packs them."
        )
    own = docs.from_rows(labels).masked_fill(~docs.packing.own, IGNORED)
    return replace(docs, tensors={**docs.tensors, "labels": own})


def weighted(samples: Samples, weight: Tensor) -> Any:
    """A batch of samples with the weight `[n]` of each beside it."""
    if not isinstance(samples, Documents):
        return {"inputs": samples, "weight": weight}
    beside = weight[:, None].expand(samples["input_ids"].shape)
    return replace(samples, tensors={**samples.tensors, WEIGHT: beside})


def apart_from_weight(batch: Any) -> tuple[Any, Tensor]:
    """Samples, and the weight of each: what `weighted` was given."""
    if not isinstance(batch, Documents):
        return batch["inputs"], batch["weight"]
    tensors = {k: x for k, x in batch.tensors.items() if k != WEIGHT}
    return replace(batch, tensors=tensors), batch[WEIGHT][:, 0]
