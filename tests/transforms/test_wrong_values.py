"""Every argument of every public function, given what it cannot be: an error of ours that names it.

The table says of which sort an argument is; `WRONG` has what an argument of that sort cannot be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import ghostfunc as gf
from ghostfunc.store import Store, fingerprint, merge_topk, project_dataset

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def loss(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).square().sum(1)


FN, PARAMS = gf.from_module(NET, loss)
X, V = torch.randn(6, 3), torch.randn(3, 3)
U = gf.direction(FN, PARAMS, V)
ZEROS = {name: torch.zeros_like(x) for name, x in PARAMS.items()}
PROJECTION = gf.kronecker_projection(PARAMS, rank_total=4, rank_min=1, kind="gaussian", seed=0)
ROWS = gf.ghost_project(FN, PARAMS, V, PROJECTION)
KEPT = gf.factored_grads(FN, PARAMS, X)
HESSIAN = gf.curvature.hessian(FN, PARAMS, [X])
EKFAC = gf.curvature.ekfac(FN, PARAMS, [X], fisher="empirical")
STATE = gf.shapley.init(1)
SGD = gf.shapley.sgd(lr=0.1)
STEPS = [gf.unrolled.Micro(torch.arange(3), X[:3])]
TRAINING = gf.unrolled.Training(FN, PARAMS, STEPS, optimizer=gf.unrolled.sgd(lr=0.1))
TRAINED = gf.unrolled.train(TRAINING, keep_every=1)
OUTPUTS: Callable[[Any, Any], Tensor] = lambda p, x: torch.func.functional_call(NET, p, (x,))  # noqa: E731


def spoilt(value: float) -> dict[str, Tensor]:
    """A direction with one entry that is not finite."""
    out = {name: x.clone() for name, x in U.items()}
    out["2.weight"][0, 0] = value
    return out


PAIR = torch.ones(2)
WRONG: dict[str, list[Any]] = {
    "model_fn": [NET, "net", None, 3],
    "function": ["name", 3, PAIR],
    "params": [None, 3, "p", {k: x.long() for k, x in PARAMS.items()}, {"w": [1.0]}],
    "own params": [list(PARAMS.values()), {**PARAMS, "head": PAIR}],
    "batch": [None, "x", 3, [1, 2], torch.tensor(1.0), X.numpy(), {}],
    "other batch": ["x", 3, [1, 2], torch.tensor(1.0), X.numpy(), {}],
    "batches": [None, "x", 3, torch.tensor(1.0), []],
    "direction": [
        spoilt(math.nan),
        spoilt(math.inf),
        {k: x.long() for k, x in U.items()},
        "u",
        3,
        NET,
    ],
    "chunk": [2.5, "2", True, 0, -1],
    "count": [2.5, "2", True, 0, -1, None],
    "flag": ["no", 2, 0.5, None, PAIR],
    "vectorize": ["no", 2, 0.5, PAIR],
    "option": ["nonsense", None, 3, ["ghost"], PAIR],
    "dtype": ["float16", 3, torch.int8, [1], PAIR],
    "positive": ["1", None, math.nan, -1.0, 0, True, PAIR],
    "number": ["1", None, math.nan, True, PAIR],
    "scores": ["x", None, 3, [1.0], torch.tensor([1, 2]), torch.tensor([math.nan, 1.0]), X],
    "thing": ["name", 3, [1], PAIR],
    "needed": ["name", None, 3, [1], PAIR],
    "path": [3, [1], PAIR],
    "text": [3, [1], PAIR],
    "rate": ["1", math.nan, True, [1], PAIR],
    "tree": ["name", 3, [1]],
    "text or none": ["1", None, [1], -1.0, math.nan],
    "name": [None, 3, "a/b", "", "x" * 300, "..", [1]],
    "query": [None, "x", 3, torch.randn(2, 3), torch.tensor(1.0)],
}


class Case(NamedTuple):
    """A call that works, and of which sort its arguments are."""

    call: Callable[..., Any]
    good: dict[str, Any]
    sorts: dict[str, str]


HEAD = {"model_fn": "model_fn", "params": "params"}
BASE = {"model_fn": FN, "params": PARAMS}
RUN = {**HEAD, "check": "option", "randomness": "option"}
SCORES = {
    **RUN,
    "train": "batch",
    "val": "batch",
    "mode": "option",
    "reduction": "option",
    "per_param": "flag",
    "vectorize": "vectorize",
    "contract_dtype": "dtype",
    "chunk_size": "chunk",
    "check_finite": "flag",
}
BATCH = {**RUN, "batch": "batch"}

CORE: dict[str, Case] = {
    "ghost_dot_prod": Case(
        gf.ghost_dot_prod,
        {**BASE, "train": X, "val": V},
        {**SCORES, "params": "own params", "normalize": "flag", "per_position": "flag"},
    ),
    "ghost_dot_prod, direction": Case(
        gf.ghost_dot_prod, {**BASE, "train": X, "direction": U}, {"direction": "direction"}
    ),
    "ghost_dot_prod, jvp": Case(
        gf.ghost_dot_prod,
        {**BASE, "train": X, "direction": U, "mode": "jvp"},
        {"direction": "direction"},
    ),
    "ghost_dot_prod, materialized": Case(
        gf.ghost_dot_prod,
        {**BASE, "train": X, "direction": U, "mode": "materialized"},
        {"direction": "direction"},
    ),
    "ghost_value_and_grad": Case(
        gf.ghost_value_and_grad,
        {**BASE, "train": X, "val": V},
        {**SCORES, "normalize": "flag"},
    ),
    "ghost_value_and_grad, direction": Case(
        gf.ghost_value_and_grad, {**BASE, "train": X, "direction": U}, {"direction": "direction"}
    ),
    "ghost_cosine": Case(gf.ghost_cosine, {**BASE, "train": X, "val": V}, SCORES),
    "ghost_cosine, direction": Case(
        gf.ghost_cosine, {**BASE, "train": X, "direction": U}, {"direction": "direction"}
    ),
    "ghost_norm": Case(
        gf.ghost_norm,
        {**BASE, "batch": X},
        {
            **BATCH,
            "per_param": "flag",
            "mode": "option",
            "vectorize": "vectorize",
            "contract_dtype": "dtype",
            "chunk_size": "chunk",
            "check_finite": "flag",
        },
    ),
    "ghost_gram": Case(
        gf.ghost_gram,
        {**BASE, "batch": X, "other": V},
        {
            **BATCH,
            "other": "other batch",
            "per_param": "flag",
            "normalize": "flag",
            "mode": "option",
            "chunk_size": "chunk",
            "vectorize": "vectorize",
        },
    ),
    "ghost_clipped_grad": Case(
        gf.ghost_clipped_grad,
        {**BASE, "batch": X, "max_norm": 1.0},
        {
            **BATCH,
            "max_norm": "text or none",
            "per_layer": "flag",
            "normalize": "flag",
            "weights": "thing",
            "mode": "option",
            "vectorize": "vectorize",
            "chunk_size": "chunk",
            "check_finite": "flag",
        },
    ),
    "ghost_project": Case(
        gf.ghost_project,
        {**BASE, "batch": X, "projection": PROJECTION},
        {
            **BATCH,
            "projection": "needed",
            "mode": "option",
            "vectorize": "vectorize",
            "contract_dtype": "dtype",
            "chunk_size": "chunk",
        },
    ),
    "ghost_vjp": Case(
        gf.ghost_vjp,
        {**BASE, "batch": X, "quantities": gf.SqNorm()},
        {
            **BATCH,
            "quantities": "needed",
            "grads": "flag",
            "contract_dtype": "dtype",
            "chunk_size": "chunk",
        },
    ),
    "Dot": Case(
        lambda direction: gf.ghost_vjp(FN, PARAMS, X, gf.Dot(direction)),
        {"direction": U},
        {"direction": "direction"},
    ),
    "direction": Case(
        gf.direction,
        {**BASE, "val": V},
        {**HEAD, "val": "batch", "reduction": "option", "chunk_size": "chunk",
         "randomness": "option"},
    ),
    "per_sample_grads": Case(
        gf.per_sample_grads,
        {**BASE, "batch": X},
        {**BATCH, "mode": "option", "vectorize": "vectorize"},
    ),
    "factored_grads": Case(gf.factored_grads, {**BASE, "batch": X}, BATCH),
    "FactoredGrads.dot_prods": Case(
        KEPT.dot_prods,
        {"direction": U},
        {"direction": "direction", "per_param": "flag", "normalize": "flag"},
    ),
    "FactoredGrads.norms": Case(KEPT.norms, {}, {"per_param": "flag"}),
    "FactoredGrads.gram": Case(
        KEPT.gram, {}, {"other": "thing", "per_param": "flag", "normalize": "flag"}
    ),
    "FactoredGrads.weighted_sum": Case(
        KEPT.weighted_sum, {"weights": torch.ones(6)}, {"weights": "needed"}
    ),
    "verify": Case(
        gf.verify,
        {**BASE, "train": X, "val": V},
        {
            **HEAD,
            "train": "batch",
            "val": "batch",
            "vectorize": "vectorize",
            "contract_dtype": "dtype",
            "randomness": "option",
            "check": "flag",
        },
    ),
    "explain": Case(
        gf.explain,
        {**BASE, "train": X, "val": V},
        {**HEAD, "train": "batch", "val": "other batch", "quantity": "option", "grads": "flag",
         "randomness": "option"},
    ),
    "from_module": Case(
        gf.from_module, {"module": NET, "loss": loss}, {"module": "needed", "loss": "function"}
    ),
    "accumulate_grads": Case(
        gf.accumulate_grads,
        {"module": NET, "grads": U},
        {"module": "needed", "grads": "params", "weight": "number"},
    ),
    "kronecker_projection": Case(
        gf.kronecker_projection,
        {"params": PARAMS, "rank_total": 4, "rank_min": 1, "kind": "gaussian", "seed": 0},
        {"params": "params", "rank_total": "count", "rank_min": "count", "kind": "option",
         "layers": "thing", "compress": "chunk"},
    ),
    "adam_scaled": Case(
        gf.projection.adam_scaled,
        {"exp_avg": ZEROS, "exp_avg_sq": ZEROS, "step": 1, "betas": (0.9, 0.99), "eps": 1e-8},
        {"exp_avg": "tree", "betas": "needed", "eps": "number"},
    ),
    "projection_from_spec": Case(
        gf.projection.projection_from_spec, {"spec": PROJECTION.spec()}, {"spec": "needed"}
    ),
}  # fmt: skip

WINGS: dict[str, Case] = {
    "select.greats": Case(
        gf.select.greats,
        {"dot_prods": torch.randn(6), "gram": torch.eye(6), "k": 2, "step": 0.1},
        {"dot_prods": "scores", "gram": "needed", "k": "count", "step": "positive"},
    ),
    "select.top_k": Case(
        gf.select.top_k, {"scores": torch.randn(6), "k": 2}, {"scores": "scores", "k": "count"}
    ),
    "select.sample_k": Case(
        gf.select.sample_k,
        {"scores": torch.randn(6), "k": 2},
        {"scores": "scores", "k": "count", "temperature": "positive", "generator": "thing"},
    ),
    "select.softmax_weights": Case(
        gf.select.softmax_weights,
        {"scores": torch.randn(6)},
        {"scores": "scores", "temperature": "positive"},
    ),
    "select.uniform_weights": Case(
        gf.select.uniform_weights,
        {"chosen": torch.tensor([1, 2]), "n": 6},
        {"chosen": "needed", "n": "count"},
    ),
    "select.reducible_loss": Case(
        gf.select.reducible_loss,
        {"losses": torch.randn(6), "irreducible": torch.randn(6)},
        {"losses": "scores", "irreducible": "scores"},
    ),
    "shapley.sgd": Case(
        gf.shapley.sgd,
        {"lr": 0.1},
        {"lr": "number", "momentum": "number", "dampening": "number", "nesterov": "flag",
         "weight_decay": "number", "momentum_buffer": "tree"},
    ),
    "shapley.adamw": Case(
        gf.shapley.adamw,
        {"lr": 0.1, "exp_avg": ZEROS, "exp_avg_sq": ZEROS, "step": 1},
        {"lr": "number", "betas": "needed", "eps": "number", "weight_decay": "number"},
    ),
    "shapley.clipped": Case(
        gf.shapley.clipped,
        {"optimizer": SGD, "max_norm": 1.0},
        {"optimizer": "needed", "max_norm": "positive"},
    ),
    "shapley.step": Case(
        gf.shapley.step,
        {**BASE, "train": X, "val_sets": {"a": V}, "optimizer": SGD},
        {
            **RUN,
            "train": "batch",
            "val_sets": "needed",
            "optimizer": "needed",
            "order": "count",
            "form": "option",
            "loss_scale": "positive",
            "keep_factors": "flag",
            "hvp": "option",
        },
    ),
    "shapley.directions": Case(
        gf.shapley.directions,
        {**BASE, "val_sets": {"a": V}, "optimizer": SGD},
        {**HEAD, "val_sets": "needed", "optimizer": "needed", "order": "count"},
    ),
    "shapley.from_optimizer": Case(
        gf.shapley.from_optimizer,
        {"optimizer": torch.optim.SGD(NET.parameters(), lr=0.1), "module": NET},
        {"optimizer": "needed", "module": "needed"},
    ),
    "shapley.init": Case(gf.shapley.init, {}, {"num_sets": "count"}),
    "shapley.update": Case(
        gf.shapley.update,
        {"state": STATE, "ids": [1, 2], "values": torch.ones(2, 1)},
        {"state": "needed", "values": "tree"},
    ),
    "shapley.merge": Case(
        gf.shapley.merge, {"state": STATE, "other": STATE}, {"state": "needed", "other": "needed"}
    ),
    "shapley.finalize": Case(gf.shapley.finalize, {"state": STATE}, {"state": "needed"}),
    "curvature.hessian": Case(
        gf.curvature.hessian,
        {**BASE, "batches": [X]},
        {**HEAD, "batches": "batches", "hvp": "option", "chunk_size": "chunk"},
    ),
    "curvature.cg": Case(
        gf.curvature.cg,
        {"operator": HESSIAN},
        {"operator": "needed", "preconditioner": "thing", "max_iterations": "count"},
    ),
    "curvature.neumann": Case(
        gf.curvature.neumann,
        {"operator": HESSIAN, "scale": 10.0},
        {"operator": "needed", "scale": "positive", "iterations": "count"},
    ),
    "curvature.lissa": Case(
        gf.curvature.lissa,
        {"operator": HESSIAN, "scale": 10.0, "iterations": 3},
        {"operator": "needed", "scale": "positive", "iterations": "count", "repeats": "count"},
    ),
    "curvature.ekfac": Case(
        gf.curvature.ekfac,
        {**BASE, "batches": [X], "fisher": "empirical"},
        {**HEAD, "batches": "batches", "fisher": "option", "draws": "count", "sharing": "option"},
    ),
    "EKFAC.solve": Case(
        EKFAC.solve,
        {"direction": U, "damping": 0.1},
        {"direction": "direction", "damping": "positive"},
    ),
    "curvature.load": Case(gf.curvature.load, {"path": "absent"}, {"path": "path"}),
    "influence": Case(
        gf.influence,
        {**BASE, "train": X, "queries": V, "curvature": EKFAC, "damping": 0.1},
        {
            **HEAD,
            "train": "batch",
            "queries": "batch",
            "curvature": "thing",
            "damping": "positive",
            "relative": "flag",
            "query_fn": "function",
            "per_param": "flag",
            "per_position": "flag",
            "chunk_size": "chunk",
            "directions_at_once": "count",
            "randomness": "option",
        },
    ),
    "unrolled.sgd": Case(
        gf.unrolled.sgd,
        {"lr": 0.1},
        {"lr": "number", "momentum": "number", "nesterov": "flag", "weight_decay": "number"},
    ),
    "unrolled.adam": Case(
        gf.unrolled.adam, {"lr": 0.1}, {"lr": "number", "betas": "needed", "eps": "number"}
    ),
    "unrolled.clipped": Case(
        gf.unrolled.clipped,
        {"optimizer": gf.unrolled.sgd(lr=0.1), "max_norm": 1.0},
        {"optimizer": "needed", "max_norm": "positive"},
    ),
    "unrolled.Training": Case(
        gf.unrolled.Training,
        {**BASE, "steps": STEPS, "optimizer": gf.unrolled.sgd(lr=0.1)},
        {**HEAD, "steps": "needed", "optimizer": "needed", "weights": "text"},
    ),
    "unrolled.train": Case(
        gf.unrolled.train,
        {"training": TRAINING, "keep_every": 1},
        {"training": "needed", "keep_every": "count", "directory": "path", "progress": "flag"},
    ),
    "unrolled.metagradients": Case(
        gf.unrolled.metagradients,
        {"trained": TRAINED, "val": V},
        {"trained": "needed", "val": "batch", "val_fn": "function", "reduction": "option",
         "hvp": "option", "vectorize": "flag", "checkpoint": "path", "progress": "flag"},
    ),
    "score_dataset": Case(
        gf.score_dataset,
        {**BASE, "dataset": list(X), "val": V, "token_budget": 100},
        {
            **HEAD,
            "val": "other batch",
            "quantities": "needed",
            "collate": "function",
            "length": "function",
            "token_budget": "chunk",
            "batch_size": "chunk",
            "resume": "path",
            "recipe": "thing",
            "progress": "flag",
            "randomness": "option",
        },
    ),
    "score_dataset, direction": Case(
        gf.score_dataset,
        {**BASE, "dataset": list(X), "direction": U, "token_budget": 100},
        {"direction": "direction"},
    ),
    "data.batches": Case(
        lambda **arguments: list(gf.data.batches(**arguments)),
        {"dataset": list(X), "collate": torch.stack},
        {"collate": "function", "length": "function", "token_budget": "count",
         "batch_size": "chunk"},
    ),
    "data.padded": Case(gf.data.padded, {"pad_id": 0}, {"pad_id": "needed", "label_pad": "number"}),
    "data.find_token_budget": Case(
        gf.data.find_token_budget,
        {**BASE, "batch": X, "tokens": 6},
        {**HEAD, "batch": "batch", "tokens": "count"},
    ),
    "store.merge_topk": Case(merge_topk, {"parts": [], "k": 2}, {"parts": "needed", "k": "count"}),
    "store.fingerprint": Case(fingerprint, {"params": PARAMS}, {"params": "params"}),
}  # fmt: skip
WINGS["data.padded"].sorts["pad_id"] = "count of zero"
WRONG["count of zero"] = [2.5, "2", True, -1, None]


def refused(case: Case, argument: str, value: Any) -> None:
    """The call raises an error of ours, whose message has the argument's name."""
    with pytest.raises(gf.GhostError) as caught:
        case.call(**{**case.good, argument: value})
    said = str(caught.value)
    assert argument in said or argument.rstrip("s") in said, f"{value!r}: {said}"


