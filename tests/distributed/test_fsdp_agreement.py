"""Ranks of a sharded model that differ, fail or die: right numbers or an error, and no hang."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from fsdp_ranks import ranks_of

import ghostfunc as gf


@pytest.fixture(scope="module")
def differ(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks found; the last one has other batches."""
    directory = tmp_path_factory.mktemp("differ")
    for done in ranks_of("fsdp_agreement.py", 2, directory, "differ"):
        assert done.returncode == 0, done.stdout[-4000:]
    return [json.loads((directory / f"{r}.json").read_text()) for r in range(2)]


@pytest.mark.parametrize(
    "what",
    [
        "plain",
        "a structure that is new on one rank",
        "another way on one rank",
        "the same once more",
        "after a unit more",
        "after the error",
        "after other calls",
        "few",
        "few, of another length on one rank",
        "few, more of them on one rank",
        "few, after the errors",
        "many",
        "many, of another length on one rank",
        "many, after the errors",
    ],
)
def test_numbers_are_those_of_one_process(differ: list[dict[str, Any]], what: str) -> None:
    for found in differ:
        assert found[what] < 1e-10


@pytest.mark.parametrize(
    ("what", "first", "last"),
    [
        (
            "a unit more on one rank",
            "RankError: The ranks are at several places of the program: rank 0 is ",
            "RankError: The ranks are at several places of the program: rank 0 is ",
        ),
        (
            "an error on one rank",
            "since another rank did: rank 1 failed with NonFiniteLossError while",
            "NonFiniteLossError: 1 of 4 losses are not finite: losses[1] = nan",
        ),
        (
            "other calls",
            "rank 0 is calling gf.direction; rank 1 is calling gf.ghost_norm",
            "rank 0 is calling gf.direction; rank 1 is calling gf.ghost_norm",
        ),
        (
            "few on one rank",
            "rank 0 is calling gf.ghost_dot_prod; rank 1 is calling gf.ghost_norm",
            "rank 0 is calling gf.ghost_dot_prod; rank 1 is calling gf.ghost_norm",
        ),
        (
            "few, none on one rank",
            "rank 1 failed with BatchError while calling gf.ghost_dot_prod: val is empty",
            "BatchError: val is empty",
        ),
        (
            "few, a bad one",
            "3 validation samples, 2 + 1 of ranks 0 to 1: 1 of 7 losses are not finite: losses[6]",
            "3 validation samples, 2 + 1 of ranks 0 to 1: 1 of 7 losses are not finite: losses[6]",
        ),
        (
            "many, a bad one",
            "rank 1 failed with NonFiniteLossError while running the model: 12 of 16 losses",
            "after them its 12 validation samples: 12 of 16 losses are not finite: losses[4] = nan",
        ),
        (
            "a wrapped function",
            "TransformError: model_fn of a sharded module",
            "TransformError: model_fn of a sharded module",
        ),
        (
            "by itself",
            "Pass it as it is to gf.ghost_dot_prod",
            "Pass it as it is to gf.ghost_dot_prod",
        ),
        (
            "other modes",
            "OptionError: mode='materialized' is not for sharded modules",
            "OptionError: mode='materialized' is not for sharded modules",
        ),
        (
            "verify",
            "OptionError: gf.verify is not for sharded modules",
            "OptionError: gf.verify is not for sharded modules",
        ),
        (
            "whole params",
            "has shape (5, 3); rank 0 of 2 holds (3, 3) of the parameter's (5, 3)",
            "has shape (5, 3); rank 1 of 2 holds (2, 3) of the parameter's (5, 3)",
        ),
    ],
)
def test_errors_name_the_rank_and_the_place(
    differ: list[dict[str, Any]], what: str, first: str, last: str
) -> None:
    assert first in differ[0][what]
    assert last in differ[1][what]


def test_the_ranks_of_a_plan_have_to_be_alike(differ: list[dict[str, Any]]) -> None:
    for said in (found["planned"] for found in differ):
        assert said["one batch"] == "no error"
        for name in ("two batches", "two validation batches"):
            assert re.search(r"RankError: .*rank 0, rank 1 have batches that differ", said[name])
        assert "rank 0, rank 1 have weights of samples that differ" in said["two weights"]
        assert "rank 0, rank 1 have other weights" in said["other replicated weights"]
        assert "OptionError: randomness='different' is not" in said["random numbers"]
        known = said["its code knows of the plan"]
        assert re.search(r"ParamsError: Heads has losses .*\(n_heads // ranks\)", known), known


def test_an_argument_that_one_rank_is_refused_ends_the_call_on_all(
    differ: list[dict[str, Any]],
) -> None:
    """No rank gives its next batch to the others' last."""
    calls = [name for name in differ[0] if name.startswith("refused: ")]
    assert len(calls) == 19
    for name in calls:
        (others, after), (own, own_after) = (found[name] for found in differ)
        assert others.startswith("RankError: "), (name, others)
        assert re.search(r"rank 1 failed with (Batch|Params|Option)Error while", others), others
        assert re.match("(Batch|Params|Option)Error: ", own), (name, own)
        assert max(after, own_after) < 1e-10, name


def test_every_function_of_a_model_is_for_all_ranks_or_refused() -> None:
    """Those that take `model_fn` begin and end on all ranks together."""
    functions = {
        name: f
        for place in (gf, gf.shapley, gf.distributed)
        for name in place.__all__
        if inspect.isfunction(f := getattr(place, name))
        and "model_fn" in inspect.signature(f).parameters
    }
    assert len(functions) > 15
    alone = {"whole_shapes"}  # communicates nothing
    for name, f in functions.items():
        refuses = "refuse_pieces(" in inspect.getsource(inspect.getmodule(inspect.unwrap(f)))
        assert name in alone or refuses or "@of_all_ranks(" in inspect.getsource(f), name


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    """The others end by an error within the timeout of the process group."""
    ranks_of("fsdp_agreement.py", 3, tmp_path, "killed")
    for rank in range(2):
        said = json.loads((tmp_path / f"{rank}.json").read_text())["killed"]
        assert said.startswith("RankError: "), said
        assert "no answer comes from rank 2 of 3" in said, said
        assert "calling gf.ghost_norm" in said, said
