"""Scores of a data set: the numbers of single calls, in any order and after any interruption."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ghostfunc as gf
from ghostfunc._taps import proof
from ghostfunc.data import _budget, _score, batches, find_token_budget, padded
from ghostfunc.data._batches import width

VOCABULARY = 11
P = {
    "table": torch.randn(VOCABULARY, 4, dtype=torch.float64),
    "head": torch.randn(4, VOCABULARY, dtype=torch.float64),
}


def model_fn(p: Any, batch: dict[str, Tensor]) -> Tensor:
    hidden = torch.nn.functional.embedding(batch["input_ids"], p["table"]).tanh()
    logits = hidden[:, :-1] @ p["head"]
    labels = batch["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
    )
    return losses.view(labels.shape).sum(1) / (labels != -100).sum(1)


def draw(n: int, seed: int) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(VOCABULARY, size=rng.integers(2, 9)).tolist() for _ in range(n)]
    return [{"input_ids": row, "labels": row} for row in rows]


def length(sample: dict[str, list[int]]) -> int:
    return len(sample["input_ids"])


POOL, TARGET = draw(40, 0), draw(6, 1)
COMMON: dict[str, Any] = {"collate": padded(0), "length": length}


def target() -> Any:
    return batches(TARGET, token_budget=20, **COMMON)


def expected() -> dict[str, Tensor]:
    collate = padded(0)
    grads = [gf.per_sample_grads(model_fn, P, collate([s]), vectorize=False) for s in POOL]
    u = [gf.per_sample_grads(model_fn, P, collate([s]), vectorize=False) for s in TARGET]
    flat = torch.stack([torch.cat([g[k].flatten() for k in P]) for g in grads])
    mean = torch.stack([torch.cat([g[k].flatten() for k in P]) for g in u]).mean(0)
    losses = torch.cat([model_fn(P, collate([s])) for s in POOL])
    return {
        "dot_higher_helps": flat @ mean,
        "cosine_higher_helps": torch.nn.functional.cosine_similarity(flat, mean[None]),
        "gradient_norm": flat.norm(dim=1),
        "loss": losses,
    }


@pytest.mark.parametrize("limits", [{}, {"token_budget": 30}, {"batch_size": 1}])
def test_every_number_is_the_loops(limits: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_score, "PART", 16)
    quantities = ("dot", "cosine", "norm", "loss")
    scores = gf.score_dataset(
        model_fn, P, POOL, val=target(), quantities=quantities, **COMMON, **limits
    )
    want = expected()
    assert list(scores.columns) == list(want)
    for name, x in want.items():
        torch.testing.assert_close(scores[name], x, rtol=1e-10, atol=1e-12)


def test_ids_follow_the_samples_in_any_order() -> None:
    names = [f"sample {i}" for i in range(len(POOL))]
    order = np.random.default_rng(3).permutation(len(POOL)).tolist()
    one = gf.score_dataset(model_fn, P, POOL, val=target(), ids=names, **COMMON)
    other = gf.score_dataset(
        model_fn, P, [POOL[i] for i in order], val=target(), ids=[names[i] for i in order], **COMMON
    )
    where = {name: i for i, name in enumerate(other.ids)}
    moved = other.take([where[name] for name in one.ids])
    torch.testing.assert_close(one["dot_higher_helps"], moved["dot_higher_helps"])
    assert one.top(5).ids == other.top(5).ids


def test_several_targets_and_directions() -> None:
    vals = {"a": target(), "b": padded(0)(TARGET[:2])}
    scores = gf.score_dataset(model_fn, P, POOL, val=vals, quantities=("dot",), **COMMON)
    assert list(scores.columns) == ["dot_higher_helps/a", "dot_higher_helps/b"]
    us = {"a": gf.direction(model_fn, P, target()), "b": gf.direction(model_fn, P, vals["b"])}
    again = gf.score_dataset(model_fn, P, POOL, direction=us, quantities=("dot",), **COMMON)
    for name, x in scores.columns.items():
        assert torch.equal(x, again[name])
    one = gf.score_dataset(model_fn, P, POOL, direction=us["b"], **COMMON)
    assert torch.equal(one["dot_higher_helps"], again["dot_higher_helps/b"])


def test_no_batch_has_more_tokens_than_the_budget() -> None:
    seen = []

    def watched(p: Any, batch: dict[str, Tensor]) -> Tensor:
        seen.append(batch["input_ids"].numel())
        return model_fn(p, batch)

    gf.score_dataset(watched, P, POOL, val=target(), token_budget=24, **COMMON)
    assert max(seen) <= 24


def test_the_budget_is_found_and_told() -> None:
    scores = gf.score_dataset(model_fn, P, POOL, val=target(), **COMMON)
    budget = scores.facts["token_budget"]
    assert budget == find_token_budget(model_fn, P, padded(0)(POOL[:2]), tokens=16)
    assert budget & (budget - 1) == 0
    assert 16 <= budget <= 4096


def test_the_budget_follows_the_memory_and_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(p: Any, batch: dict[str, Tensor]) -> Tensor:
        wide = model_fn(p, batch)[:, None] * torch.ones(1 << 10)
        return wide.sin().mean(1)

    few = padded(0)(POOL[:2])
    tokens = few["input_ids"].numel()
    monkeypatch.setattr(_budget, "_memory_of", lambda _: 1 << 22)
    modest = find_token_budget(model_fn, P, few, tokens=tokens)
    assert find_token_budget(hungry, P, few, tokens=tokens) < modest < 4096
    monkeypatch.setattr(_budget, "_memory_of", lambda _: 1 << 21)
    assert find_token_budget(model_fn, P, few, tokens=tokens) == modest // 2


class Stop(Exception):
    pass


def test_a_stopped_run_goes_on_and_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_score, "PART", 7)
    options: dict[str, Any] = {"quantities": ("dot", "norm", "loss"), "batch_size": 2, **COMMON}
    whole = gf.score_dataset(model_fn, P, POOL, val=target(), **options)
    left = [0]

    def stopping(rows: list[Any]) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return COMMON["collate"](rows)

    u = gf.direction(model_fn, P, target())
    options["collate"] = stopping
    for stop in range(1, 30):
        left[0] = stop % 5 + 3
        try:
            scores = gf.score_dataset(
                model_fn, P, POOL, direction=u, resume=tmp_path, token_budget=4096, **options
            )
            break
        except Stop:
            continue
    assert stop > 2
    for name, x in whole.columns.items():
        assert torch.equal(scores[name], x)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantities": ("loss", "dot")}, "quantities"),
        ({"batch_size": 3}, "batch_size"),
        ({"recipe": {"pool": "other"}}, "pool: None then, 'other' now"),
        ({"params": {**P, "head": P["head"] + 1}}, "params"),
        ({"dataset": POOL[:-1]}, "samples: 40 then, 39 now"),
        ({"dataset": POOL[::-1]}, "computed again"),
    ],
)
def test_another_run_is_not_resumed(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    u = gf.direction(model_fn, P, target())
    options: dict[str, Any] = {"params": P, "dataset": POOL, "direction": u, **COMMON}
    gf.score_dataset(model_fn, resume=tmp_path, **options)
    with pytest.raises(gf.data.ResumeError, match=said):
        gf.score_dataset(model_fn, resume=tmp_path, **{**options, **change})


def test_a_run_goes_on_along_a_direction_with_other_last_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another number of threads makes it; of another direction, one is told."""
    monkeypatch.setattr(_score, "PART", 16)
    u = gf.direction(model_fn, P, target())
    options: dict[str, Any] = {"resume": tmp_path, **COMMON}
    first = gf.score_dataset(model_fn, P, POOL, direction=u, **options)
    (tmp_path / "part-000001.npz").unlink()
    near = {k: x * (1 + 1e-7 * torch.randn_like(x)) for k, x in u.items()}
    again = gf.score_dataset(model_fn, P, POOL, direction=near, **options)
    for name, x in first.columns.items():
        torch.testing.assert_close(again[name], x, rtol=1e-6, atol=1e-6)
        assert torch.equal(again[name][:16], x[:16])  # read from the folder
    of_fewer = gf.direction(model_fn, P, batches(TARGET[:-1], **COMMON))
    for other in (of_fewer, {k: -x for k, x in u.items()}, {"one": u}):
        with pytest.raises(gf.data.ResumeError, match=r"directions: {'': \[.* \.\.\. then"):
            gf.score_dataset(model_fn, P, POOL, direction=other, **options)


