"""The command line: `ghostfunc score model --pool pool.jsonl --target target.jsonl ...`.

Needs `ghostfunc[cli]`. Every command is a function from options to an exit code.
"""

from ghostfunc.cli._main import main

__all__ = ["main"]
