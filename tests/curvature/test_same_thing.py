"""A curvature, its data, its loss and its module are the same thing in every pass, or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ghostfunc as gf
from ghostfunc.curvature import EKFAC, CurvatureError

Batch = tuple[Tensor, ...]


def outputs(module: nn.Module, batch: Batch) -> Tensor:
    """In float32, whatever the caller's autocast."""
    with torch.autocast("cpu", enabled=False):
        z: Tensor = module(batch[0])
        return z


def losses(module: nn.Module, batch: Batch) -> Tensor:
    weights = batch[2] if len(batch) > 2 else 1
    return F.cross_entropy(outputs(module, batch), batch[1], reduction="none") * weights


class Problem:
    """A module, with 8 samples and 3 queries."""

    def __init__(self) -> None:
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
        self.fn, self.params = gf.from_module(self.net, losses)
        self.likelihood = gf.curvature.softmax(gf.from_module(self.net, outputs)[0], lambda b: b[1])
        self.train = torch.randn(8, 4), torch.randint(3, (8,))
        self.queries = torch.randn(3, 4), torch.randint(3, (3,))

    def ekfac(self, batches: Any = None, **options: Any) -> EKFAC:
        batches = [self.train] if batches is None else batches
        if options.get("fisher") != "empirical":
            options = {"likelihood": self.likelihood, **options}
        return gf.curvature.ekfac(self.fn, self.params, batches, **options)

    def influence(self, made: Any, train: Any = None, **options: Any) -> Tensor:
        train = self.train if train is None else train
        options = {"damping": 0.1, **options}
        found: Tensor = gf.influence(
            self.fn, self.params, train, self.queries, curvature=made, **options
        )
        return found


@pytest.fixture
def problem() -> Problem:
    return Problem()


# --- data -------------------------------------------------------------------------------------


def test_a_loader_in_another_order_is_refused(problem: Problem) -> None:
    made, data = problem.ekfac(fisher="empirical"), TensorDataset(*problem.train)
    expected = problem.influence(made)
    options: Any = {"directions_at_once": 1}
    straight: Any = DataLoader(data, batch_size=3)
    torch.testing.assert_close(problem.influence(made, straight, **options), expected)
    shuffled: Any = DataLoader(data, batch_size=3, shuffle=True)
    with pytest.raises(gf.OptionError, match=r"another order.*DataLoader\(shuffle=False\)"):
        problem.influence(made, shuffled, **options)


class Stopped(Exception):
    pass


class Stops:
    """Batches that end with an exception."""

    def __init__(self, batches: list[Batch], at: int) -> None:
        self.batches, self.at = batches, at

    def __iter__(self) -> Iterator[Batch]:
        yield from self.batches[: self.at]
        raise Stopped


@pytest.mark.parametrize("passes", [0, 1])
def test_other_batches_are_not_added_to_those_of_a_kept_state(
    problem: Problem, tmp_path: Path, passes: int
) -> None:
    batches = [(torch.randn(4, 4), torch.randint(3, (4,))) for _ in range(4)]
    whole = problem.ekfac(batches, fisher="empirical")
    options: Any = {"fisher": "empirical", "checkpoint": tmp_path / "c", "checkpoint_every": 1}

    class Dies:
        """The second pass, or the first, is stopped after three batches."""

        left = passes

        def __iter__(self) -> Iterator[Batch]:
            self.left -= 1
            return iter(batches) if self.left >= 0 else iter(Stops(batches, 3))

    first_look = 1  # at two samples, before the first pass
    dying = Dies()
    dying.left += first_look
    with pytest.raises(Stopped):
        problem.ekfac(dying, **options)
    others = [(torch.randn(4, 4), y) for _, y in batches]
    for wrong in (others, batches[::-1], [*batches[:2], others[2], batches[3]], batches[:2]):
        with pytest.raises(CurvatureError, match="is the state of other batches: the first 3"):
            problem.ekfac(wrong, **options)
    made = problem.ekfac(batches, **options)
    torch.testing.assert_close(problem.influence(made), problem.influence(whole))


# --- the loss ---------------------------------------------------------------------------------


def test_a_likelihood_is_compared_on_every_sample(problem: Problem) -> None:
    """The first samples weigh one, as the likelihood believes."""
    x, y = problem.train
    w = torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 3])
    said = "likelihood is not that of model_fn: samples from number 7"
    with pytest.raises(gf.OptionError, match=said):
        problem.ekfac([(x, y, w)])
    batches = [(x[:5], y[:5], w[:5]), (x[5:], y[5:], w[5:])]
    ggn = gf.curvature.ggn(problem.fn, problem.params, batches, likelihood=problem.likelihood)
    with pytest.raises(gf.OptionError, match="samples from number 2 of a batch"):
        ggn.matvec(problem.params)


