"""Hugging Face models that keep less in memory."""

from __future__ import annotations

import types

from torch import nn

from ghostfunc._errors import OptionError
from ghostfunc._remat import remat


def enable_remat(model: nn.Module) -> None:
    """Compute the activations inside a model's layers again in the backward pass (`gf.remat`).

    The layers are those that transformers itself checkpoints (`GradientCheckpointingLayer`), in
    training and in evaluation mode. Takes the place of `model.gradient_checkpointing_enable()`,
    which is switched off. Only this model is changed: each of its layers gets a `forward` of its
    own, until `disable_remat(model)`. `model_fn`s made of the model before and after see it.

    Args:
        model: a Hugging Face model.

    Raises:
        OptionError: the model has no such layers, or has been enabled already.
    """
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
        layer.gradient_checkpointing = False  # type: ignore[assignment]
        # A method, so that a deep copy of the layer has one of its own.
        layer.forward = types.MethodType(remat(type(layer).forward), layer)


def disable_remat(model: nn.Module) -> None:
    """Undo `enable_remat`.

    Raises:
        OptionError: it has not been enabled.
    """
    layers = _enabled(_layers(model))
    if not layers:
        raise OptionError(f"gf.hf.enable_remat has not been called on this {type(model).__name__}.")
    for layer in layers:
        del layer.forward


def _layers(model: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer  # an optional dependency

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def _enabled(layers: list[nn.Module]) -> list[nn.Module]:
    return [layer for layer in layers if "forward" in vars(layer)]
