"""From a command line to an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from ghostfunc._base.errors import BatchError, GhostError, OptionError
from ghostfunc.cli import _config, _options
from ghostfunc.cli._ask import explain, project, query, report, select, verify
from ghostfunc.cli._errors import FAILED, STOPPED, USAGE, CommandError
from ghostfunc.cli._say import say
from ghostfunc.cli._score import score
from ghostfunc.data import ResumeError, RowsError

ABOUT = """Per-sample gradients of your model: which rows of a pool lower the loss of a target.

    ghostfunc score model --pool pool.jsonl --target target.jsonl --top 100 --out sel.jsonl
"""

COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "score": (_options.Score, score),
    "select": (_options.Select, select),
    "report": (_options.Report, report),
    "verify": (_options.Verify, verify),
    "explain": (_options.Explain, explain),
    "project": (_options.Project, project),
    "query": (_options.Query, query),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: instead of those of the process.

    Returns:
        0 if all is well, 1 if it could not be computed, 2 if the command line or the data are not
        right, 3 if ghost and materialized numbers differ, 130 after Ctrl-C.

    Raises:
        SystemExit: `--help`, or options that do not exist (code 2).
    """
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        name, options = _parse(arguments)
        return COMMANDS[name][1](options)
    except CommandError as error:
        return _ended(error, error.code)
    except (RowsError, ResumeError, OptionError, BatchError) as error:
        return _ended(error, USAGE)
    except (GhostError, OSError, MemoryError) as error:
        return _ended(error, FAILED)
    except KeyboardInterrupt:
        say("\nStopped. `score` goes on with --resume, `project` when it is called again.")
        return STOPPED


def _parse(arguments: list[str]) -> tuple[str, Any]:
    arguments, config = _config.split(arguments)
    if config is None:
        subcommands: dict[str, Callable[..., Any]] = {
            name: cls for name, (cls, _) in COMMANDS.items()
        }
        options = tyro.extras.subcommand_cli_from_dict(
            subcommands, prog="ghostfunc", description=ABOUT, args=arguments
        )
        return next(name for name, (cls, _) in COMMANDS.items() if type(options) is cls), options
    if not arguments or arguments[0] not in COMMANDS:
        raise CommandError(f"--config goes after a command: {', '.join(COMMANDS)}.")
    name = arguments[0]
    cls = COMMANDS[name][0]
    default = _config.read(cls, config)
    return name, tyro.cli(
        cls, prog=f"ghostfunc {name}", default=default, args=arguments[1:], description=ABOUT
    )


def _ended(error: BaseException, code: int) -> int:
    say(f"ghostfunc: error: {str(error) or type(error).__name__}")
    return code
