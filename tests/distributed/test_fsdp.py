"""Modules that `fully_shard` shards over 2 and 4 processes, beside one process with the whole."""

from __future__ import annotations

import json

import pytest
from fsdp_ranks import started

Found = dict[str, dict[str, float]]

TWO = (
    "mlp", "scaled:float32", "gpt2", "llama_lora", "planned_mlp@tp", "planned_mlp@tp:float32",
    "llama@tp",
)  # fmt: skip
FOUR = (
    "mlp", "scaled@replicate+shard", "gpt2", "planned_mlp@shard+tp", "llama_lora@shard+tp",
)  # fmt: skip
SEVERAL_USES = ("mlp", "planned_mlp")
"""Models whose validation samples take a run of their own, though they are like those of train."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Found]]:
    """What every rank found, for 2 and for 4 of them."""
    folders = {world: tmp_path_factory.mktemp(f"ranks{world}") for world in (2, 4)}
    running = [  # where ranks of one group wait for each other, the other group computes
        started("fsdp_worker.py", world, folders[world], *problems)
        for world, problems in ((2, TWO), (4, FOUR))
    ]
    for ended in running:
        for done in ended():
            assert done.returncode == 0, done.stdout[-4000:]
    out = {}
    for world, folder in folders.items():
        out[world] = [json.loads((folder / f"{r}.json").read_text()) for r in range(world)]
    return out


@pytest.mark.parametrize(
    ("world", "problem"), [*((2, name) for name in TWO), *((4, name) for name in FOUR)]
)
def test_every_quantity_is_that_of_one_process(
    found: dict[int, list[Found]], world: int, problem: str
) -> None:
    """Every rank has another number of samples, and its rows of the gradients."""
    bound = 1e-6 if problem.endswith("float32") else 1e-10
    several = problem.partition(":")[0].partition("@")[0] in SEVERAL_USES
    for rank, results in enumerate(found[world]):
        assert results[problem].pop("batches that share a run") == (0 if several else 2)
        assert len(results[problem]) >= 25
        wrong = {name: x for name, x in results[problem].items() if not x < bound}
        assert not wrong, (rank, wrong)
