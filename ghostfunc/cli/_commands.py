"""From the options of a command to its exit code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ghostfunc._base.errors import BatchError, GhostError, OptionError
from ghostfunc.cli import _options
from ghostfunc.cli._ask import explain, project, query, report, select, verify
from ghostfunc.cli._errors import FAILED, USAGE, CommandError
from ghostfunc.cli._score import score
from ghostfunc.cli._torchrun import processes_of_torchrun, shared
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


def run(options: _options.Command) -> int:
    """Run the command that these are the options of, beside the other processes of torchrun.

    Raises:
        CommandError: it cannot be done, or the data are not right.
    """
    size = processes_of_torchrun()
    return _run(options) if size == 1 else shared(_run, options, size)


def _run(options: _options.Command) -> int:
    try:
        return FUNCTIONS[type(options)](options)
    except (RowsError, ResumeError, OptionError, BatchError) as error:
        raise CommandError(str(error), USAGE) from error
    except (GhostError, OSError, MemoryError) as error:
        raise CommandError(str(error) or type(error).__name__, FAILED) from error