def test_samples_that_moved_after_the_first_part_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_score, "PART", 7)
    u = gf.direction(model_fn, P, target())
    gf.score_dataset(model_fn, P, POOL, direction=u, resume=tmp_path, **COMMON)
    moved = [*POOL[:20], *POOL[21:], POOL[20]]
    with pytest.raises(gf.data.ResumeError, match="computed again"):
        gf.score_dataset(model_fn, P, moved, direction=u, resume=tmp_path, **COMMON)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("file", "file/run.json: File exists"),
        ("file/below", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("folder", r"run\.json: it is a folder, and no file"),
        ("deep", r"run\.json is damaged"),
    ],
)
def test_a_folder_that_cannot_be_one(where: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder/run.json").mkdir(parents=True)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/run.json").write_text("[" * 100_000)
    with pytest.raises(gf.data.ResumeError, match=said):
        gf.score_dataset(model_fn, P, POOL, direction=P, resume=tmp_path / where, **COMMON)
    with pytest.raises(gf.OptionError, match="null byte"):
        gf.score_dataset(model_fn, P, POOL, direction=P, resume="a\0b", **COMMON)


def test_a_full_disk_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **columns: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(gf.data.ResumeError, match=r"part-000000\.npz: No space left on device"):
        gf.score_dataset(model_fn, P, POOL, direction=P, resume=tmp_path, **COMMON)
    monkeypatch.undo()
    gf.score_dataset(model_fn, P, POOL, direction=P, resume=tmp_path, **COMMON)


