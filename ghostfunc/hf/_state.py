"""The scores of a checkpoint: one file, written whole or not at all, known by its checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ghostfunc._base.errors import OptionError
from ghostfunc._base.regular import open_regular
from ghostfunc._base.whole_files import write_whole

STATE_FILE = "ghost_scores.bin"
MAGIC = b"ghostfunc scores 1 "
HEADER = len(MAGIC) + 64 + 1  # the checksum in hexadecimal, and a line's end


class Saved(NamedTuple):
    """What a checkpoint has of the scores.

    Attributes:
        state: of `gf.shapley`.
        recipe: what they were made by: form, order, score datasets. A resumed run must agree.
        facts: what else is remembered: the step, and since which step samples are scored.
    """

    state: dict[str, Tensor]
    recipe: dict[str, Any]
    facts: dict[str, Any]


def save_state(saved: Saved, path: Path) -> None:
    """Write a state with its checksum, whole or not at all."""
    text = {"recipe": json.dumps(saved.recipe), "facts": json.dumps(saved.facts)}
    payload = safetensors.torch.save(
        {k: x.contiguous() for k, x in saved.state.items()}, metadata=text
    )
    header = MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n"
    write_whole(path, lambda aside: aside.write_bytes(header + payload))


def load_state(path: Path) -> Saved:
    """What `save_state` wrote.

    Raises:
        OptionError: the file is damaged, or none of ours.
    """
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError as error:
        raise _damaged(path, f"it cannot be read ({error})") from error
    payload = content[HEADER:]
    if not content.startswith(MAGIC):
        raise _damaged(path, "it does not begin as such a file does")
    if content[len(MAGIC) : HEADER - 1] != hashlib.sha256(payload).hexdigest().encode():
        raise _damaged(path, "its checksum is not that of its content")
    try:
        state = safetensors.torch.load(payload)
        size = int.from_bytes(payload[:8], "little")
        text = json.loads(payload[8 : 8 + size])["__metadata__"]
        recipe, facts = json.loads(text["recipe"]), json.loads(text["facts"])
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, f"it cannot be read ({error})") from error
    _check(state, path)
    return Saved(state, recipe, facts)


def _check(state: Mapping[str, Tensor], path: Path) -> None:
    shapes = {k: (x.dtype, x.ndim) for k, x in state.items()}
    expected = {
        "ids": (torch.int64, 1),
        "values": (torch.float64, 2),
        "counts": (torch.int64, 1),
    }
    if shapes != expected or len({len(x) for x in state.values()}) != 1:
        raise _damaged(path, f"it holds {shapes}")


def _damaged(path: Path, why: str) -> OptionError:
    return OptionError(
        f"{path} does not hold the scores of a GhostTrainer: {why}. Resume from an older "
        "checkpoint (train(resume_from_checkpoint=True) takes the newest whole one); or delete "
        "this file to go on from the weights beside it, with scores from there on."
    )


def check_recipe(saved: Saved, recipe: Mapping[str, Any], path: Path) -> None:
    """Raise unless a run makes scores as the checkpoint's run did: they are added up.

    Raises:
        OptionError: says what differs.
    """
    then: dict[str, Any] = dict(saved.recipe)
    now = json.loads(json.dumps(recipe))
    differing = []
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) == now.get(key):
            continue
        if key == "score_dataset":
            differing += _differing_sets(then.get(key, {}), now.get(key, {}))
        else:
            differing.append(f"{key} was {then.get(key)!r} and is {now.get(key)!r}")
    if differing:
        raise OptionError(
            f"{path} holds scores made in another way: {'; '.join(differing)}. Values of both "
            "would be added up. Resume with the settings the run was started with; or delete this "
            "file to go on from the weights beside it, with scores from there on."
        )


def _differing_sets(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if then.keys() != now.keys():
        return [f"the score datasets were {sorted(then)} and are {sorted(now)}"]
    return [f"score_dataset {name!r} has other samples" for name in then if then[name] != now[name]]
