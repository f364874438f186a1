"""The smallest program that still fails in the same way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fuzz_play import Check, Invalid, play
from fuzz_program import Program, Step

MOST = 150
"""Programs that are tried."""


def shrunk(program: Program, failure: Check) -> tuple[Program, Check]:
    """The program without whatever can be left out of it, and how it fails."""
    tries = 0
    progress = True
    while progress:
        progress = False
        for smaller in _smaller(program):
            tries += 1
            found = _same(smaller, failure)
            if found is not None:
                program, failure, progress = smaller, found, True
                break
            if tries >= MOST:
                return program, failure
    return program, failure


def _same(program: Program, failure: Check) -> Check | None:
    """A failure of the same quantity and status."""
    try:
        checks = play(program, only=[failure.verdict.quantity])
    except Invalid:
        return None
    alike = [
        c
        for c in checks
        if (c.status, c.coupled) == (failure.status, failure.coupled)
        and (c.status == "wrong" or c.verdict.said[:30] == failure.verdict.said[:30])
    ]
    return alike[-1] if alike else None


def _smaller(program: Program) -> Iterator[Program]:
    for i in range(len(program.settings)):
        if len(program.settings) > 1:
            rest = program.settings[:i] + program.settings[i + 1 :]
            yield replace(program, settings=rest)
    for i in range(len(program.penalties)):
        yield replace(program, penalties=program.penalties[:i] + program.penalties[i + 1 :])
    for steps in _fewer(program.steps):
        yield replace(program, steps=steps)
    if program.loss != "all":
        yield replace(program, loss="all")
    for i, setting in enumerate(program.settings):
        plain = replace(setting, alike=False, large=False, threads=False)
        if plain != setting:
            yield replace(
                program, settings=(*program.settings[:i], plain, *program.settings[i + 1 :])
            )


def _fewer(steps: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    """The steps without one, with the body of one in its place, or with a simpler one."""
    for i, step in enumerate(steps):
        before, after = steps[:i], steps[i + 1 :]
        yield (*before, *after)
        if step.body:
            yield (*before, *step.body, *after)
        for body in _fewer(step.body):
            yield (*before, replace(step, body=body), *after)
        chain = step.args.get("chain", ())
        for k in range(len(chain)):
            shorter = {**step.args, "chain": chain[:k] + chain[k + 1 :]}
            yield (*before, replace(step, args=shorter), *after)
        for key, plain in (
            ("vector", "plain"),
            ("slot", 0),
            ("when", ""),
            ("fold", False),
            ("bias", False),
            ("in place", False),
            ("weighed first", False),
            ("weighed", 0),
        ):
            if step.args.get(key, plain) != plain:
                yield (*before, replace(step, args={**step.args, key: plain}), *after)


def kinds(program: Program) -> list[str]:
    """What a program is made of, in a few words."""

    def of(step: Step) -> str:
        chain = "+".join(name for name, _ in step.args.get("chain", ()))
        extra = {
            "reorder": f" by {step.args.get('order')} {step.args.get('when')}",
            "route": f" if {step.args.get('condition')}",
            "layout": f" {step.args.get('axes')}",
            "scale": f" {step.args.get('vector')}",
            "latent": f" {step.args.get('move')}",
            "ambient": f" {step.args.get('what')}",
        }.get(step.kind, "")
        body = f"({', '.join(map(of, step.body))})" if step.body else ""
        return f"{step.kind}{extra}{f' of {chain}' if chain else ''}{body}"

    return [*map(of, program.steps), *(f"penalty {x}" for x in program.penalties)]
