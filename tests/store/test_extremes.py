"""Rows and queries of any size: their scores are right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_params, make_store
from torch import Tensor

import ghostfunc as gf
from ghostfunc.store import IncompatibleStoreError, Store, StoreError

N = 20


def random_rows(k: int, seed: int, n: int = N) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def filled(path: Path, rows: Tensor, dtype: str = "float32") -> Store:
    store = make_store(path, len(rows), dtype=dtype)
    store.write(range(len(rows)), rows, "final")
    return store


@pytest.fixture
def k() -> int:
    return gf.kronecker_projection(
        make_params(), rank_total=16, rank_min=2, kind="rademacher", seed=0
    ).k


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1e-33, 1e-25, 1.0, 1e20, 1e37])
def test_cosines_do_not_depend_on_the_size(
    tmp_path: Path, k: int, scale: float, dtype: str
) -> None:
    x, q = random_rows(k, 0), random_rows(k, 1, 3)
    x[4] = 0
    store = filled(tmp_path / "s", x * scale, dtype)
    read = store.read(range(N), "final").double()
    want = torch.nn.functional.cosine_similarity(q.double()[:, None], read[None] / scale, dim=2)
    for size in (1.0, scale):
        got = store.scores(q * size, normalize="cosine")
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)
    relative = want * q.double().norm(dim=1, keepdim=True)
    got = store.scores(q, normalize="relative")
    torch.testing.assert_close(got.double(), relative, rtol=0, atol=1e-5)
    blocks = store.scores(q, normalize="cosine", per_block=True)
    for b, columns in enumerate(store.projection.groups.values()):
        own = read[:, columns][None] / scale
        want = torch.nn.functional.cosine_similarity(q.double()[:, None, columns], own, dim=2)
        torch.testing.assert_close(blocks[:, :, b].double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-5, 1e-7, 1e-9, 1e-30])
def test_rows_that_vanish_in_float16_are_refused(tmp_path: Path, k: int, scale: float) -> None:
    """Zeros would have no similarity with anything, and a resumed run would find other rows."""
    rows = random_rows(k, 0) * scale
    if scale < 1e-6:
        with pytest.raises(StoreError, match="row 0 of 20 is too small for float16"):
            filled(tmp_path / "s", rows, "float16")
    else:
        read = filled(tmp_path / "s", rows, "float16").read(range(N), "final")
        assert float((read - rows).norm() / rows.norm()) < 1e-2
    filled(tmp_path / "wide", rows, "bfloat16")
    with pytest.raises(StoreError, match=r"too small for float32.*Scale the losses"):
        filled(tmp_path / "double", rows.double() * 1e-40, "float32")


def test_rounding_beside_other_rows_may_vanish(tmp_path: Path, k: int) -> None:
    rows = random_rows(k, 0)
    rows[3] *= 1e-9
    rows[5] = 0
    assert not filled(tmp_path / "s", rows, "float16").read([5], "final").any()
    rows[3] *= 1e3
    with pytest.raises(StoreError, match="row 3 of 20"):
        filled(tmp_path / "other", rows, "float16")


def test_scores_that_float32_does_not_hold_are_refused(tmp_path: Path, k: int) -> None:
    rows = random_rows(k, 0)
    rows[7] *= 1e30
    store = filled(tmp_path / "s", rows)
    q = random_rows(k, 1, 2)
    assert store.scores(q).isfinite().all()
    asked: list[Callable[[Tensor], object]] = [
        store.scores,
        lambda x: store.topk(x, 3),
        lambda x: store.scores(x, per_block=True),
    ]
    for ask in asked:
        with pytest.raises(StoreError, match="score of sample 7 is too large for float32"):
            ask(q * 1e15)
    with pytest.raises(gf.OptionError, match="too large for float32, of up to"):
        store.scores(q.double() * 1e45)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", torch.ones(2), None, True])
def test_weights_are_finite_numbers(tmp_path: Path, k: int, weight: Any) -> None:
    store = filled(tmp_path / "s", random_rows(k, 0))
    with pytest.raises(gf.OptionError, match=r"weights\['final'\]=.* must be a finite number"):
        store.scores({"final": random_rows(k, 1, 1)}, weights={"final": weight})


def test_numbers_are_floating_point(tmp_path: Path, k: int) -> None:
    store = filled(tmp_path / "s", random_rows(k, 0))
    for dtype in (torch.complex64, torch.int64, torch.bool):
        with pytest.raises(gf.OptionError, match=f"query.* is of {dtype}"):
            store.scores(torch.ones(1, k, dtype=dtype))
        with pytest.raises(gf.OptionError, match=f"rows are of {dtype}"):
            store.write(range(8), torch.ones(8, k, dtype=dtype), "final")
    with pytest.raises(gf.OptionError, match="rows is a list"):
        store.write([0], [[1.0] * k], "final")  # type: ignore[arg-type]


@pytest.mark.parametrize("damping", [1e-20, 1e-12, 1e80])
def test_dampings_without_digits_are_refused(tmp_path: Path, k: int, damping: float) -> None:
    """Fewer rows than columns: along most directions, damping is all there is."""
    store = filled(tmp_path / "s", random_rows(k, 0)[:1] * random_rows(1, 1))
    with pytest.raises(gf.OptionError, match=r"damping=.*has no digits left in float32"):
        store.preconditioner("final", damping=damping)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["w", "v"])
def test_a_preconditioner_of_another_projection_is_refused(
    tmp_path: Path, k: int, seed: int, name: str
) -> None:
    store = filled(tmp_path / "s", random_rows(k, 0))
    params = {{"w": name}.get(path, path): x for path, x in make_params().items()}
    projection = gf.kronecker_projection(
        params, rank_total=16, rank_min=2, kind="rademacher", seed=seed
    )
    other = Store.create(tmp_path / "o", projection=projection, n_samples=N, dtype="float32")
    other.add_checkpoint("final", params)
    other.write(range(N), random_rows(k, 0), "final")
    metric = other.preconditioner("final", damping=0.1)
    if (seed, name) == (0, "w"):
        store.scores(random_rows(k, 1, 1), precondition=metric)
        return
    with pytest.raises(IncompatibleStoreError, match="rows of another projection"):
        store.scores(random_rows(k, 1, 1), precondition=metric)


def test_an_index_takes_what_topk_takes(tmp_path: Path, k: int) -> None:
    pytest.importorskip("faiss")
    rows = random_rows(k, 0)
    store = filled(tmp_path / "s", rows * 1e-25)
    index, q = store.index("final", factory="Flat"), random_rows(k, 1, 3)
    want = store.topk(q, 5, normalize="cosine")
    for query in (q, q * 1e-30, q * 1e30):
        found = index.topk(query, 5)
        assert torch.equal(found.ids, want.ids)
        torch.testing.assert_close(found.scores, want.scores, rtol=1e-5, atol=1e-6)
    bad: list[tuple[Any, Any, str]] = [
        (q * torch.nan, 5, "query holds numbers that are not finite"),
        (q.double() * 1e300, 5, "query in float32, and in the metric, holds numbers"),
        (q.long(), 5, "query is of torch.int64"),
        (q[0], 5, "query has shape"),
        (q.tolist(), 5, "query is a list"),
        (q, 0, "k=0 must be a whole number"),
        (q, "5", "k='5' must be a whole number"),
    ]
    for query, number, said in bad:
        with pytest.raises(gf.OptionError, match=said):
            index.topk(query, number)
    with pytest.raises(gf.OptionError, match="train_rows='1' must be an integer"):
        store.index("final", factory="Flat", train_rows="1")  # type: ignore[arg-type]
    with pytest.raises(gf.OptionError, match="precondition is a int"):
        store.index("final", factory="Flat", precondition=3)  # type: ignore[arg-type]