def pairs(cases: dict[str, Case]) -> list[tuple[str, str]]:
    return [(name, argument) for name, case in cases.items() for argument in case.sorts]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong value that is a path is taken for one of this folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("name", "argument"), pairs(CORE))
def test_core(name: str, argument: str) -> None:
    for value in WRONG[CORE[name].sorts[argument]]:
        refused(CORE[name], argument, value)


@pytest.mark.parametrize(("name", "argument"), pairs(WINGS))
def test_wings(name: str, argument: str) -> None:
    for value in WRONG[WINGS[name].sorts[argument]]:
        refused(WINGS[name], argument, value)


@pytest.mark.parametrize("name", [*CORE, *WINGS])
def test_the_call_works_with_what_is_right(name: str, tmp_path: Path) -> None:
    """Or the errors would prove nothing."""
    case = {**CORE, **WINGS}[name]
    if name not in ("curvature.load", "store.merge_topk"):
        case.call(**case.good)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store.create(
        tmp_path / "store", projection=PROJECTION, n_samples=6, dtype="float32", chunk_rows=2
    )
    made.add_checkpoint("a", PARAMS)
    return made


def filled(store: Store) -> dict[str, Any]:
    good = {
        **BASE,
        "dataset": list(X),
        "projection": PROJECTION,
        "store": store,
        "checkpoint": "a",
        "collate": torch.stack,
        "batch_size": 2,
        "progress": False,
    }
    assert project_dataset(**good) == 6
    return good


