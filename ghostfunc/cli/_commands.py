"""From the options of a command to its exit code."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ghostfunc._base.errors import BatchError, GhostError, OptionError
from ghostfunc.cli import _options
from ghostfunc.cli._ask import explain, project, query, report, select, verify
from ghostfunc.cli._errors import FAILED, USAGE, CommandError
from ghostfunc.cli._score import score
from ghostfunc.data import ResumeError, RowsError

FUNCTIONS: dict[type[_options.Command], Callable[[Any], int]] = {
    _options.Score: score,
    _options.Select: select,
    _options.Report: report,
    _options.Verify: verify,
    _options.Explain: explain,
    _options.Project: project,
    _options.Query: query,
}


def refuse_torchrun(size: int) -> None:
    """Raise where several processes would write the same files."""
    if size > 1:
        raise CommandError(
            f"{size} processes of torchrun (WORLD_SIZE) would each run the whole command and write "
            "the same files. Start it by itself, on one device (--device). On several, score "
            "shards of the pool with gf.score_dataset, or project with gf.store.project_dataset, "
            "which ranks share: docs/distributed.md, 'A corpus'."
        )


def run(options: _options.Command) -> int:
    """Run the command that these are the options of.

    Raises:
        CommandError: it cannot be done, or the data are not right.
    """
    refuse_torchrun(int(os.environ.get("WORLD_SIZE", "1")))
    try:
        return FUNCTIONS[type(options)](options)
    except (RowsError, ResumeError, OptionError, BatchError) as error:
        raise CommandError(str(error), USAGE) from error
    except (GhostError, OSError, MemoryError) as error:
        raise CommandError(str(error) or type(error).__name__, FAILED) from error
