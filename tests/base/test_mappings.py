"""Mappings that are no dicts are batches: `model_fn` gets what the caller gave."""

from __future__ import annotations

from collections import ChainMap, OrderedDict, UserDict
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

import ghostfunc as gf

P = {"w": torch.randn(4, 3, dtype=torch.float64)}


class Own(Mapping[str, Tensor]):
    """A mapping that nobody has heard of."""

    def __init__(self, data: Mapping[str, Tensor]) -> None:
        self.data = dict(data)

    def __getitem__(self, key: str) -> Tensor:
        return self.data[key]

    def __iter__(self) -> Iterator[str]:
        return reversed(list(self.data))

    def __len__(self) -> int:
        return len(self.data)


KINDS: list[Any] = [UserDict, BatchEncoding, OrderedDict, MappingProxyType, ChainMap, Own]


def draw(n: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, 6, 4, dtype=torch.float64, generator=generator)
    return {"x": x, "a": y}


def model_fn(p: Any, batch: Mapping[str, Tensor]) -> Tensor:
    return ((batch["x"] + batch["a"].sin()) @ p["w"]).sin().sum((1, 2))


PROJECTION = gf.kronecker_projection(P, rank_total=4, rank_min=2, kind="gaussian", seed=0)
ASKED: dict[str, Any] = {
    "dot_prod": lambda f, t, v: gf.ghost_dot_prod(f, P, t, v),
    "jvp": lambda f, t, v: gf.ghost_dot_prod(f, P, t, v, mode="jvp"),
    "materialized": lambda f, t, v: gf.ghost_dot_prod(f, P, t, v, mode="materialized"),
    "loop": lambda f, t, v: gf.per_sample_grads(f, P, t, vectorize=False)["w"],
    "chunks": lambda f, t, v: gf.ghost_dot_prod(f, P, t, v, chunk_size=2),
    "several": lambda f, t, v: gf.ghost_dot_prod(f, P, t, {"one": v, "two": t})["one"],
    "positions": lambda f, t, v: gf.ghost_dot_prod(f, P, t, v, per_position=True).sum(1),
    "step": lambda f, t, v: gf.ghost_value_and_grad(f, P, t, v).dot_prods,
    "direction": lambda f, t, v: gf.direction(f, P, v)["w"],
    "cosine": lambda f, t, v: gf.ghost_cosine(f, P, t, v),
    "norm": lambda f, t, v: gf.ghost_norm(f, P, t),
    "gram": lambda f, t, v: gf.ghost_gram(f, P, t, v),
    "clipped": lambda f, t, v: gf.ghost_clipped_grad(f, P, t, max_norm=1.0).grads["w"],
    "project": lambda f, t, v: gf.ghost_project(f, P, t, PROJECTION),
    "factored": lambda f, t, v: gf.factored_grads(f, P, t).norms(),
    "vjp": lambda f, t, v: gf.ghost_vjp(f, P, t, gf.SqNorm()).values["w"],
    "explain": lambda f, t, v: torch.tensor(len(str(gf.explain(f, P, t, v)))),
    "verify": lambda f, t, v: torch.tensor(gf.verify(f, P, t, v, check=True).total.ghost),
}


@pytest.mark.parametrize("way", ASKED)
@pytest.mark.parametrize("kind", KINDS)
def test_any_mapping_is_a_batch(kind: Any, way: str) -> None:
    seen = set()

    def watched(p: Any, batch: Mapping[str, Tensor]) -> Tensor:
        seen.add(type(batch))
        return model_fn(p, batch)

    got = ASKED[way](watched, kind(draw(5, 0)), kind(draw(2, 1)))
    assert torch.equal(got, ASKED[way](model_fn, draw(5, 0), draw(2, 1)))
    assert seen == {kind}


def test_kinds_may_differ() -> None:
    want = gf.ghost_dot_prod(model_fn, P, draw(5, 0), draw(2, 1))
    for train, val in [(UserDict, dict), (dict, UserDict), (BatchEncoding, UserDict)]:
        got = gf.ghost_dot_prod(model_fn, P, train(draw(5, 0)), val(draw(2, 1)))
        torch.testing.assert_close(got, want)


def test_mappings_in_a_batch() -> None:
    def nested(p: Any, batch: Any) -> Tensor:
        return model_fn(p, batch[0]["inner"])

    inner = UserDict(draw(5, 0))
    got = gf.ghost_norm(nested, P, (UserDict({"inner": inner}),))
    assert torch.equal(got, gf.ghost_norm(model_fn, P, draw(5, 0)))


def test_leaves_are_named() -> None:
    batch = UserDict({"x": torch.zeros(3, 4), "a": "no tensor"})
    with pytest.raises(gf.BatchError, match=r"batch\['a'\] is a str"):
        gf.ghost_norm(model_fn, P, batch)
