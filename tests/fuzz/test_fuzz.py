"""A fixed part of `make fuzz`, and the fuzzer's own tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import fuzz_play
import fuzz_shrink
import fuzz_source
import pytest
import torch
from fuzz_changes import CHANGED, MOVED
from fuzz_play import Check, Compiled, Invalid, play
from fuzz_program import CHANGES, MOVES, Program, Setting, Step, random_program
from fuzz_shrink import kinds, shrunk
from fuzz_source import source
from torch import Tensor

import ghostfunc as gf
from ghostfunc._factors import pairs
from ghostfunc._factors.factor import Outer
from ghostfunc._taps import run
from ghostfunc._trace import beside_fewer

SEEDS = range(20)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_number_is_wrong(seed: int) -> None:
    """Every call ends in the right number or in an error of ghostfunc's own."""
    program = random_program(seed)
    try:
        checks = play(program, count=3)
    except Invalid as reason:
        pytest.skip(str(reason))
    failed = [c for c in checks if c.failed]
    assert not failed, "\n".join(["", *(str(c.verdict) for c in failed), source(program)[0]])


def test_a_seed_has_one_program() -> None:
    programs = [random_program(seed) for seed in range(50)]
    assert programs == [random_program(seed) for seed in range(50)]
    assert len({source(program)[0] for program in programs}) == 50


def test_any_step_may_be_left_out() -> None:
    for seed in range(40):
        program = random_program(seed)
        for smaller in fuzz_shrink._smaller(program):
            text, shapes = source(smaller)
            compile(text, "<smaller>", "exec")
            assert shapes


LINEAR = Step(
    "product", {"spelling": 0, "slot": 0, "chain": (), "out": 5, "bias": False, "by linear": True}
)
ACT = Step("act", {"spelling": 0, "slot": 0})


def small_program(*steps: Step) -> Program:
    settings = (Setting(3, 4, 2, 2), Setting(2, 3, 1, 1, "full"))
    return Program(7, steps, "masked", ("squares",), settings)


def test_what_is_right_is_found_right() -> None:
    checks = play(small_program(ACT, LINEAR), count=0)
    assert {c.status for c in checks if not c.failed} <= {"right", "refused"}
    assert [c for c in checks if c.failed] == []
    assert sum(c.status == "right" for c in checks) > 50