def test_of_stores(store: Store, tmp_path: Path) -> None:
    good = filled(store)
    create = {"url": tmp_path / "new", "projection": PROJECTION, "n_samples": 6, "dtype": "float32"}
    cases = [
        Case(
            Store.create,
            create,
            {
                "url": "path",
                "projection": "needed",
                "n_samples": "count",
                "dtype": "option",
                "chunk_rows": "chunk",
                "tokenizer": "text",
                "notes": "thing",
                "storage_options": "thing",
            },
        ),
        Case(
            Store.open,
            {"url": tmp_path / "store"},
            {"url": "path", "projection": "thing", "writable": "flag"},
        ),
        Case(store.add_checkpoint, {"name": "b", "params": PARAMS}, {"name": "name", "lr": "rate"}),
        Case(store.append, {"count": 1}, {"count": "count"}),
        Case(
            project_dataset,
            good,
            {
                **HEAD,
                "projection": "needed",
                "store": "needed",
                "checkpoint": "name",
                "collate": "function",
                "length": "function",
                "transform": "function",
                "batch_size": "count",
                "shard": "thing",
                "randomness": "option",
                "progress": "flag",
            },
        ),
        Case(
            store.scores,
            {"query": ROWS},
            {"query": "query", "normalize": "option", "layers": "thing", "precondition": "thing",
             "weights": "thing", "per_block": "flag"},
        ),
        Case(store.topk, {"query": ROWS, "k": 2}, {"query": "query", "k": "count"}),
        Case(
            store.preconditioner,
            {"checkpoint": "a", "damping": 0.1},
            {"checkpoint": "name", "damping": "positive"},
        ),
    ]  # fmt: skip
    for case in cases:
        for argument, sort in case.sorts.items():
            for value in WRONG[sort]:
                refused(case, argument, value)
    assert not (tmp_path / "new").exists()


def test_a_store_where_none_can_be(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    good = {"projection": PROJECTION, "n_samples": 6, "dtype": "float32"}
    for place, why in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "store", "which is a file"),
        (tmp_path / ("x" * 300), "300 bytes"),
    ):
        with pytest.raises(gf.GhostError, match=rf"url=.*{why}"):
            Store.create(place, **good)
        with pytest.raises(gf.GhostError, match=rf"url=.*{why}"):
            Store.open(place)
