"""The accumulators: pure, and saved and loaded as they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import ghostfunc as gf

shapley = gf.shapley


def test_values_of_a_sample_add_up_over_steps_and_epochs() -> None:
    state = shapley.init(num_sets=2)
    generator = torch.Generator().manual_seed(0)
    expected: dict[int, Any] = {}
    counts: dict[int, int] = {}
    for _ in range(20):
        ids = torch.randint(-7, 40, (6,), generator=generator)  # repeats within a batch too
        values = torch.randn(6, 2, generator=generator, dtype=torch.float64)
        state = shapley.update(state, ids, values)
        for i, v in zip(ids.tolist(), values, strict=True):
            expected[i] = expected.get(i, 0) + v
            counts[i] = counts.get(i, 0) + 1
    scores = shapley.finalize(state)
    assert scores.ids.tolist() == sorted(expected)
    for i, value, count in zip(scores.ids.tolist(), scores.values, scores.counts, strict=True):
        torch.testing.assert_close(value, expected[i], rtol=1e-14, atol=1e-14)
        assert int(count) == counts[i]


def test_update_leaves_the_state_as_it_was() -> None:
    state = shapley.update(shapley.init(), [3, 1], torch.ones(2))
    before = copy.deepcopy(state)
    shapley.update(state, [1, 2], torch.ones(2))
    shapley.merge(state, shapley.update(shapley.init(), [1, 0], torch.ones(2)))
    assert all(torch.equal(before[k], state[k]) for k in before)


def test_a_state_is_saved_and_goes_on(tmp_path: Path) -> None:
    state = shapley.update(shapley.init(), [3, 1], torch.tensor([0.5, 0.25]))
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    one, other = (shapley.update(s, [1], torch.ones(1)) for s in (state, loaded))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_merge_is_training_on_both() -> None:
    first, second = ([4, 1], torch.rand(2, 3)), ([2, 4], torch.rand(2, 3))
    both = shapley.update(shapley.update(shapley.init(3), *first), *second)
    parts = [shapley.update(shapley.init(3), *x) for x in (first, second)]
    merged = shapley.merge(*parts)
    assert all(torch.equal(both[k], merged[k]) for k in both)


def test_scores_of_no_step() -> None:
    scores = shapley.finalize(shapley.init(2))
    assert [tuple(x.shape) for x in scores] == [(0,), (0, 2), (0,)]


@pytest.mark.parametrize(
    ("ids", "values", "said"),
    [
        ([1, 2], torch.ones(3), r"\[2, 1\]"),
        ([1, 2], torch.ones(2, 2), r"\[2, 1\]"),
        ([1.0, 2.0], torch.ones(2), "integers"),
        ([[1], [2]], torch.ones(2), "integers"),
        ([1, 2], torch.tensor([1.0, torch.inf]), r"samples \[2\] are not finite"),
    ],
)
def test_what_does_not_fit(ids: Any, values: Any, said: str) -> None:
    with pytest.raises(gf.OptionError, match=said):
        shapley.update(shapley.init(), ids, values)


def test_sets_of_merged_states_agree() -> None:
    with pytest.raises(gf.OptionError, match="2 and 3"):
        shapley.merge(shapley.init(2), shapley.init(3))
    with pytest.raises(gf.OptionError, match="num_sets=0 must be an integer, 1 or more"):
        shapley.init(0)


@pytest.mark.parametrize(
    ("ids", "values", "said"),
    [
        (torch.tensor(3), torch.ones(1), r"integers \[n\]; got \(\)"),
        (torch.tensor([True, False]), torch.ones(2), "of torch.bool"),
        ([True, False], torch.ones(2), "of torch.bool"),
        (torch.ones(1, dtype=torch.complex64), torch.ones(1), "of torch.complex64"),
        ([1], torch.ones(1, dtype=torch.complex64), "values must be real numbers"),
        ([2**63], torch.ones(1), "ids must be integers"),
        ("ab", torch.ones(2), "ids must be integers"),
    ],
)
def test_what_is_no_number_of_a_sample(ids: Any, values: Any, said: str) -> None:
    with pytest.raises(gf.OptionError, match=said):
        shapley.update(shapley.init(), ids, values)


def test_a_step_of_no_samples() -> None:
    state = shapley.update(shapley.init(), [3], torch.ones(1))
    assert shapley.update(state, [], torch.ones(0, 1))["ids"].tolist() == [3]


@pytest.mark.parametrize(
    "changed",
    [
        {"ids": torch.tensor([2, 1])},
        {"ids": torch.tensor([1, 1])},
        {"ids": torch.tensor([1.0, 2.0])},
        {"ids": torch.tensor([1])},
        {"values": torch.ones(2, 1)},
        {"values": torch.ones(2).double()},
        {"counts": torch.ones(1).long()},
        {"counts": [1, 1]},
    ],
)
def test_what_is_no_state(changed: dict[str, Any]) -> None:
    """Of ids that do not ascend, values would be added to those of other samples."""
    state = shapley.update(shapley.init(), [1, 2], torch.ones(2))
    for call in (
        lambda x: shapley.update(x, [1], torch.ones(1)),
        lambda x: shapley.merge(state, x),
        shapley.finalize,
    ):
        with pytest.raises(gf.OptionError, match="is no state: its ids must ascend"):
            call({**state, **changed})
