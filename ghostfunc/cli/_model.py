"""A folder to a model, a tokenizer and a model function."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ghostfunc._base.types import ModelFn
from ghostfunc.cli._errors import CommandError
from ghostfunc.cli._options import Loading
from ghostfunc.curvature import Likelihood
from ghostfunc.data import padded
from ghostfunc.data._batches import Collate
from ghostfunc.hf import causal_lm, causal_lm_likelihood

LOCAL = {"local_files_only": True, "trust_remote_code": False}
"""A folder is never looked for on the network, and nobody is asked whether its code may run."""

UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    RuntimeError,
    SafetensorError,
    UnpicklingError,
)
"""What transformers raises for folders and files that it cannot read."""


@dataclass(frozen=True)
class Loaded:
    """All that the commands need of a model.

    Attributes:
        max_length: tokens of a sample: what was asked for, or the model's positions if fewer.
        vocabulary: how many tokens the model knows.
        likelihood: how the losses are made of outputs, for curvatures that draw labels.
    """

    folder: Path
    tokenizer: Any
    model_fn: ModelFn
    params: dict[str, Tensor]
    collate: Collate
    max_length: int
    vocabulary: int
    likelihood: Likelihood


def load(folder: Path, options: Loading) -> Loaded:
    """The model of a folder, or of a GGUF file, in evaluation mode.

    Raises:
        CommandError: the folder is not that of a causal language model with a fast tokenizer.
    """
    where = _gguf(folder) if folder.suffix == ".gguf" else _folder(folder)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    device = _device(options.device)
    dtype: torch.dtype = getattr(torch, options.dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        found: Any = AutoModelForCausalLM.from_pretrained(
            **where, dtype=dtype, output_loading_info=True
        )
    except UNREADABLE as error:
        raise CommandError(
            f"{folder}: transformers cannot load a causal language model and its tokenizer from "
            f"it: {_first_line(error)}"
        ) from error
    model, loaded = found
    _refuse_random(folder, model, loaded["missing_keys"])
    model = model.to(device).eval()
    _restrict(model, options.parameters)
    model_fn, params = causal_lm(model)
    pad = next(x for x in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if x is not None)
    config = model.config.to_dict()
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    longest = options.max_length if positions is None else min(options.max_length, positions)
    collate = padded(pad, max_length=longest)
    likelihood = causal_lm_likelihood(model)
    vocabulary = len(model.get_input_embeddings().weight)
    return Loaded(folder, tokenizer, model_fn, params, collate, longest, vocabulary, likelihood)


def _refuse_random(folder: Path, model: nn.Module, missing: Iterable[str]) -> None:
    """Raise where transformers made up what the folder does not have."""
    random = sorted(set(missing) & {name for name, _ in model.named_parameters()})
    if random:
        raise CommandError(
            f"{folder} has no weights for {len(random)} parameters of its model, such as "
            f"{', '.join(random[:3])}: they would be random numbers. Is it the folder of a "
            "causal language model, and whole?"
        )


def _gguf(path: Path) -> dict[str, Any]:
    """What transformers is given for a GGUF file: its quantised weights become numbers of the
    model's dtype."""
    if not path.is_file():
        raise CommandError(f"{path}: there is no such file.")
    if importlib.util.find_spec("gguf") is None:
        raise CommandError(f"{path}: GGUF files are read by a package: pip install gguf.")
    folder = path.parent
    return {"pretrained_model_name_or_path": folder, "gguf_file": path.name, **LOCAL}


def _folder(folder: Path) -> dict[str, Any]:
    """What transformers is given for a folder."""
    if not folder.is_dir():
        raise CommandError(
            f"{folder}: there is no such folder. Give the local folder of a Hugging Face model, as "
            "save_pretrained or `hf download` makes it, or a .gguf file."
        )
    if (folder / "adapter_config.json").exists():
        raise CommandError(
            f"{folder} holds an adapter. Merge it into its model first: "
            "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)."
        )
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: {_first_line(error)}. Expected a model's folder.") from error
    if not isinstance(config, dict):
        raise CommandError(f"{path}: expected a JSON object.")
    return {"pretrained_model_name_or_path": folder, **LOCAL}


def _device(name: str) -> torch.device:
    """The device of that name. Without a number, each process of torchrun has one of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {name}: {_first_line(error)}") from error
    return device


def _restrict(model: nn.Module, pattern: str) -> None:
    """Freeze the parameters whose names do not match."""
    try:
        matching = re.compile(pattern)
    except re.error as error:
        raise CommandError(
            f"--parameters {pattern!r} is no regular expression: {error}."
        ) from error
    names = [name for name, _ in model.named_parameters()]
    if not any(map(matching.search, names)):
        raise CommandError(
            f"--parameters {pattern!r} matches none of {len(names)} parameters, such as "
            f"{', '.join(names[:3])}."
        )
    for name, p in model.named_parameters():
        p.requires_grad_(bool(matching.search(name)))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
