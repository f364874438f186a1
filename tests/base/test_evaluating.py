"""Evaluation mode for scores between training steps, and what couples samples by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghostfunc as gf

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)
    ).double()


def test_every_submodule_gets_its_own_mode_back() -> None:
    module = net().train()
    module[1].eval()  # frozen, as in a fine-tuned backbone
    flags = [m.training for m in module.modules()]
    with gf.evaluating(module) as inside:
        assert inside is module
        assert not any(m.training for m in module.modules())
        with gf.evaluating(module):
            pass
        assert not any(m.training for m in module.modules())
    assert [m.training for m in module.modules()] == flags
    with pytest.raises(KeyboardInterrupt), gf.evaluating(module):
        raise KeyboardInterrupt
    assert [m.training for m in module.modules()] == flags


def test_scores_between_steps_are_exact_and_leave_statistics_alone() -> None:
    module = net()
    model_fn, params = gf.from_module(module, lambda m, x: m(x).square().mean(1))
    train, val = (torch.randn(k, 4, dtype=torch.float64) for k in (5, 3))
    module(train)  # statistics that are not those of a fresh layer
    before = {k: x.clone() for k, x in module.named_buffers()}
    with pytest.raises(gf.CoupledSamplesError, match=r"gf.evaluating\(module\)"):
        gf.ghost_dot_prod(model_fn, params, train, val)
    state = torch.get_rng_state()
    with gf.evaluating(module):
        scores = gf.ghost_dot_prod(model_fn, params, train, val)
        loop = gf.ghost_dot_prod(model_fn, params, train, val, mode="materialized", vectorize=False)
    assert torch.allclose(scores, loop, rtol=1e-10)
    assert all(torch.equal(before[k], x) for k, x in module.named_buffers())
    assert module.training
    assert torch.equal(state, torch.get_rng_state())


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(gf.OptionError, match="got a dict"), gf.evaluating({}):  # type: ignore[arg-type]
        pass


def clip(p: Any, batch: Any) -> Tensor:
    a, b = (F.normalize(batch[k] @ p["w"], dim=1) for k in ("image", "text"))
    return F.cross_entropy(a @ b.mT, torch.arange(len(a)), reduction="none")


def cosines(p: Any, batch: Any) -> Tensor:
    a, b = (batch[k] @ p["w"] for k in ("image", "text"))
    table = F.cosine_similarity(a[:, None], b[None], dim=2)
    return table.diagonal() - table.logsumexp(1)


def mixup(p: Any, batch: Any) -> Tensor:
    x = batch["image"]
    rows = torch.arange(len(x)).roll(1)
    return ((0.7 * x + 0.3 * x[rows]) @ p["w"]).square().mean(1)


def flipped(p: Any, batch: Any) -> Tensor:
    x = batch["image"] @ p["w"]
    return (0.7 * x + 0.3 * x.flip(0)).square().mean(1)


def normalised(p: Any, batch: Any) -> Tensor:
    x = batch["image"] @ p["w"]
    return (x - x.mean(0)).square().mean(1)


@pytest.mark.parametrize(
    ("model_fn", "named"),
    [
        (clip, r"mm makes a table of all pairs of samples, shape \[n, n\]: in-batch contrast"),
        (cosines, "in-batch contrast"),
        (mixup, r"index puts rows of some samples in the place of others, shape \[n, 4\]: mixup"),
        (flipped, "flip puts rows.*Mix before the call"),
        (normalised, "Usual causes: batch normalisation in training mode, mixup"),
    ],
)
@pytest.mark.parametrize("mode", ["ghost", "jvp"])
def test_the_call_that_couples_samples_is_named(model_fn: Any, named: str, mode: str) -> None:
    torch.manual_seed(0)
    params = {"w": torch.randn(4, 3, dtype=torch.float64)}
    batch = {k: torch.randn(5, 4, dtype=torch.float64) for k in ("image", "text")}
    with pytest.raises(gf.CoupledSamplesError, match=named):
        gf.ghost_dot_prod(model_fn, params, batch, batch, mode=mode)


def test_looking_up_labels_is_not_taken_for_mixing() -> None:
    """Indices of rows and columns are a sample's own; the normalised input is what couples."""

    def model_fn(p: Any, batch: Any) -> Tensor:
        x = batch["x"] @ p["w"]
        picked = x[torch.arange(len(x)), batch["y"]]
        return picked - x.mean(0).sum()

    params = {"w": torch.randn(4, 3)}
    batch = {"x": torch.randn(5, 4), "y": torch.randint(3, (5,))}
    with pytest.raises(gf.CoupledSamplesError, match="Usual causes"):
        gf.ghost_norm(model_fn, params, batch)


def test_the_example_measures_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """With GroupNorm scores of one small step are leave-one-out itself."""
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(EXAMPLES))
    try:
        example = __import__("batch_norm")
    finally:
        sys.path.remove(str(EXAMPLES))
        sys.modules.pop("batch_norm", None)
    monkeypatch.setattr(example, "LR", 1e-4)
    assert example.agreement(0, "GroupNorm", 1, n=12, m=12) > 0.99
    assert -1 <= example.agreement(0, "BatchNorm2d", 1, n=12, m=12) <= 1
