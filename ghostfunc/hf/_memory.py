"""Hugging Face models that keep less in memory."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ghostfunc._base.errors import OptionError
from ghostfunc._base.module import check_module
from ghostfunc._taps.remat.remat import remat

_CACHES = {"use_cache": False, "past_key_values": None, "layer_past": None}
"""How layers are handed a cache, and what they get instead."""


def enable_remat(model: nn.Module) -> None:
    """Compute the activations inside a model's layers again in the backward pass (`gf.remat`).

    The layers are those that transformers itself checkpoints (`GradientCheckpointingLayer`), in
    training and in evaluation mode. Takes the place of `model.gradient_checkpointing_enable()`,
    which is switched off. Only this model is changed: each of its layers gets a `forward` of its
    own, which as under transformers' checkpoints uses no cache of keys and values, until
    `disable_remat(model)`. It holds for every `model_fn` of the model, whenever made.

    Args:
        model: a Hugging Face model.

    Raises:
        OptionError: the model has no such layers, or has been enabled already.
    """
    check_module(model)
    layers = _layers(model)
    if not layers:
        raise OptionError(
            f"{type(model).__name__} has no layers that transformers can checkpoint. Wrap its "
            "layers in gf.remat where they are called."
        )
    if _enabled(layers):
        raise OptionError(
            f"gf.hf.enable_remat: {type(model).__name__} has been enabled already; "
            "gf.hf.disable_remat(model) undoes it."
        )
    for layer in layers:
        _enable(layer)


def disable_remat(model: nn.Module) -> None:
    """Undo `enable_remat`.

    Raises:
        OptionError: it has not been enabled.
    """
    check_module(model)
    layers = _enabled(_layers(model))
    if not layers:
        raise OptionError(f"gf.hf.enable_remat has not been called on this {type(model).__name__}.")
    for layer in layers:
        del layer.forward


@contextmanager
def checkpoints_as_remat(model: nn.Module) -> Iterator[None]:
    """The layers that transformers would checkpoint now run under `gf.remat` instead.

    `torch.utils.checkpoint` does not run inside our passes. Afterwards the model is as it was:
    whoever switches its checkpoints on or off in the course of a training is heard at the next
    pass.
    """
    layers = [m for m in _layers(model) if m.gradient_checkpointing and not _enabled([m])]
    for layer in layers:
        _enable(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
            layer.gradient_checkpointing = True  # type: ignore[assignment]


def checkpointed(model: nn.Module) -> int:
    """How many layers transformers would checkpoint now."""
    return sum(bool(m.gradient_checkpointing) for m in _layers(model))


def _enable(layer: nn.Module) -> None:
    layer.gradient_checkpointing = False  # type: ignore[assignment]
    # A method, so that a deep copy of the layer has one of its own.
    layer.forward = types.MethodType(_without_cache(remat(type(layer).forward)), layer)


def _without_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A cache of keys and values would be written to twice: as under transformers' own checkpoints,
    there is none."""

    @functools.wraps(forward)
    def uncached(*args: Any, **kwargs: Any) -> Any:
        for name, nothing in _CACHES.items():
            if name in kwargs:
                kwargs[name] = nothing
        return forward(*args, **kwargs)

    return uncached


def _layers(model: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer  # an optional dependency

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def _enabled(layers: list[nn.Module]) -> list[nn.Module]:
    return [layer for layer in layers if "forward" in vars(layer)]
