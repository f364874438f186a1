"""Projections: per-sample gradients small enough to keep and to search."""

from ghostfunc.projection._adam import adam_scaled
from ghostfunc.projection._blocks import Block
from ghostfunc.projection._make import (
    full_projection,
    kronecker_projection,
    projection_from_spec,
)
from ghostfunc.projection._projection import Projection
from ghostfunc.projection._transform import Project, ghost_project

__all__ = [
    "Block",
    "Project",
    "Projection",
    "adam_scaled",
    "full_projection",
    "ghost_project",
    "kronecker_projection",
    "projection_from_spec",
]
