"""Sizes, names, randomness and errors of projections."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import optree
import pytest
import torch
from hypothesis import given, strategies as st

import ghostfunc as gf
from ghostfunc.projection import _random, adam_scaled, projection_from_spec
from ghostfunc.projection._blocks import ranks

KINDS = ["gaussian", "rademacher", "orthonormal", "sparse", "dense"]
PARAMS = {
    "a": {"weight": torch.zeros(40, 30), "bias": torch.zeros(40)},
    "b": {"weight": torch.zeros(6, 40)},
}


def make(kind: str = "rademacher", seed: int = 0, **options: object) -> gf.Projection:
    settings = {"rank_total": 16, "rank_min": 2, **options}
    return gf.kronecker_projection(PARAMS, kind=kind, seed=seed, **settings)  # type: ignore


@given(
    n_o=st.integers(1, 5000),
    n_i=st.integers(1, 5000),
    rank_min=st.integers(1, 16),
    rank_total=st.integers(256, 4096),
)
def test_ranks(n_o: int, n_i: int, rank_min: int, rank_total: int) -> None:
    k_o, k_i = ranks(n_o, n_i, rank_total, rank_min)
    assert min(rank_min, n_o) <= k_o <= n_o
    assert min(rank_min, n_i) <= k_i <= n_i
    assert k_o * k_i <= rank_total
    if n_o * n_i <= rank_total:
        assert (k_o, k_i) == (n_o, n_i)  # nothing to reduce


def test_ranks_are_the_least_work() -> None:
    assert ranks(768, 768, 256, 4) == (16, 16)
    assert ranks(3072, 768, 256, 4) == (8, 32)
    assert ranks(1, 768, 256, 4) == (1, 256)
    assert ranks(50257, 768, 256, 4) == (4, 64)


def test_columns_and_layers() -> None:
    projection = make()
    names = [b.path for b in projection.blocks]
    assert names == ["a.bias", "a.weight", "b.weight"]
    assert [b.start for b in projection.blocks] == [0, 16, 31]
    assert projection.k == projection.blocks[-1].columns.stop
    assert projection.columns(["a.*"]).tolist() == list(range(31))
    some = make(layers=["*.weight"])
    assert [b.path for b in some.blocks] == ["a.weight", "b.weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_has_one_matrix_whatever_else_is_selected(kind: str) -> None:
    everything, alone = make(kind), make(kind, layers=["b.*"])
    g = torch.randn(3, 6, 40)
    zeros = {"a": {"weight": torch.zeros(3, 40, 30), "bias": torch.zeros(3, 40)}}
    whole = everything.apply({**zeros, "b": {"weight": g}})
    own = alone.apply({"b": {"weight": g}})
    assert torch.equal(whole[:, everything.blocks[-1].columns], own)


def test_no_global_generator_is_touched() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for kind in KINDS:
        make(kind).apply(
            {
                "a": {k: v[None] for k, v in PARAMS["a"].items()},
                "b": {"weight": PARAMS["b"]["weight"][None]},
            }
        )
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_streams_are_pinned() -> None:
    """Matrices of a stored projection must never change: these are theirs for ever."""
    key = _random.stream_key(7, "h.0.weight", "rademacher o")
    assert hex(key) == "0x81460489de1ffc34d9493b0684b975af"
    assert (_random.rademacher(key, 0, 2, 8) > 0).astype(int).tolist() == [
        [0, 0, 0, 1, 0, 0, 1, 1],
        [1, 1, 1, 1, 1, 0, 0, 0],
    ]
    assert np.round(_random.gaussian(key, 0, 1, 3).astype(float), 6).tolist() == [
        [0.043493, -0.45928, 0.466808]
    ]
    assert _random.sparse(key, 0, 1, 8).tolist() == [[0.5, 0.0, -0.5, 0.0, 0.0, 0.5, 0.5, 0.0]]


@pytest.mark.parametrize("make_rows", [_random.rademacher, _random.gaussian, _random.sparse])
@pytest.mark.parametrize("k", [1, 3, 64, 300])
def test_rows_can_be_made_from_anywhere(make_rows: object, k: int) -> None:
    key = _random.stream_key(0, "w", "x")
    whole = make_rows(key, 0, 20, k)
    assert np.array_equal(make_rows(key, 13, 5, k), whole[13:18])


def test_orthonormal_rows_are_orthogonal() -> None:
    p = _random.orthonormal(5, 50, 8).astype(float)
    np.testing.assert_allclose(p.T @ p, np.eye(8) * 50 / 8, atol=1e-5)


def test_sparse_has_four_nonzeros_a_coordinate() -> None:
    p = _random.sparse(5, 0, 100, 10)
    assert ((p != 0).sum(1) == 4).all()
    assert np.allclose((p**2).sum(1), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_specifications_round_trip(kind: str) -> None:
    projection = make(kind, seed=11)
    again = projection_from_spec(projection.spec())
    assert again == projection
    assert again.fingerprint == projection.fingerprint
    assert make(kind, seed=12) != projection


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fourier"}, "kind='fourier' is not an option"),
        ({"layers": ["*.weight", "c.*"]}, "'c.*' matches no parameter. The parameters are: a.bias"),
        ({"layers": "*.weight"}, "is not a list of patterns"),
        ({"layers": []}, "is not a list of patterns"),
        ({"rank_min": 5}, "rank_total must be at least rank_min"),
        ({"rank_min": 0}, "rank_min=0 must be an integer, 1 or more"),
        ({"compress": 0}, "compress=0 must be an integer, 1 or more"),
        ({"kind": "dense", "compress": 4}, "kind='dense' takes none"),
        ({"seed": 1.5}, "seed=1.5 must be an integer"),
    ],
)
def test_what_does_not_exist_is_an_error(options: dict[str, object], message: str) -> None:
    with pytest.raises(gf.OptionError) as error:
        make(**options)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_compressed_is_a_sparse_map_of_the_columns() -> None:
    plain, compressed = make(), make(compress=9)
    assert (compressed.k, compressed.groups) == (9, {"all": slice(0, 9)})
    assert projection_from_spec(compressed.spec()) == compressed != plain
    hashed = np.concatenate(
        [_random.sparse(_random.stream_key(0, b.path, "compress"), 0, b.k, 9) for b in plain.blocks]
    )
    g = torch.Generator().manual_seed(0)
    grads = optree.tree_map(lambda x: torch.randn(3, *x.shape, generator=g).double(), PARAMS)
    want = plain.apply(grads).numpy() @ hashed.astype(float)
    np.testing.assert_allclose(compressed.apply(grads).numpy(), want, rtol=1e-12, atol=1e-12)


def test_compressed_is_unbiased_and_better_at_rank_one() -> None:
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(80, generator=g) for _ in range(3))
    w, v = torch.outer(a, b), torch.outer(a, b + 2 * c)
    few = errors("rademacher", 64, w, v, 200)
    same_size = errors("rademacher", 1600, w, v, 200, compress=64)
    assert abs(same_size.mean()) < 3 * same_size.std(ddof=1) / math.sqrt(len(same_size))
    assert same_size.var() < 0.5 * few.var()


def test_other_params_are_an_error() -> None:
    projection = make()
    with pytest.raises(gf.ParamsError, match=r"'a.bias', which is not there"):
        projection.apply({"a": {"weight": torch.zeros(2, 40, 30)}})
    grads = {
        "a": {"weight": torch.zeros(2, 40, 31), "bias": torch.zeros(2, 40)},
        "b": {"weight": torch.zeros(2, 6, 40)},
    }
    with pytest.raises(gf.ParamsError, match=r"shape \(40, 30\), but it has shape \(40, 31\)"):
        projection.apply(grads)


def test_names_must_differ() -> None:
    params = {"a.b": torch.zeros(2), "a": {"b": torch.zeros(2)}}
    with pytest.raises(gf.ParamsError, match=r"several parameters are called a\.b"):
        gf.kronecker_projection(params, rank_total=4, rank_min=1, kind="dense", seed=0)


# --- statistics over seeds --------------------------------------------------------------------


def errors(
    kind: str,
    rank_total: int,
    g: torch.Tensor,
    h: torch.Tensor,
    seeds: int,
    compress: int | None = None,
) -> np.ndarray:
    """Projected minus exact inner product, relative to the norms, seed by seed."""
    exact, scale = float((g * h).sum()), float(g.norm() * h.norm())
    out = []
    for seed in range(seeds):
        projection = gf.kronecker_projection(
            {"w": g}, rank_total=rank_total, rank_min=1, kind=kind, seed=seed, compress=compress
        )
        a, b = projection.apply({"w": torch.stack([g, h])}).double()
        out.append((float(a @ b) - exact) / scale)
    return np.array(out)


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_unbiased_and_their_variance_falls_as_one_over_k(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (30, 40) if kind == "dense" else (200, 200)  # many directions, or any
    g = torch.randn(shape, generator=generator)
    h = 0.5 * g + torch.randn(shape, generator=generator)
    ks = np.array([16, 64, 256])
    samples = [errors(kind, int(k), g, h, 200) for k in ks]
    for sample in samples:
        assert abs(sample.mean()) < 3 * sample.std(ddof=1) / math.sqrt(len(sample))
    variances = [sample.var(ddof=1) for sample in samples]
    slope = np.polyfit(np.log(ks), np.log(variances), 1)[0]
    assert -1.2 < slope < -0.8
    assert 0.5 < variances[0] * ks[0] < 2.5  # (1 + cos^2) / k for signs and normal numbers


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "orthonormal", "sparse"])
def test_rank_one_gradients_are_unbiased_too(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(50, generator=generator) for _ in range(3))
    g, h = torch.outer(a, b), torch.outer(a, b + c)
    sample = errors(kind, 64, g, h, 300)
    assert abs(sample.mean()) < 3 * sample.std(ddof=1) / math.sqrt(len(sample))


SMALL = {"w": torch.zeros(3, 4), "b": torch.zeros(5)}


@pytest.mark.parametrize("kind", ["gaussian", "dense"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda g: {**g, "b": g["b"][:1]}, "different numbers of samples: {'b': 1, 'w': 2}"),
        (lambda g: {**g, "b": g["b"].long()}, "grads leaf 'b' is of torch.int64"),
        (lambda g: {**g, "w": g["w"] + 0j}, "grads leaf 'w' is of torch.complex64"),
    ],
)
def test_gradients_that_are_none(kind: str, change: Any, said: str) -> None:
    """One sample would be broadcast, and a projection of integers rounded to integers."""
    projection = gf.kronecker_projection(SMALL, rank_total=4, rank_min=1, kind=kind, seed=0)
    grads = change({k: torch.ones(2, *x.shape) for k, x in SMALL.items()})
    with pytest.raises(gf.ParamsError, match=re.escape(said)):
        projection.apply(grads)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "projection format 2 is unknown"),
        ({"format": None}, "projection format None is unknown"),
        ({"blocks": []}, "spec lacks blocks"),
        ({"seed": ...}, "spec lacks seed"),
        (
            {"blocks": [{"path": "x", "shape": [2, 2], "k_o": 3, "k_i": 1}]},
            "'x' is a matrix 2 x 2, which no projection makes 3 x 1 of",
        ),
    ],
)
def test_specifications_that_are_none(change: dict[str, Any], said: str) -> None:
    projection = gf.kronecker_projection(SMALL, rank_total=4, rank_min=1, kind="sparse", seed=0)
    spec = {k: x for k, x in {**projection.spec(), **change}.items() if x is not ...}
    with pytest.raises(gf.OptionError, match=said):
        projection_from_spec(spec)


def test_matrices_by_name() -> None:
    projection = gf.kronecker_projection(SMALL, rank_total=4, rank_min=1, kind="sparse", seed=0)
    with pytest.raises(gf.OptionError, match="path='v' is not an option"):
        projection.matrix("v", "o")  # type: ignore[attr-defined]
    with pytest.raises(gf.OptionError, match="side='x' is not an option"):
        projection.matrix("w", "x")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("state", "grads", "said"),
    [
        ({"w": (3, 4)}, {"w": (2, 3, 4), "b": (2, 5)}, "grads must be a pytree like params"),
        ({"w": (2, 3, 4)}, {"w": (2, 3, 4)}, "grads leaf 'w' must have the shape"),
        ({"w": (1,)}, {"w": (2, 3, 4)}, "grads leaf 'w' must have the shape"),
    ],
)
def test_moments_are_like_params(state: Any, grads: Any, said: str) -> None:
    """What broadcasts would be scaled by moments of other parameters."""
    zeros = {k: torch.zeros(shape) for k, shape in state.items()}
    transform = adam_scaled(zeros, zeros, step=1, betas=(0.9, 0.99), eps=1e-8)
    with pytest.raises(gf.ParamsError, match=said):
        transform({k: torch.ones(shape) for k, shape in grads.items()})
    with pytest.raises(gf.ParamsError, match="exp_avg_sq"):
        adam_scaled(zeros, {"v": zeros["w"]}, step=1, betas=(0.9, 0.99), eps=1e-8)
