"""A command that several processes of torchrun share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ghostfunc._base.torch_private import group_store
from ghostfunc.cli._errors import FAILED, STOPPED, CommandError
from ghostfunc.cli._options import Command, Score
from ghostfunc.cli._say import say

MEETING = timedelta(minutes=5)
"""How long processes wait for each other to begin. torchrun starts all of them at once."""

PATIENCE = timedelta(days=1)
"""How long a process waits for another that still computes. One that died is noticed at once."""

SAID, GRACE = "ghostfunc/said", timedelta(seconds=3)
"""What rank 0 leaves when it has said how the command ended, and how long the others wait for it
before they say so."""


def processes_of_torchrun() -> int:
    """How many processes torchrun started; 1 without it."""
    told = os.environ.get("WORLD_SIZE", "1")
    if not told.isdigit():
        raise CommandError(f"WORLD_SIZE={told!r} in the environment: expected a whole number.")
    return int(told)


def group_of_torchrun() -> Any:
    """The group of all processes that share the command; None if this one is alone."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def refuse_shared(options: Command, size: int) -> None:
    """Raise for a command, or a form of it, that processes do not share."""
    name = f"ghostfunc {type(options).__name__.lower()}"
    way_out = "Start it without torchrun, on one device (--device)."
    if not isinstance(options, Score):
        raise CommandError(
            f"{size} processes of torchrun (WORLD_SIZE) would each run all of `{name}`, and write "
            f"the same files. {way_out} On several, `ghostfunc score` shares its work, and so does "
            "gf.store.project_dataset: docs/distributed.md, 'A corpus'."
        )
    forms = {
        "--score influence": (options.score == "influence", "makes its curvature in one process"),
        "--dry-run": (options.dry_run, "tells what one process would take"),
        "--verify": (bool(options.verify), "is for one process, before a run"),
    }
    for form, (asked, why) in forms.items():
        if asked:
            raise CommandError(
                f"{form} {why}; torchrun started {size} (WORLD_SIZE). {way_out} {size} processes "
                "share `ghostfunc score` with --score dot or cosine."
            )


def shared(run: Callable[[Command], int], options: Command, size: int) -> int:
    """Run a command in all processes of torchrun. Rank 0 speaks for them, and writes."""
    try:
        refuse_shared(options, size)
    except CommandError as error:
        return _said_by_first(int(os.environ.get("RANK", "0")) == 0, error)
    from torch.distributed.rendezvous import rendezvous  # not every build of torch has it

    try:
        store, rank, _ = next(rendezvous("env://", timeout=MEETING))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise CommandError(
            f"{size} processes of torchrun (WORLD_SIZE) found no way to each other: {error}. Start "
            "them by torchrun, or set RANK, MASTER_ADDR and MASTER_PORT as it does.",
            FAILED,
        ) from error
    try:
        with _speaking(rank == 0):
            return run(options)
    except CommandError as error:
        code = _said_by_first(rank == 0 or not _first_has_spoken(), error)
        if rank == 0:
            group_store(dist.group.WORLD).set(SAID, "")
        return code
    except KeyboardInterrupt:
        if rank == 0:
            raise
        return STOPPED
    finally:
        dist.destroy_process_group()


def _said_by_first(speaks: bool, error: CommandError) -> int:
    if speaks:
        say(f"ghostfunc: error: {error}")
    return error.code


def _first_has_spoken() -> bool:
    try:
        group_store(dist.group.WORLD).wait([SAID], GRACE)
    except RuntimeError:  # it did not, or it is gone
        return False
    return True


@contextmanager
def _speaking(speaks: bool) -> Iterator[None]:
    """Have a process print, or not."""
    if speaks:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