def test_a_part_that_another_run_left_is_not_taken(tmp_path: Path) -> None:
    """As where a folder was removed in part: its description is gone, a part is still there."""
    u = gf.direction(model_fn, P, target())
    other = gf.score_dataset(model_fn, P, POOL, direction=P, resume=tmp_path, **COMMON)
    (tmp_path / "run.json").unlink()
    scores = gf.score_dataset(model_fn, P, POOL, direction=u, resume=tmp_path, **COMMON)
    expected = gf.score_dataset(model_fn, P, POOL, direction=u, **COMMON)
    assert torch.equal(scores["dot_higher_helps"], expected["dot_higher_helps"])
    assert not torch.equal(scores["dot_higher_helps"], other["dot_higher_helps"])


def test_frozen_parameters_are_part_of_the_run(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)).double()
    net[0].requires_grad_(False)
    f, p = gf.from_module(net, lambda m, x: m(x)[:, 0].sin())
    data = list(torch.randn(5, 3, dtype=torch.float64))
    u = gf.direction(f, p, torch.stack(data))
    gf.score_dataset(f, p, data, direction=u, resume=tmp_path)
    net[0].weight.data += 1
    with pytest.raises(gf.data.ResumeError, match="frozen"):
        gf.score_dataset(f, p, data, direction=u, resume=tmp_path)


