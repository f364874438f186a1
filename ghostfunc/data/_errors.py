"""Errors about interrupted runs."""

from __future__ import annotations

from ghostfunc._errors import GhostError


class ResumeError(GhostError, ValueError):
    """What a run left behind was made by another run, or is damaged."""
