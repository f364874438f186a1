"""The configuration of these scripts: every field is required, and nothing is guessed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from examples import strict_cli

EMBEDDINGS = ["transformer.wte.weight", "transformer.wpe.weight"]


@dataclass(frozen=True)
class Config:
    """What is projected, and how.

    Attributes:
        model_dir: of the language model that `train.py` makes.
        proj_dir: of the store with projected gradients.
        full_dir: of the store with exact gradients.
        proj_layers: glob patterns of the parameters to project.
        include_embeddings: whether to project the embeddings as well.
        proj_kind, proj_rank_total, proj_rank_min, proj_seed: as in `gf.kronecker_projection`.
        proj_dtype: what rows are stored as.
        max_samples: how many training samples; as many of every domain.
        n_queries: how many held-out samples to ask about.
        chunk_bytes: length of a sample.
        batch_size: samples per backward pass.
        data_seed: of the corpus.
        train_steps: of the model.
        plot_ranks: values of `proj_rank_total` to measure.
        plot_seeds: how many projections to average over at each.
    """

    model_dir: Path
    proj_dir: Path
    full_dir: Path
    proj_layers: list[str]
    include_embeddings: bool
    proj_kind: str
    proj_rank_total: int
    proj_rank_min: int
    proj_seed: int
    proj_dtype: str
    max_samples: int
    n_queries: int
    chunk_bytes: int
    batch_size: int
    data_seed: int
    train_steps: int
    plot_ranks: list[int]
    plot_seeds: int

    def layers(self) -> list[str]:
        """The patterns of all parameters that are projected."""
        return self.proj_layers + (EMBEDDINGS if self.include_embeddings else [])


def parse(description: str | None) -> Config:
    """The configuration of the command line."""
    return strict_cli.parse(Config, description)
