"""Layers that couple samples or draw, in evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ghostfunc._base.errors import OptionError


@contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """A module in evaluation mode, for scores between steps that train it.

        for batch in loader:
            step(module, batch)                       # in training mode: batch statistics
            with gf.evaluating(module):
                scores = gf.ghost_dot_prod(model_fn, params, batch, val)

    Batch normalisation in training mode makes a sample's loss depend on the other samples of its
    batch, so that there is no gradient of one sample; in evaluation mode it normalises with its
    running statistics, sample by sample. Dropout draws nothing. On any exit, exceptions among them,
    every submodule is in the mode that it was in: those that were frozen in evaluation mode stay
    so. Submodules that are added inside keep the mode they are given. Running statistics and random
    numbers are left alone.

    Scores are then those of the model as it predicts, which is not quite the loss that the step
    lowers: `docs/batch_norm.md` has how far the two agree.

    Args:
        module: any module; as a context it gives the module itself.

    Raises:
        OptionError: no module.
    """
    if not isinstance(module, nn.Module):
        raise OptionError(
            f"gf.evaluating got a {type(module).__name__}; expected the nn.Module that model_fn "
            "was made of by gf.from_module."
        )
    flags = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for m, flag in flags:
            m.training = flag