@pytest.mark.parametrize("damage", [b"", b"PK no zip", None])
def test_a_damaged_part_is_named(tmp_path: Path, damage: bytes | None) -> None:
    u = gf.direction(model_fn, P, target())
    gf.score_dataset(model_fn, P, POOL, direction=u, resume=tmp_path, **COMMON)
    part = tmp_path / "part-000000.npz"
    if damage is None:
        content = bytearray(part.read_bytes())
        content[len(content) // 4] ^= 255
        damage = bytes(content)
    part.write_bytes(damage)
    with pytest.raises(gf.data.ResumeError, match=r"part-000000\.npz is damaged"):
        gf.score_dataset(model_fn, P, POOL, direction=u, resume=tmp_path, **COMMON)
    part.unlink()
    gf.score_dataset(model_fn, P, POOL, direction=u, resume=tmp_path, **COMMON)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"quantities": "dot"}, gf.OptionError, "in a tuple"),
        ({"quantities": ("dots",)}, gf.OptionError, "'cosine'"),
        ({"quantities": ()}, gf.OptionError, "one or more"),
        ({"token_budget": 0}, gf.OptionError, "token_budget=0"),
        ({"batch_size": True}, gf.OptionError, "batch_size=True"),
        ({"ids": [1]}, gf.OptionError, "1 ids for 40"),
        ({"direction": None}, gf.OptionError, "neither was given"),
        ({"direction": {"head": P["head"]}}, gf.ParamsError, "direction"),
        ({"dataset": []}, gf.BatchError, "is empty"),
        ({"randomness": "maybe"}, gf.OptionError, "randomness"),
        (
            {"dataset": [*POOL[:3], {"input_ids": [1], "labels": [1]}]},
            gf.NonFiniteLossError,
            r"samples \[.*3.*\]",
        ),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], said: str) -> None:
    given: dict[str, Any] = {"dataset": POOL, "direction": P, **COMMON, **options}
    with pytest.raises(error, match=said):
        gf.score_dataset(model_fn, P, given.pop("dataset"), **given)


def test_progress_says_tokens_per_second(capsys: pytest.CaptureFixture[str]) -> None:
    gf.score_dataset(model_fn, P, POOL, direction=P, progress=True, **COMMON)
    said = capsys.readouterr().err
    assert "tokens/s" in said
    assert "40/40" in said


def test_progress_says_what_is_under_way(capsys: pytest.CaptureFixture[str]) -> None:
    def told(rows: list[Any]) -> Any:
        said.append(capsys.readouterr().err)
        return padded(0)(rows)

    said: list[str] = []
    options: dict[str, Any] = {**COMMON, "collate": told, "token_budget": 64, "progress": True}
    gf.score_dataset(model_fn, P, POOL, direction=P, **options)
    assert "0/40 samples" in said[0]
    assert "now 8 of up to 8 tokens, the first of this shape: proved" in said[0]
    rest = "".join(said)
    assert rest.count("the first of this shape") < rest.count("now ")
    assert re.search(r"tokens/s, about \d+ s left", rest)