def test_a_sample_without_labels_has_no_part_in_the_curvature() -> None:
    def logits(p: dict[str, Tensor], b: Batch) -> Tensor:
        return F.embedding(b[0], p["e"]) @ p["w"]

    def model(p: dict[str, Tensor], b: Batch) -> Tensor:
        z, counted = logits(p, b), b[1] != -100
        flat = F.cross_entropy(z.flatten(0, 1), b[1].flatten(), reduction="none")
        return flat.view(b[1].shape).sum(1) / counted.sum(1).clamp(min=1)

    p = {"e": torch.randn(6, 4), "w": torch.randn(4, 6)}
    ids, labels = torch.randint(6, (5, 3)), torch.randint(6, (5, 3))
    labels[3], labels[1, 1:] = -100, -100
    likelihood = gf.curvature.softmax(logits, lambda b: b[1])
    rest, answers = torch.tensor([0, 1, 2, 4]), []
    for batch, share in (((ids, labels), 1.0), ((ids[rest], labels[rest]), 4 / 5)):
        made = gf.curvature.ekfac(model, p, [batch], likelihood=likelihood, fisher="exact")
        product = gf.curvature.ggn(model, p, [batch], likelihood=likelihood).matvec(p)
        answers.append([share * sum(r.trace for r in made.report().rows), share * product["w"]])
    torch.testing.assert_close(*answers)


# --- the module -------------------------------------------------------------------------------


class Adapted(nn.Module):
    """An adapter that begins at zero, so that its parameters do not tell the bases apart."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 3).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.ones(4, 1)), nn.Parameter(torch.zeros(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + x @ self.a @ self.b
        return y


def test_a_curvature_belongs_to_a_frozen_base(problem: Problem, tmp_path: Path) -> None:
    (fn, params), (other, others) = (gf.from_module(Adapted(), losses) for _ in range(2))
    made = gf.curvature.ekfac(fn, params, [problem.train], fisher="empirical")
    made.save(tmp_path / "c")
    for curvature in (made, gf.curvature.load(tmp_path / "c", params)):
        arguments: Any = (problem.train, problem.queries)
        gf.influence(fn, params, *arguments, curvature=curvature, damping=0.1)
        with pytest.raises(CurvatureError, match="other frozen parameters or buffers"):
            gf.influence(other, others, *arguments, curvature=curvature, damping=0.1)


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-50, 1e-30, 1e300])
def test_a_damping_without_digits_is_refused(problem: Problem, damping: float) -> None:
    made = problem.ekfac()
    for way in ("directions", "rows"):
        with pytest.raises(gf.OptionError, match="no digits left in torch"):
            problem.influence(made, damping=damping, way=way)
    # A preconditioner needs no digits.
    about = made.solve_about(problem.params, damping)
    assert all(bool(x.isfinite().all()) for x in about.values())


QUANTITIES: dict[str, Callable[[Problem, EKFAC], Any]] = {
    "eigenvalues": lambda p, _: [r.trace for r in p.ekfac(fisher="exact").report().rows],
    "directions": lambda p, made: p.influence(made, way="directions"),
    "rows": lambda p, made: p.influence(made, way="rows"),
    "solve": lambda p, made: made.solve(p.params, 0.1),
    "matvec": lambda p, made: made.matvec(p.params),
    "inverse_sqrt": lambda p, made: made.inverse_sqrt(p.params, 0.1),
    "ggn": lambda p, _: gf.curvature.ggn(p.fn, p.params, [p.train], likelihood=p.likelihood).matvec(
        p.params
    ),
    "ggn, reverse": lambda p, _: gf.curvature.ggn(
        p.fn, p.params, [p.train], likelihood=p.likelihood, hvp="reverse"
    ).matvec(p.params),
    "hessian": lambda p, _: gf.curvature.hessian(p.fn, p.params, [p.train]).matvec(p.params),
    "hessian, reverse": lambda p, _: gf.curvature.hessian(
        p.fn, p.params, [p.train], hvp="reverse"
    ).matvec(p.params),
}


@pytest.mark.parametrize("name", QUANTITIES)
def test_autocast_rounds_the_model_alone(problem: Problem, name: str) -> None:
    """Here not even that: its losses switch autocast off."""
    made, ask = problem.ekfac(), QUANTITIES[name]
    expected = ask(problem, made)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ask(problem, made)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
