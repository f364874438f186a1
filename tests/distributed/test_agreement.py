"""One rank meets something else than the others: all of them end, and say whose fault it was."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ddp_ranks import Ended, results, start

KINDS = (
    "empty", "invalid", "backward", "interrupt", "option", "reduction", "shapes", "structure",
)  # fmt: skip


@pytest.fixture(scope="module")
def disagreed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What both ranks said of every kind, one after the other."""
    found: list[dict[str, str]] = results(
        "disagreements", 2, tmp_path_factory.mktemp("disagreed"), *KINDS
    )
    return found


def test_a_new_structure_on_one_rank_holds_nobody_up(disagreed: list[dict[str, str]]) -> None:
    assert [said["structure"] for said in disagreed] == ["right", "right"]


@pytest.mark.parametrize(
    ("kind", "own", "others"),
    [
        (
            "empty",
            r"BatchError: train is empty",
            r"RankError: ghost_value_and_grad: while reading its arguments, rank 1 failed with "
            r"BatchError: train is empty .*No rank has a result",
        ),
        (
            "invalid",
            r"RuntimeError: Expected tensor for argument #1 'indices'",
            r"RankError: .* exchanging the training gradient, rank 1 failed with RuntimeError",
        ),
        (
            "backward",
            r"NonFiniteLossError",
            r"RankError: .* while exchanging the validation gradient, rank 1 failed with "
            r"NonFiniteLossError",
        ),
        (
            "interrupt",
            r"KeyboardInterrupt",
            r"RankError: .* while exchanging the validation gradient, rank 1 failed with "
            r"KeyboardInterrupt",
        ),
        (
            "option",
            r'OptionError: ghost_value_and_grad got a group and reduction="none"',
            r"RankError: .* rank 1 failed with OptionError",
        ),
        (
            "reduction",
            r"RankError: .*rank 0 was given .* reduction='mean'.*; rank 1 was given .*='sum'",
            r"RankError: .*rank 0 was given .* reduction='mean'.*; rank 1 was given .*='sum'",
        ),
        (
            "shapes",
            r"RankError: .*given 7 parameters of 384 elements .*given 7 parameters of 401",
            r"RankError: .*given 7 parameters of 384 elements .*given 7 parameters of 401",
        ),
    ],
)
def test_an_error_of_one_rank_is_one_of_all(
    kind: str, own: str, others: str, disagreed: list[dict[str, str]]
) -> None:
    for rank, said in enumerate(disagreed):
        assert re.search(own if rank == 1 else others, said[kind], re.S), (rank, said[kind])


def test_groups_whose_ranks_could_not_have_one_gradient(tmp_path: Path) -> None:
    for rank, said in enumerate(results("said_of_groups", 2, tmp_path)):
        for name in ("weights", "clipped"):
            assert re.search(r"RankError: .*rank 0 was given .* weights [0-9a-f]+", said[name])
        assert re.search(r"RankError: .*weights 'norm\.bias' [0-9a-f]+", said["weights later"])
        assert re.search(r"RankError: .*was given .* directions [0-9a-f]+", said["directions"])
        assert said["same weights"] == "right"
        for name in ("all_reduce", "functional", "objects"):
            ops = r"(c10d|_c10d_functional)[.:]\w+|torch\.distributed\.all_\w+"
            assert re.search(rf"CoupledSamplesError: model_fn calls ({ops})", said[name]), said
        outside = r"OptionError: gather got a group that this process, rank 1, is not in"
        assert re.search(outside if rank == 1 else "^right$", said["nobody"]), said
        assert {x for name, x in said.items() if name.startswith("torch.")} == {"True"}


GONE = ("killed", "killed in the backward pass", "ended")


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Ended]]:
    """How the ranks of groups ended whose rank 1 is gone or held up. Most of it is waiting, which
    the groups do side by side."""
    folder = tmp_path_factory.mktemp
    started = {"held up": start("disagreement", 2, folder("held"), "held up", seconds=8)}
    for kind in GONE:
        started[kind] = start("disagreement", 4, folder("gone"), kind)
    return {kind: group.ended() for kind, group in started.items()}


@pytest.mark.parametrize("kind", GONE)
def test_the_others_name_a_rank_that_is_gone(kind: str, left: dict[str, list[Ended]]) -> None:
    ended = left[kind]
    assert ended[1].code == (0 if kind == "ended" else -9)
    for rank in (0, 2, 3):
        assert ended[rank].code == 1
        # On a busy machine a rank that is late counts as missing, too.
        gone = r"no answer comes from (rank [023], )*rank 1(, rank [023])* of 4: killed"
        said = rf"RankError: .*: rank {rank} waited .*{gone}"
        assert re.search(said, ended[rank].result), ended[rank]


def test_the_others_name_a_rank_that_is_held_up(left: dict[str, list[Ended]]) -> None:
    first, last = left["held up"]
    assert (first.code, last.code) == (1, 0)
    said = r"RankError: .*: rank 0 waited for the others while reading its arguments, and no answer"
    assert re.search(said + r" comes from rank 1 of 2: .*held up", first.result)
