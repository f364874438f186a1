"""What is given that cannot be: an error each, which says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ghostfunc as gf
from ghostfunc.curvature import CurvatureError

Params = dict[str, Tensor]


def logits(p: Params, b: Any) -> Tensor:
    return F.linear(b["x"], p["w"])


def model(p: Params, b: Any) -> Tensor:
    return F.cross_entropy(logits(p, b), b["y"], reduction="none")


def labels(batch: Any) -> Tensor:
    y: Tensor = batch["y"]
    return y


SOFTMAX = gf.curvature.softmax(logits, labels)
PARAMS = {"w": torch.arange(12.0).view(3, 4) / 12}


def batch(n: int = 5) -> dict[str, Tensor]:
    return {"x": torch.randn(n, 4), "y": torch.randint(3, (n,))}


def ekfac(**options: Any) -> gf.curvature.EKFAC:
    given: dict[str, Any] = {"batches": [batch()], "likelihood": SOFTMAX, **options}
    return gf.curvature.ekfac(model, PARAMS, given.pop("batches"), **given)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"likelihood": None}, r"fisher='sampled' needs labels from the model's own"),
        ({"likelihood": None, "fisher": "exact"}, "fisher='exact' needs labels"),
        ({"likelihood": labels}, r"pass likelihood=gf\.curvature\.softmax"),
        ({"fisher": "empirical"}, "neither a likelihood nor draws"),
        ({"fisher": "true"}, "fisher='true' is not an option"),
        ({"draws": 0}, "draws=0 must be a positive integer"),
        ({"draws": 2, "fisher": "exact"}, "draws nothing"),
        ({"seed": 0.5}, "seed=0.5 must be an integer"),
        ({"sharing": "none"}, "sharing='none' is not an option"),
        ({"max_side": 0}, "max_side=0 must be a positive integer"),
        ({"max_dense": 1.5}, "max_dense=1.5"),
        ({"checkpoint_every": True}, "checkpoint_every=True"),
        ({"chunk_size": 0}, "chunk_size must be a positive integer"),
        ({"diagonal": "w"}, r"diagonal='w' must be a list of patterns"),
        ({"identity": ["v*"]}, r"identity: the pattern 'v\*' matches no parameter. The parameters"),
        ({"batches": []}, "batches is empty"),
        ({"batches": iter([batch()])}, "which can be gone through once"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(gf.OptionError, match=said):
        ekfac(**options)


@pytest.mark.parametrize("damping", [0, 0.0, -1.0, float("nan"), float("inf"), True, "0.1", None])
@pytest.mark.parametrize("method", ["solve", "inverse_sqrt"])
def test_damping_is_positive(damping: Any, method: str) -> None:
    made = ekfac()
    with pytest.raises(gf.OptionError, match="damping"):
        getattr(made, method)(PARAMS, damping)


def test_a_likelihood_of_another_loss_is_refused() -> None:
    other = gf.curvature.softmax(lambda p, b: 2 * logits(p, b), labels)
    with pytest.raises(gf.OptionError, match="likelihood is not that of model_fn"):
        ekfac(likelihood=other)
    squares = gf.curvature.gaussian(logits, lambda b: F.one_hot(b["y"], 3).float())
    with pytest.raises(gf.OptionError, match="likelihood is not that of model_fn"):
        ekfac(likelihood=squares)


def test_labels_that_cannot_be_drawn_are_refused() -> None:
    floating = gf.curvature.softmax(logits, lambda b: b["y"].float())
    with pytest.raises(gf.BatchError, match=r"softmax needs integer labels of shape \(2,\)"):
        ekfac(likelihood=floating)
    misshapen = gf.curvature.gaussian(logits, lambda b: b["y"])
    with pytest.raises(gf.BatchError, match=r"targets of the shape of the outputs, \(2, 3\)"):
        ekfac(likelihood=misshapen)


def test_outputs_have_a_row_per_sample() -> None:
    summed = gf.curvature.softmax(lambda p, b: logits(p, b)[0], labels)
    with pytest.raises(gf.OptionError, match=r"must return a tensor \[2, \.\.\.\]"):
        ekfac(likelihood=summed)
    with pytest.raises(gf.OptionError, match="outputs must be a function"):
        gf.curvature.softmax(PARAMS, labels)  # type: ignore[arg-type]


def test_sides_that_are_too_large_are_named() -> None:
    with pytest.raises(CurvatureError, match=r"'w', seen as 3 x 4, has a side of 4.*diagonal=\["):
        ekfac(max_side=3)
    assert ekfac(max_side=3, diagonal=["w"]).blocks[0].right is False
    assert ekfac(max_side=3, identity=["w"]).blocks[0].kind == "identity"


def test_statistics_that_are_not_finite_are_named() -> None:
    # Losses are finite in float32, and so are gradients; their squares are not.
    def outputs(p: Params, b: Any) -> Tensor:
        return b["x"] @ p["w"].t()

    gaussian = gf.curvature.gaussian(outputs, lambda b: outputs(PARAMS, b))

    def squares(p: Params, b: Any) -> Tensor:
        return (outputs(p, b) - outputs(PARAMS, b)).square().sum(1)

    large = {"x": torch.full((3, 4), 1e30)}
    with pytest.raises(CurvatureError, match="parameter 'w' are not finite in batch 1"):
        gf.curvature.ekfac(squares, PARAMS, [{"x": torch.randn(3, 4)}, large], likelihood=gaussian)


def test_losses_that_are_not_finite_are_refused() -> None:
    bad = batch()
    bad["x"][2] = float("nan")
    with pytest.raises(gf.NonFiniteLossError):
        ekfac(batches=[batch(), bad])


def test_ops_without_a_rule_are_named() -> None:
    def model_fn(p: Params, ids: Tensor) -> Tensor:
        return F.embedding(ids, p["w"], max_norm=1.0).square().sum((1, 2))

    with pytest.raises(gf.UnsupportedOpError, match=r"F\.embedding with max_norm"):
        gf.curvature.ekfac(model_fn, PARAMS, [torch.randint(3, (5, 2))], fisher="empirical")


def test_both_passes_see_the_same_samples() -> None:
    class Shrinking:
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            return iter([batch(), batch()][: 1 if self.passes == 3 else 2])

    with pytest.raises(CurvatureError, match="held 10 samples the first time and 5 the second"):
        ekfac(batches=Shrinking())


def test_a_relative_damping_needs_a_curvature() -> None:
    params = {**PARAMS, "idle": torch.ones(2)}
    made = gf.curvature.ekfac(model, params, [batch()], likelihood=SOFTMAX)
    with pytest.raises(CurvatureError, match=r"'idle' has no curvature at all \(it is unused\)"):
        made.solve(params, 0.1, relative=True)


def test_samples_that_talk_to_each_other_are_refused() -> None:
    def coupled(p: Params, b: Any) -> Tensor:
        return model(p, b) - model(p, b).mean()

    with pytest.raises(gf.CoupledSamplesError):
        gf.curvature.ekfac(coupled, PARAMS, [batch()], fisher="empirical")


class Loader:
    """Batches that are no pytree."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


