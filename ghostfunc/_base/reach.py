"""Modules that a function can reach: those it is given, closes over, or finds in its file."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn


def modules_in_reach(
    values: Iterable[Any], *, names_of_files: bool, longest: int | None = None
) -> list[nn.Module]:
    """The modules that functions and their arguments hold, each once.

    Args:
        values: functions, modules, and whatever holds them.
        names_of_files: whether modules and functions count that a function knows by a name of the
            file it is written in.
        longest: the most elements of a list or a dict that is searched; longer ones hold data.
            None searches all.
    """
    return list(_walk(values, set(), names_of_files, longest))


def _walk(
    values: Iterable[Any], seen: set[int], names_of_files: bool, longest: int | None
) -> Iterator[nn.Module]:
    for x in values:
        if id(x) in seen:
            continue
        seen.add(id(x))
        within: Iterable[Any] = ()
        match x:
            case nn.Module():
                yield x
            case functools.partial():
                within = (x.func, *x.args, *x.keywords.values())
            case types.MethodType():
                within = (x.__self__, x.__func__)
            case types.FunctionType():
                within = [*_closed_over(x), *(_of_file(x) if names_of_files else ())]
            case list() | tuple() if _searched(x, longest):
                within = x
            case dict() if _searched(x, longest):
                within = x.values()
        yield from _walk(within, seen, names_of_files, longest)


def _searched(x: Collection[Any], longest: int | None) -> bool:
    return longest is None or len(x) <= longest


def _closed_over(fn: types.FunctionType) -> list[Any]:
    found = [*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]
    for cell in fn.__closure__ or ():
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            found.append(cell.cell_contents)
    return found


def _of_file(fn: types.FunctionType) -> Iterator[Any]:
    names = (name for name in fn.__code__.co_names if name in fn.__globals__)
    for x in (fn.__globals__[name] for name in names):
        own = isinstance(x, types.FunctionType) and x.__globals__ is fn.__globals__
        if own or isinstance(x, nn.Module):
            yield x