def test_a_fault_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of whatever has a product among its uses are wrong, and no proof refuses them."""
    monkeypatch.setattr(run, "prove", lambda claim, check, randomness: None)
    right = pairs.sqnorms

    def wrong(bundle: Any, **options: Any) -> Tensor:
        return right(bundle, **options) * (2 if any(isinstance(f, Outer) for f in bundle) else 1)

    monkeypatch.setattr(pairs, "sqnorms", wrong)
    inside = Step("residual", {"spelling": 0}, (ACT, Step("layout", _to("t n d")), LINEAR))
    program = small_program(ACT, inside, ACT, replace(LINEAR, args={**LINEAR.args, "slot": 1}))
    failed = [c for c in play(program, count=3) if c.status == "wrong"]
    assert failed
    small, check = shrunk(program, failed[0])
    assert check.status == "wrong"
    assert kinds(small) == ["product"]
    assert len(small.settings) == 1


LATENT = Step(
    "latent",
    {"spelling": 0, "slot": 0, "move": "flip", "weighed": 0, "weighed first": False},
)
AMBIENT = Step("ambient", {"spelling": 0, "slot": 0, "what": "bool", "in place": False})


def changing(*steps: Step) -> Program:
    """A program in two settings of the same shapes."""
    program = small_program(*steps)
    first = program.settings[0]
    return replace(program, settings=(first, replace(first, later=True)))


@pytest.mark.parametrize(("seed", "kind"), [(57, "latent"), (54, "ambient")])
def test_programs_have_what_changes_later(seed: int, kind: str) -> None:
    program = random_program(seed)
    assert any(kind in x for x in kinds(program))
    assert not program.settings[0].later
    assert program.settings[-1].later
    text = source(program)[0]
    assert ('batch["f"]' if kind == "latent" else "def turn(later):") in text


def test_every_move_and_every_change_can_be_written() -> None:
    assert set(MOVES) == set(MOVED)
    assert set(CHANGES) == set(CHANGED)


@pytest.mark.parametrize("move", MOVES)
def test_rows_of_others_are_right_while_they_weigh_nothing(move: str) -> None:
    moved = replace(LATENT, args={**LATENT.args, "move": move})
    checks = play(changing(LINEAR, moved), only=["norms", "dots", "sample_grads_by_vmap"])
    assert [c.coupled for c in checks] == [False] * 3 + [True] * 3
    assert [c.status for c in checks] == ["right"] * 3 + ["refused"] * 3


def test_rows_of_others_that_nobody_sees_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside_fewer, "moves_samples", lambda *args: False)
    program = changing(LINEAR, ACT, LATENT)
    failed = [c for c in play(program, only=["norms", "dots"]) if c.failed]
    assert {(c.setting, c.status, c.coupled) for c in failed} == {(1, "wrong", True)}
    small, _ = shrunk(program, failed[0])
    assert kinds(small) in (["latent flip"], ["product", "latent flip"])
    assert [x.later for x in small.settings] == [False, True]


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_closed_over_is_as_it_is_at_the_call(what: str) -> None:
    changed = replace(AMBIENT, args={**AMBIENT.args, "what": what})
    before = torch.get_default_dtype()
    checks = play(changing(LINEAR, changed), only=["norms", "dots"])
    assert torch.get_default_dtype() is before
    ends = ["right"] * 2 + ["refused" if checks[-1].coupled else "right"] * 2
    assert [c.status for c in checks] == ends


def test_a_value_of_before_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is asked about the function as it was at first."""
    made: list[Compiled] = []
    compiled, norms = fuzz_play.compiled, gf.ghost_norm

    def noted(program: Program) -> Compiled:
        made.append(compiled(program))
        return made[-1]

    def of_before(*args: Any, **options: Any) -> Any:
        made[-1].turn(False)
        return norms(*args, **options)

    monkeypatch.setattr(fuzz_play, "compiled", noted)
    monkeypatch.setattr(gf, "ghost_norm", of_before)
    factor = replace(AMBIENT, args={**AMBIENT.args, "what": "factor"})
    checks = play(changing(LINEAR, factor), only=["norms"])
    assert [(c.status, c.coupled) for c in checks] == [("right", False), ("wrong", False)]


def _to(axes: str) -> dict[str, object]:
    return {"spelling": 0, "slot": 0, "axes": axes}


def test_a_number_of_coupled_samples_is_wrong() -> None:
    """The judge needs no library for that: it compares samples alone with samples in company."""
    couple = Step("couple", {"spelling": 1, "slot": 0})
    checks = play(small_program(couple, LINEAR), only=["dots"])
    assert all(c.coupled for c in checks)
    numbers = [Check(0, c.verdict._replace(status="right"), True) for c in checks]
    assert {c.status for c in numbers} == {"wrong"}


def test_one_sample_depends_on_no_other() -> None:
    """A quantity is about the batches that it is asked of: a batch of one is not coupled."""
    couple = Step("couple", {"spelling": 1, "slot": 0})
    one, both = "validation_gradients", ["dots", "gram_with_others", "steps"]
    for n, m in ((3, 1), (1, 3)):
        settings = (Setting(n, 4, m, 2),)
        program = replace(small_program(couple, LINEAR), settings=settings)
        checks = play(program, only=[one, "norms", *both])
        coupled = {c.verdict.quantity for c in checks if c.coupled}
        assert coupled == {*both, "norms" if n > 1 else one}
        assert not [c for c in checks if c.failed]


def test_what_plain_torch_cannot_run_is_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fuzz_source._LOSSES, "all", "(h @ h).sum(-1)")  # shapes do not fit
    with pytest.raises(Invalid, match="RuntimeError"):
        play(replace(small_program(LINEAR), loss="all"))