@pytest.mark.parametrize("side", ["train", "queries"])
def test_a_loader_without_batches(side: str) -> None:
    sides = {"train": batch(), "queries": batch(2), side: Loader()}
    with pytest.raises(gf.BatchError, match=f"{side} is a Loader without any batch"):
        gf.influence(model, PARAMS, **sides, curvature=None)


def test_directions_of_products_are_finite() -> None:
    nan = {"w": PARAMS["w"] * torch.nan}
    for operator in (
        gf.curvature.hessian(model, PARAMS, [batch()]),
        gf.curvature.ggn(model, PARAMS, [batch()], likelihood=SOFTMAX),
    ):
        with pytest.raises(gf.ParamsError, match="NaN or infinite"):
            operator.matvec(nan)


@pytest.mark.parametrize("stacked", [[], [torch.ones(2, 3)], [torch.ones(2, 3, 4)] * 2])
def test_stacked_directions_are_those_of_the_parameters(stacked: Any) -> None:
    with pytest.raises(CurvatureError, match="stacked must be directions"):
        ekfac().solve_each(stacked, 0.1)


def test_a_file_where_a_folder_should_be(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CurvatureError, match="cannot be written"):
        ekfac().save(tmp_path / "file" / "curvature.safetensors")


def test_parameters_that_an_optimizer_has_moved() -> None:
    """They share memory with the module: its products would be those of another checkpoint."""
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)
    model_fn, params = gf.from_module(
        net, lambda module, b: F.cross_entropy(module(b["x"]), b["y"], reduction="none")
    )
    data, u = batch(), {k: torch.ones_like(x) for k, x in params.items()}
    copied = {k: x.detach().clone() for k, x in params.items()}
    live, kept = (gf.curvature.hessian(model_fn, p, [data]) for p in (params, copied))
    before = live.matvec(u)
    torch.testing.assert_close(kept.matvec(u), before)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(net.parameters(), lr=0.5).step()
    solver = gf.curvature.cg(live)
    for call in (
        lambda: live.matvec(u),
        lambda: live.matvec_of(data, u),
        lambda: live.check(params),
        lambda: solver.solve(u, 1.0),
        lambda: gf.influence(model_fn, params, data, data, curvature=solver, damping=1.0),
    ):
        with pytest.raises(CurvatureError, match="parameter 'bias' was written to since"):
            call()
    torch.testing.assert_close(kept.matvec(u), before)


def test_positions_of_batches_of_other_lengths() -> None:
    def by_position(p: Params, x: Tensor) -> Tensor:
        return F.linear(x, p["w"]).sin().sum((1, 2))

    sides = {
        "train": Loader(torch.ones(2, 5, 4), torch.ones(2, 3, 4)),
        "queries": torch.ones(1, 2, 4),
    }
    with pytest.raises(gf.PositionAxisError, match="batches of train have 5 positions, and 3"):
        gf.influence(by_position, PARAMS, **sides, curvature=None, per_position=True)
