"""From a command line to an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import tyro

from ghostfunc.cli import _config, _options
from ghostfunc.cli._errors import STOPPED, CommandError
from ghostfunc.cli._say import say

ABOUT = """Per-sample gradients of your model: which rows of a pool lower the loss of a target.

    ghostfunc score model --pool pool.jsonl --target target.jsonl --top 100 --out sel.jsonl
"""

COMMANDS: dict[str, type[_options.Command]] = {
    "score": _options.Score,
    "select": _options.Select,
    "report": _options.Report,
    "verify": _options.Verify,
    "explain": _options.Explain,
    "project": _options.Project,
    "query": _options.Query,
}
"""Names of commands, and the classes of their options."""


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
    if arguments == ["--version"]:
        print(f"ghostfunc {version('ghostfunc')}")
        return 0
    try:
        options = _parse(arguments)
        from ghostfunc.cli._commands import run  # imports torch: --help is answered before that

        return run(options)
    except CommandError as error:
        say(f"ghostfunc: error: {error}")
        return error.code
    except KeyboardInterrupt:
        say("\nStopped. `score` goes on with --resume, `project` when it is called again.")
        return STOPPED


def _parse(arguments: list[str]) -> _options.Command:
    arguments, config = _config.split(arguments)
    if config is None:
        subcommands: dict[str, Callable[..., Any]] = {**COMMANDS}
        return tyro.extras.subcommand_cli_from_dict(
            subcommands, prog="ghostfunc", description=ABOUT, args=arguments
        )
    if not arguments or arguments[0] not in COMMANDS:
        raise CommandError(f"--config goes after a command: {', '.join(COMMANDS)}.")
    name = arguments[0]
    cls = COMMANDS[name]
    default = _config.read(cls, config)
    return tyro.cli(
        cls, prog=f"ghostfunc {name}", default=default, args=arguments[1:], description=ABOUT
    )
