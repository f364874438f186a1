"""Questions to a store, against the formulas on matrices in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import make_params, make_store
from torch import Tensor

import ghostfunc as gf
from ghostfunc.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    out = make_store(tmp_path / "s", 50)
    out.write(range(50), rows(out, 50, 0), "final")
    return out


def rows(store: Store, n: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(store.projection.k, store.projection.k, generator=g)
    return torch.randn(n, store.projection.k, generator=g) @ mix


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=2e-4, atol=2e-4 * float(b.abs().max()))


def test_dot_and_cosine(store: Store) -> None:
    q, x = rows(store, 3, 1), rows(store, 50, 0)
    close(store.scores(q), q @ x.mT)
    cosine = torch.nn.functional.cosine_similarity(q[:, None], x[None], dim=2)
    close(store.scores(q, normalize="cosine"), cosine)
    close(store.scores(q, normalize="relative"), q @ x.mT / x.norm(dim=1))


@pytest.mark.parametrize("normalize", ["none", "cosine", "relative"])
def test_topk_is_the_head_of_the_sorted_scores(store: Store, normalize: str) -> None:
    q = rows(store, 3, 1)
    best = store.topk(q, 20, normalize=normalize)
    values, ids = store.scores(q, normalize=normalize).sort(dim=1, descending=True)
    assert torch.equal(best.ids, ids[:, :20])
    assert torch.equal(best.scores, values[:, :20])
    assert store.topk(q, 1000).ids.shape == (3, 50)


def test_by_layer(store: Store) -> None:
    q, x = rows(store, 3, 1), rows(store, 50, 0)
    columns = store.projection.columns(["emb", "w"])
    close(store.scores(q, layers=["emb", "w"]), q[:, columns] @ x[:, columns].mT)
    blocks = store.scores(q, per_block=True)
    assert blocks.shape == (3, 50, len(store.projection.blocks))
    close(blocks.sum(2), q @ x.mT)
    with pytest.raises(gf.OptionError, match="'h' matches no parameter"):
        store.scores(q, layers=["h"])


def test_preconditioned(store: Store) -> None:
    q, x = rows(store, 3, 1).double(), rows(store, 50, 0).double()
    k = store.projection.k
    metric = torch.zeros(k, k, dtype=torch.float64)
    for block in store.projection.blocks:
        c = x[:, block.columns].mT @ x[:, block.columns] / 50
        damped = c + 0.1 * c.diagonal().mean() * torch.eye(len(c))
        metric[block.columns, block.columns] = torch.linalg.inv(damped)
    a = store.preconditioner("final", damping=0.1)
    dots, selves = q @ metric @ x.mT, ((x @ metric) * x).sum(1)
    close(store.scores(q, precondition=a), dots)
    close(store.scores(q, precondition=a, normalize="relative"), dots / selves.sqrt())
    own = ((q @ metric) * q).sum(1, keepdim=True)
    close(store.scores(q, precondition=a, normalize="cosine"), dots / (own * selves).sqrt())
    block = store.projection.blocks[0]
    close(
        store.scores(q, precondition=a, layers=[block.path]),
        q[:, block.columns] @ metric[block.columns, block.columns] @ x[:, block.columns].mT,
    )


def test_checkpoints_are_weighted_by_their_learning_rates(store: Store) -> None:
    store.add_checkpoint("early", make_params(1), lr=2.0)
    store.write(range(50), rows(store, 50, 5), "early")
    q = {"early": rows(store, 3, 7), "final": rows(store, 3, 8)}
    x = {"early": rows(store, 50, 5), "final": rows(store, 50, 0)}
    dots = {c: q[c] @ x[c].mT for c in q}
    close(store.scores(q), dots["early"] + dots["final"])
    close(store.scores(q, weights="lr"), 2 * dots["early"] + 0.5 * dots["final"])
    close(store.scores(q, weights={"early": 3, "final": -1}), 3 * dots["early"] - dots["final"])
    close(store.scores({"early": q["early"]}), dots["early"])
    with pytest.raises(gf.OptionError, match="give the query as a dict"):
        store.scores(q["early"])
    store.add_checkpoint("unknown", make_params(2))
    store.write(range(50), rows(store, 50, 5), "unknown")
    with pytest.raises(gf.OptionError, match=r"\['unknown'\] were added without a learning rate"):
        store.scores({"unknown": q["early"]}, weights="lr")


def test_bad_queries(store: Store) -> None:
    q = rows(store, 3, 1)
    with pytest.raises(gf.OptionError, match="normalize='l2'"):
        store.scores(q, normalize="l2")
    with pytest.raises(gf.OptionError, match=r"expected \[q, "):
        store.scores(q[:, 1:])
    with pytest.raises(gf.OptionError, match="no checkpoint 'x'"):
        store.scores({"x": q})
    with pytest.raises(gf.OptionError, match="k=0"):
        store.topk(q, 0)
    with pytest.raises(gf.OptionError, match="damping=0"):
        store.preconditioner("final", damping=0)
    with pytest.raises(gf.OptionError, match="weights='size'"):
        store.scores(q, weights="size")
