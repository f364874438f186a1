"""Write the exact gradient of every training sample and every query: what projections stand for."""

from __future__ import annotations

import torch

import ghostfunc as gf
from examples.graddotprod_lm import atomic
from examples.gradproj_lm.config import parse
from examples.gradproj_lm.data import collate, load_model, samples
from examples.gradproj_lm.project import fill


def main() -> None:
    config = parse(__doc__)
    model_fn, params = load_model(config)
    projection = gf.projection.full_projection(params)
    fill(config, config.full_dir, projection)
    _, queries = samples(config)
    rows = [
        gf.ghost_project(model_fn, params, collate(queries[i : i + config.batch_size]), projection)
        for i in range(0, len(queries), config.batch_size)
    ]
    path = config.full_dir / "queries.pt"
    atomic.write(path, lambda file: torch.save(torch.cat(rows), file))
    print(f"{len(queries)} queries written to {path}")


if __name__ == "__main__":
    main()
