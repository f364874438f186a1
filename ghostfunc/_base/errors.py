"""Every error ghostfunc raises on purpose: what was given, what was expected, what to do."""

from __future__ import annotations


class GhostError(Exception):
    """Base class of all errors of this package."""


class OptionError(GhostError, ValueError):
    """An option has a value that does not exist."""


class ParamsError(GhostError, ValueError):
    """`params` is not a pytree of floating-point tensors, or a direction does not match it."""


class BatchError(GhostError, ValueError):
    """A batch is not a pytree of tensors with one common, non-empty leading sample axis."""


class LossShapeError(GhostError, ValueError):
    """`model_fn` did not return one floating-point loss per sample, shape `[n]`."""


class NonFiniteLossError(GhostError, ArithmeticError):
    """A per-sample loss is NaN or infinite."""


class UnsupportedOpError(GhostError, NotImplementedError):
    """A parameter meets samples in an op that has no ghost rule."""


class UnsupportedAlwaysError(UnsupportedOpError):
    """Such an op that no trace gets past, of whatever samples it is made."""


class UntrackedUseError(GhostError, RuntimeError):
    """The losses depend on a parameter on a path that was not seen."""


class SampleAxisError(GhostError, RuntimeError):
    """It cannot be told which rows of a tensor belong to which sample."""


class PositionAxisError(GhostError, RuntimeError):
    """Shares of positions were asked for where parameters meet samples without positions."""


class CoupledSamplesError(GhostError, RuntimeError):
    """The loss of one sample depends on other samples: per-sample gradients do not exist."""


class RandomnessError(GhostError, RuntimeError):
    """`model_fn` draws random numbers while `randomness="error"`."""


class ControlFlowError(GhostError, RuntimeError):
    """`model_fn` calls other ops than when it was traced."""


class InPlaceError(GhostError, RuntimeError):
    """`model_fn` writes to a parameter or to its batch."""


class TransformError(GhostError, RuntimeError):
    """The requested mode cannot run this model; the message says which can."""


class RankError(GhostError, RuntimeError):
    """Another process of the group failed, does not answer, or was given something else."""


class VerificationError(GhostError, AssertionError):
    """Ghost and materialized numbers differ by more than the tolerance."""


WAYS_OUT = (
    'Ways out: mode="jvp" (any model that has forward-mode AD, no rule needed); '
    'mode="materialized", with vectorize=False if vmap cannot run the model; '
    "or teach ghostfunc the op with gf.register_rule(op)."
)
