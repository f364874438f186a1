"""Curvatures on disk: saved, cut short, and computations that go on where they were killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

import ghostfunc as gf
from ghostfunc.curvature import CurvatureError

Params = dict[str, Tensor]


def logits(p: Params, b: Any) -> Tensor:
    return F.linear(torch.tanh(F.linear(b["x"], p["w"], p["b"])), p["v"])


def model(p: Params, b: Any) -> Tensor:
    return F.cross_entropy(logits(p, b), b["y"], reduction="none")


SOFTMAX = gf.curvature.softmax(logits, lambda b: b["y"])


def draw_params() -> Params:
    return {"w": torch.randn(3, 4), "b": torch.randn(3), "v": torch.randn(5, 3)}


def draw_batches(count: int = 4) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(6, 4), "y": torch.randint(5, (6,))} for _ in range(count)]


def equal(a: Params, b: Params) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[k]) for k, x in a.items())


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    params, path = draw_params(), tmp_path / "c.safetensors"
    made = gf.curvature.ekfac(model, params, draw_batches(), likelihood=SOFTMAX)
    made.save(path)
    loaded = gf.curvature.load(path, params)
    assert equal(loaded.solve(params, 0.1), made.solve(params, 0.1))
    assert loaded.report() == made.report()
    assert [x.name for x in tmp_path.iterdir()] == ["c.safetensors"]


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_an_error(tmp_path: Path, kept: float) -> None:
    params, path = draw_params(), tmp_path / "c.safetensors"
    gf.curvature.ekfac(model, params, draw_batches(1), likelihood=SOFTMAX).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(CurvatureError, match=r"c\.safetensors' is no whole safetensors file"):
        gf.curvature.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CurvatureError, match=r"was not written by ghostfunc"):
        gf.curvature.load(tmp_path / "other.safetensors")
    state = tmp_path / "state.safetensors"
    gf.curvature.ekfac(
        model, draw_params(), draw_batches(1), likelihood=SOFTMAX, checkpoint=state,
        checkpoint_every=1,
    )  # fmt: skip
    with pytest.raises(CurvatureError, match="the state of a computation"):
        gf.curvature.load(state)


def test_a_curvature_belongs_to_one_checkpoint(tmp_path: Path) -> None:
    params, path = draw_params(), tmp_path / "c.safetensors"
    made = gf.curvature.ekfac(model, params, draw_batches(1), likelihood=SOFTMAX)
    made.save(path)
    with pytest.raises(CurvatureError, match="other values of these parameters"):
        gf.curvature.load(path, {**params, "b": params["b"] + 1})
    with pytest.raises(
        CurvatureError, match=r"Missing here: \['b'\]; not in the curvature: \['c'\]"
    ):
        made.solve({"w": params["w"], "c": params["b"], "v": params["v"]}, 0.1)
    with pytest.raises(CurvatureError, match=r"'b' of shape \(3,\), but it has shape \(4,\)"):
        made.matvec({**params, "b": torch.zeros(4)})


class Killed(Exception):
    pass


class Dying:
    """Batches of which a run gets so many, over all passes, before it is killed."""

    def __init__(self, batches: list[Any], alive: int) -> None:
        self.batches, self.left = batches, alive

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if self.left == 0:
                raise Killed
            self.left -= 1
            yield batch


# One batch is looked at first; then there are two passes over five.
@pytest.mark.parametrize("alive", [1, 2, 4, 6, 7, 10])
def test_a_killed_computation_goes_on(tmp_path: Path, alive: int) -> None:
    params, batches = draw_params(), draw_batches(5)
    options: Any = {"likelihood": SOFTMAX, "checkpoint": tmp_path / "state", "checkpoint_every": 2}
    expected = gf.curvature.ekfac(model, params, batches, likelihood=SOFTMAX)
    with pytest.raises(Killed):
        gf.curvature.ekfac(model, params, Dying(batches, alive), **options)
    runs = 0

    def counting(p: Params, b: Any) -> Tensor:
        nonlocal runs
        runs += 1
        return logits(p, b)

    options["likelihood"] = gf.curvature.softmax(counting, lambda b: b["y"])
    made = gf.curvature.ekfac(model, params, batches, **options)
    assert equal(made.solve(params, 0.1), expected.solve(params, 0.1))
    resumed, runs = runs, 0
    gf.curvature.ekfac(model, params, batches, **{**options, "checkpoint": None})
    assert resumed < runs or alive < 3  # before the first state is kept


def test_a_finished_computation_is_not_run_again(tmp_path: Path) -> None:
    params, batches, state = draw_params(), draw_batches(4), tmp_path / "state"
    options: Any = {"likelihood": SOFTMAX, "checkpoint": state, "checkpoint_every": 2}
    first = gf.curvature.ekfac(model, params, batches, **options)
    again = gf.curvature.ekfac(model, params, batches, **options)
    assert equal(first.matvec(params), again.matvec(params))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"sharing": "reduce"}, "sharing"),
        ({"draws": 2}, "draws"),
        ({"max_side": 7}, "limits"),
    ],
)
def test_a_state_of_another_computation_is_refused(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    params, batches = draw_params(), draw_batches(2)
    options: Any = {"likelihood": SOFTMAX, "checkpoint": tmp_path / "s", "checkpoint_every": 1}
    gf.curvature.ekfac(model, params, batches, **options)
    with pytest.raises(CurvatureError, match=f"another computation: it differs in {named}"):
        gf.curvature.ekfac(model, params, batches, **options, **change)
    with pytest.raises(CurvatureError, match="it differs in params"):
        gf.curvature.ekfac(model, draw_params(), batches, **options)


def test_a_damaged_state_is_an_error(tmp_path: Path) -> None:
    params, batches, state = draw_params(), draw_batches(2), tmp_path / "s"
    options: Any = {"likelihood": SOFTMAX, "checkpoint": state, "checkpoint_every": 1}
    gf.curvature.ekfac(model, params, batches, **options)
    state.write_bytes(state.read_bytes()[:-8])
    with pytest.raises(CurvatureError, match="cut short"):
        gf.curvature.ekfac(model, params, batches, **options)


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    gf.curvature.ekfac(model, draw_params(), draw_batches(3), likelihood=SOFTMAX, progress=True)
    shown = capsys.readouterr().err
    assert "bases: 100%" in shown
    assert "eigenvalues: 100%" in shown
    assert "3/3" in shown


def rewritten(path: Path, change: Any) -> None:
    """The file with what `change(tensors, about)` makes of it."""
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["ghostfunc"])
    tensors, about = change(tensors, about)
    text = about if isinstance(about, str) else json.dumps(about)
    safetensors.torch.save_file(tensors, path, {"ghostfunc": text})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, a: (t, "{"), "is damaged: its entry 'ghostfunc'"),
        (lambda t, a: (t, "3"), "has format 3"),
        (lambda t, a: (t, "{}"), "has format None"),
        (lambda t, a: (t, {**a, "blocks": [{"path": "b"}]}), "it lacks 'shape', 'kind'"),
        (lambda t, a: (t, {k: x for k, x in a.items() if k != "samples"}), "it lacks 'samples'"),
        (lambda t, a: ({k: t[k] for k in t if k != "1.left"}, a), "it lacks '1.left'"),
        (lambda t, a: ({**t, "1.left": t["1.left"][:, 1:].clone()}, a), "left of parameter 'v'"),
        (
            lambda t, a: ({**t, "0.eigenvalues": t["0.eigenvalues"] * torch.nan}, a),
            "must be finite",
        ),
    ],
)
def test_a_damaged_curvature_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    """Whole safetensors files that hold something else."""
    path = tmp_path / "curvature.safetensors"
    gf.curvature.ekfac(model, draw_params(), draw_batches(), likelihood=SOFTMAX).save(path)
    gf.curvature.load(path)
    rewritten(path, change)
    with pytest.raises(CurvatureError, match=said):
        gf.curvature.load(path)


def test_damaged_states_are_refused(tmp_path: Path) -> None:
    params, batches, path = draw_params(), draw_batches(), tmp_path / "state"
    gf.curvature.ekfac(model, params, batches, likelihood=SOFTMAX, checkpoint=path)
    rewritten(path, lambda t, a: (t, {k: x for k, x in a.items() if k != "phase"}))
    with pytest.raises(CurvatureError, match="it lacks 'phase'"):
        gf.curvature.ekfac(model, params, batches, likelihood=SOFTMAX, checkpoint=path)

    steps = [gf.unrolled.Micro(torch.arange(6), b) for b in batches]
    optimizer = gf.unrolled.sgd(lr=0.1, momentum=0.9)
    training = gf.unrolled.Training(model, params, steps, optimizer=optimizer)
    trained = gf.unrolled.train(training, keep_every=2, directory=tmp_path)
    gf.unrolled.metagradients(trained, batches[0], checkpoint=path.with_suffix(".meta"))
    for file in (*tmp_path.glob("state_*"), path.with_suffix(".meta")):
        rewritten(file, lambda t, a: ({k: t[k] for k in t if k != "slots 1"}, a))
    with pytest.raises(gf.unrolled.UnrolledError, match="it lacks 'slots 1'"):
        gf.unrolled.metagradients(trained, batches[0], checkpoint=path.with_suffix(".meta"))
    with pytest.raises(gf.unrolled.UnrolledError, match="it lacks 'slots 1'"):
        gf.unrolled.train(training, keep_every=2, directory=tmp_path)
