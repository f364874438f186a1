"""Errors of unrolled training runs."""

from __future__ import annotations

from ghostfunc._base.errors import GhostError


class UnrolledError(GhostError, RuntimeError):
    """A training run cannot be replayed, or kept states are those of another run."""
