"""Data sets: batches under a token budget, scores of every sample, and the table they make.

scores = gf.score_dataset(model_fn, params, dataset, val=batches(targets, ...), collate=padded(0))
scores.top(100).to_parquet("best.parquet")
"""

from ghostfunc.data._batches import Dataset, batches, padded
from ghostfunc.data._budget import find_token_budget
from ghostfunc.data._chats import Encoded, encode
from ghostfunc.data._errors import Fault, ResumeError, RowsError
from ghostfunc.data._rows import Rows
from ghostfunc.data._score import score_dataset
from ghostfunc.data._select import write_rows
from ghostfunc.data._table import Scores

__all__ = [
    "Dataset",
    "Encoded",
    "Fault",
    "ResumeError",
    "Rows",
    "RowsError",
    "Scores",
    "batches",
    "encode",
    "find_token_budget",
    "padded",
    "score_dataset",
    "write_rows",
]
