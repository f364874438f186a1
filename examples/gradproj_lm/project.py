"""Project every training sample's gradient into a store; run it again to resume."""

from __future__ import annotations

from pathlib import Path

import ghostfunc as gf
from examples.gradproj_lm.config import Config, parse
from examples.gradproj_lm.data import collate, load_model, samples
from ghostfunc.store import Store, project_dataset


def fill(config: Config, path: Path, projection: gf.Projection) -> Store:
    """Complete the store at `path`, made first if it is not there or was not made to the end."""
    model_fn, params = load_model(config)
    train, _ = samples(config)
    if (path / "zarr.json").exists():
        store = Store.open(path, projection=projection, writable=True)
    else:
        store = Store.create(
            path,
            projection=projection,
            n_samples=len(train),
            dtype=config.proj_dtype,
            tokenizer="bytes",
        )
    if "final" not in store.checkpoints:
        store.add_checkpoint("final", params)
    written = project_dataset(
        model_fn,
        params,
        train,
        projection,
        store,
        checkpoint="final",
        collate=collate,
        batch_size=config.batch_size,
    )
    print(f"{written} rows written to {store}")
    return store


def main() -> None:
    config = parse(__doc__)
    _, params = load_model(config)
    projection = gf.kronecker_projection(
        params,
        rank_total=config.proj_rank_total,
        rank_min=config.proj_rank_min,
        kind=config.proj_kind,
        seed=config.proj_seed,
        layers=config.layers(),
    )
    fill(config, config.proj_dir, projection)


if __name__ == "__main__":
    main()
