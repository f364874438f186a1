"""Rows of two recipes never lie in one checkpoint, and the error says what differs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import collate, fill, make_data, make_params, make_projection, make_store, model_fn
from torch import Tensor, nn

import ghostfunc as gf
from ghostfunc.store import IncompatibleStoreError, Store, project_dataset

N = 40


def other_loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return model_fn(params, batch).square()


def half_loss(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return model_fn(params, batch) / 2


def as_they_are(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return grads


class Started:
    """A store of which one of five chunks is filled, as by a process that was killed then."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.store = make_store(path, N)
        self.arguments = {"shard": (1, 5), **options}
        assert self.go() == 8

    def go(
        self,
        fn: Callable[..., Tensor] = model_fn,
        data: list[Tensor] | None = None,
        **options: Any,
    ) -> int:
        return project_dataset(
            fn,
            make_params(),
            make_data(N) if data is None else data,
            make_projection(),
            self.store,
            **{
                "checkpoint": "final",
                "collate": collate,
                "length": len,
                "progress": False,
                "batch_size": 3,
                **self.arguments,
                **options,
            },
        )

    def refuses(self, match: str, *args: Any, **options: Any) -> None:
        before = self.store.missing("final")
        with pytest.raises(IncompatibleStoreError, match=match):
            self.go(*args, shard=(0, 1), **options)
        assert self.store.missing("final") == before


def test_another_loss_is_refused_and_named(tmp_path: Path) -> None:
    started = Started(tmp_path / "s")
    started.refuses(r"sample \d+ of checkpoint 'final', computed again.*so the loss", other_loss)
    started.refuses(r"model_fn: helpers\.model_fn .* then, test_recipe\.other_loss", other_loss)
    started.refuses("the row is now 0.5 times the stored one", half_loss)
    assert started.go(shard=(0, 1)) == N - 8
    # Nothing is left to do, and the answer would still be that of another question.
    started.refuses("computed again", other_loss)


def test_a_transform_is_refused_by_name(tmp_path: Path) -> None:
    Started(tmp_path / "s").refuses(
        "the rows were made without a transform, these would be made with a transform",
        transform=as_they_are,
    )
    Started(tmp_path / "t", transform=as_they_are).refuses(
        "the rows were made with a transform, these would be made without", transform=None
    )
    Started(tmp_path / "u", transform=as_they_are).refuses(
        r"computed again.*transform: test_recipe\.as_they_are .* then",
        transform=lambda grads: {name: g.sign() for name, g in grads.items()},
    )


def test_samples_in_another_order_are_refused(tmp_path: Path) -> None:
    started, data = Started(tmp_path / "s"), make_data(N)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).tolist()
    started.refuses("computed again", data=[data[i] for i in order])
    started.refuses("computed again", data=[data[0], *data[:-1]])  # one put in near the start
    turned = [*data[:8], *data[15:7:-1], *data[16:]]
    started.refuses(
        r"is now the one stored for sample \d+, so the samples come in another order",
        data=turned,
        length=None,
    )


def lora(seed: int) -> nn.Module:
    """A frozen base under trainable factors that do not depend on the seed."""
    torch.manual_seed(1)
    trainable = [nn.Linear(8, 2, bias=False), nn.Linear(2, 3, bias=False)]
    torch.manual_seed(seed)
    net = nn.ModuleDict({"base": nn.Linear(8, 3), "norm": nn.BatchNorm1d(8)})
    net.requires_grad_(False)
    net["a"], net["b"] = trainable
    return net.eval()


def lora_loss(net: Any, batch: dict[str, Tensor]) -> Tensor:
    x = net["norm"](batch["x"])
    return F.cross_entropy(net["base"](x) + net["b"](net["a"](x)), batch["y"], reduction="none")


def stack(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([s[key] for s in samples]) for key in samples[0]}


def project_lora(store: Store, net: nn.Module, **options: Any) -> int:
    g = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(8, generator=g), "y": torch.tensor(i % 3)} for i in range(20)]
    fn, params = gf.from_module(net, lora_loss)
    if "final" not in store.checkpoints:
        store.add_checkpoint("final", params)
    return project_dataset(
        fn,
        params,
        data,
        store.projection,
        store,
        **{
            "checkpoint": "final",
            "collate": stack,
            "batch_size": 4,
            "progress": False,
            "shard": (0, 2),
            **options,
        },
    )


