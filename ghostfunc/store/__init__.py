"""A store of projected gradients on disk, and the questions to ask it. Needs `ghostfunc[store]`.

from ghostfunc.store import Store, project_dataset

store = Store.create(path, projection=projection, n_samples=len(data), dtype="float32")
store.add_checkpoint("final", params)
project_dataset(model_fn, params, data, projection, store, checkpoint="final", ...)
store.topk(gf.ghost_project(model_fn, params, queries, projection), 10, normalize="cosine")

Read, from the disk up: files, documents, meta, checkpoints, chunk, stored, presence, rows; then
metric, query, topk, questions, store; then fingerprint, recipe, work, jobs, again, dataset.
"""

from ghostfunc.store._dataset import project_dataset
from ghostfunc.store._errors import (
    DamagedRowsError,
    IncompatibleStoreError,
    IncompleteStoreError,
    StoreError,
)
from ghostfunc.store._faiss import SearchIndex
from ghostfunc.store._fingerprint import fingerprint
from ghostfunc.store._metric import Preconditioner
from ghostfunc.store._rows import Damage
from ghostfunc.store._store import Store
from ghostfunc.store._topk import TopK, merge_topk

__all__ = [
    "Damage",
    "DamagedRowsError",
    "IncompatibleStoreError",
    "IncompleteStoreError",
    "Preconditioner",
    "SearchIndex",
    "Store",
    "StoreError",
    "TopK",
    "fingerprint",
    "merge_topk",
    "project_dataset",
]