def test_five_hundred_chats_need_few_proofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths are rounded up and samples are powers of two: few shapes, each of which is proved."""
    proofs, tokens = [], []
    compare = proof.compare

    def counted(claim: Any, *more: Any) -> Any:
        proofs.append(claim.model.batch["input_ids"].shape)
        return compare(claim, *more)

    def watched(p: Any, batch: dict[str, Tensor]) -> Tensor:
        tokens.append(batch["input_ids"].numel())
        return model_fn(p, batch)

    monkeypatch.setattr(proof, "compare", counted)
    rng = np.random.default_rng(0)
    rows = [rng.integers(VOCABULARY, size=t).tolist() for t in rng.integers(80, 201, size=500)]
    pool = [{"input_ids": row, "labels": row} for row in rows]
    options: dict[str, Any] = {"length": length, "token_budget": 512, "direction": P}
    exact = gf.score_dataset(watched, P, pool, collate=padded(0), **options)
    many, taken = len(proofs), sum(tokens)
    proofs.clear()
    tokens.clear()
    few = gf.score_dataset(
        lambda p, batch: watched(p, batch), P, pool, collate=padded(0, max_length=200), **options
    )
    assert len(proofs) == len(set(proofs)) <= 8 < many
    assert all(t in (96, 128, 160, 192, 200) for _, t in proofs)
    # Everything that the model is called for, proofs included, beside the samples themselves.
    assert sum(tokens) < 1.4 * sum(map(len, rows)) < taken
    torch.testing.assert_close(few["dot_higher_helps"], exact["dot_higher_helps"])


# --- directions over loaders ------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_direction_over_batches_is_that_of_all_samples(reduction: Any) -> None:
    whole = gf.direction(model_fn, P, padded(0)(TARGET), reduction=reduction)
    for val in (target(), iter([padded(0)(TARGET[:1]), padded(0)(TARGET[1:])])):
        u = gf.direction(model_fn, P, val, reduction=reduction)
        for name, x in whole.items():
            torch.testing.assert_close(u[name], x, rtol=1e-10, atol=1e-12)


def test_a_loader_is_an_iterable_of_batches() -> None:
    loader = torch.utils.data.DataLoader(TARGET, batch_size=4, collate_fn=padded(0))  # type: ignore[arg-type]
    u = gf.direction(model_fn, P, loader)
    whole = gf.direction(model_fn, P, padded(0)(TARGET))
    torch.testing.assert_close(u["head"], whole["head"])


def test_half_precision_does_not_overflow() -> None:
    p = {"w": torch.ones(1, dtype=torch.float16)}
    many = iter([torch.full((4, 1), 300.0, dtype=torch.float16)] * 200)
    u = gf.direction(lambda p, x: (x @ p["w"][:, None])[:, 0], p, many)
    assert u["w"].item() == 300


def test_a_used_iterator_says_so() -> None:
    used = target()
    list(used)
    with pytest.raises(gf.BatchError, match="yields no batches"):
        gf.direction(model_fn, P, used)


def test_lists_are_still_trees() -> None:
    x, y = torch.randn(2, 5, 3, dtype=torch.float64)
    p = {"w": torch.ones(3, dtype=torch.float64)}
    u = gf.direction(lambda p, b: (b[0] * b[1] * p["w"]).sum(1), p, [x, y])
    torch.testing.assert_close(u["w"], (x * y).mean(0))


# --- batches ----------------------------------------------------------------------------------


def test_padding() -> None:
    batch = padded(9)(
        [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([], "no samples"),
        ([{"input_ids": [1]}, {"input_ids": [1], "labels": [1]}], "same keys"),
        ([{"input_ids": [1], "labels": [1, 2]}], "one length"),
        ([{"input_ids": []}], "above zero"),
        ([{"labels": [1]}], "input_ids among them"),
    ],
)
def test_samples_that_cannot_be_padded(samples: Any, said: str) -> None:
    with pytest.raises(gf.BatchError, match=said):
        padded(0)(samples)


def test_widths_are_few_and_near() -> None:
    for longest in range(1, 5000):
        found = width(longest)
        assert longest <= found < 2 * longest or longest == found == 1
        assert longest < 128 or found <= 1.25 * longest
        assert width(found) == found  # on its own grid
    assert len(set(map(width, range(1, 2049)))) == 25


def test_padding_to_few_widths() -> None:
    samples = [{"input_ids": [1] * t, "labels": [1] * t} for t in (97, 5)]
    assert padded(0, max_length=2048)(samples)["labels"].shape == (2, 128)
    assert padded(0, max_length=100)(samples)["labels"].shape == (2, 100)
    with pytest.raises(gf.BatchError, match="a sample has 97 tokens; max_length=96"):
        padded(0, max_length=96)(samples)


def test_batches_hold_every_sample_once() -> None:
    sizes = [(b["input_ids"] >= 0).shape for b in batches(POOL, token_budget=24, **COMMON)]
    assert sum(n for n, _ in sizes) == len(POOL)
    assert all(n * t <= 24 for n, t in sizes)
    assert [t for _, t in sizes] == sorted((t for _, t in sizes), reverse=True)
    with pytest.raises(gf.BatchError, match="empty"):
        next(batches([], **COMMON))