def test_another_frozen_base_is_refused_by_the_name_of_what_differs(tmp_path: Path) -> None:
    _, params = gf.from_module(lora(0), lora_loss)
    projection = gf.kronecker_projection(
        params, rank_total=8, rank_min=1, kind="rademacher", seed=0
    )
    store = Store.create(
        tmp_path / "s", projection=projection, n_samples=20, dtype="float32", chunk_rows=4
    )
    net = lora(0)
    assert project_lora(store, net) == 12
    with pytest.raises(
        IncompatibleStoreError, match=r"frozen parameters and buffers: base\.bias, base\.weight\."
    ):
        project_lora(store, lora(5), shard=(1, 2))
    moved = copy.deepcopy(net)
    moved.get_buffer("norm.running_mean").add_(1)
    with pytest.raises(IncompatibleStoreError, match=r"buffers: norm\.running_mean\. "):
        project_lora(store, moved, shard=(1, 2))
    with pytest.raises(IncompatibleStoreError, match="randomness: 'error' then, 'different' now"):
        project_lora(store, net, shard=(1, 2), randomness="different")
    assert project_lora(store, net, shard=(1, 2)) == 8


def test_two_processes_with_different_losses_cannot_both_write(tmp_path: Path) -> None:
    """The other one starts, and finishes a chunk, while this one computes its first."""
    store, begun = make_store(tmp_path / "s", N), []

    def meanwhile(samples: list[Tensor]) -> dict[str, Tensor]:
        if not begun:
            begun.append(True)
            fill(Store.open(tmp_path / "s", writable=True), N, shard=(1, 5))
        return collate(samples)

    with pytest.raises(IncompatibleStoreError, match="computed again"):
        project_dataset(
            other_loss,
            make_params(),
            make_data(N),
            make_projection(),
            store,
            checkpoint="final",
            collate=meanwhile,
            length=len,
            batch_size=3,
            progress=False,
            shard=(0, 5),
        )
    assert store.missing("final") == [range(8), range(16, N)]


def test_two_processes_with_different_recipes_cannot_both_write(tmp_path: Path) -> None:
    """The other one does not see this one's recipe, and puts its own in its place."""
    store, recipe, begun = make_store(tmp_path / "s", N), "checkpoints/final/recipe/zarr.json", []
    other = make_store(tmp_path / "other", N)
    fill(other, N, shard=(1, 5), transform=as_they_are)

    def meanwhile(samples: list[Tensor]) -> dict[str, Tensor]:
        if not begun:
            begun.append(True)
            (tmp_path / "s" / recipe).write_bytes((tmp_path / "other" / recipe).read_bytes())
        return collate(samples)

    with pytest.raises(IncompatibleStoreError, match="made with a transform"):
        fill(store, N, collate=meanwhile, shard=(0, 5))
    assert store.missing("final") == [range(N)]


def test_rows_written_by_hand_are_compared_before_a_recipe_is_put_down(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", N)
    rows = torch.randn(8, store.projection.k)
    store.write(store.chunk(0), rows, "final")
    with pytest.raises(IncompatibleStoreError, match="computed again"):
        fill(store, N)
    assert not (tmp_path / "s/checkpoints/final/recipe").exists()
    with pytest.raises(gf.OptionError, match="tolerance=0 must be a positive number"):
        fill(store, N, tolerance=0)
    assert fill(store, N, tolerance=math.inf) == N - 8  # the user knows better


def test_a_recipe_without_rows_binds_nobody(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", N)

    def stopped(samples: list[Tensor]) -> dict[str, Tensor]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(store, N, transform=as_they_are, collate=stopped)
    assert (tmp_path / "s/checkpoints/final/recipe/zarr.json").exists()
    assert fill(store, N) == N


def test_what_a_killed_process_left_of_a_recipe_is_removed(tmp_path: Path) -> None:
    started = Started(tmp_path / "s")
    recipe = tmp_path / "s/checkpoints/final/recipe"
    (recipe / "zarr.json.0123.partial").write_bytes(b"{")
    started.go(shard=(0, 1))
    assert [p.name for p in recipe.iterdir()] == ["zarr.json"]


def test_random_rows_are_not_compared(tmp_path: Path) -> None:
    """They do not come twice: only what is on record is compared."""

    def noisy(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return model_fn(params, batch) * torch.rand(len(batch["ids"]))

    store = make_store(tmp_path / "s", N)
    arguments: dict[str, Any] = {"checkpoint": "final", "collate": collate, "batch_size": 3}
    for shard, rows in (((0, 5), 8), ((1, 5), 8)):
        assert rows == project_dataset(
            noisy,
            make_params(),
            make_data(N),
            make_projection(),
            store,
            randomness="different",
            shard=shard,
            progress=False,
            **arguments,
        )


def test_bfloat16_rows_come_out_the_same_as_far_as_they_are_stored(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", N, dtype="bfloat16")
    fill(store, N, shard=(0, 5))
    fill(store, N, batch_size=5)  # batches of other samples: other roundings
    assert store.missing("final") == []
