"""Projections: per-sample gradients small enough to keep and to search."""

from ghostfunc.projection._adam import adam_scaled
from ghostfunc.projection._blocks import Block
from ghostfunc.projection._make import (
    full_projection,
    kronecker_projection,
    projection_from_spec,
)
from ghostfunc.projection._projection import OF_TENSORS, Projection, Recipe
from ghostfunc.projection._transform import Project, ghost_project

__all__ = [
    "OF_TENSORS",
    "Block",
    "Project",
    "Projection",
    "Recipe",
    "adam_scaled",
    "full_projection",
    "ghost_project",
    "kronecker_projection",
    "projection_from_spec",
]
