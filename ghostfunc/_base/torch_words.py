"""What torch says of transforms that it cannot run here, in this package's words: which of the
caller's settings is in the way, and what to do."""

from __future__ import annotations

from ghostfunc._base.errors import GhostError, InPlaceError, RandomnessError, TransformError


def in_our_words(error: RuntimeError) -> GhostError | None:
    """The error that says what torch's means for a call; None of those that are the model's own."""
    said = str(error)
    if isinstance(error, GhostError):
        return None
    if "saved tensor hooks" in said:
        return TransformError(
            "A torch.func transform cannot run under saved-tensor hooks (save_on_cpu, "
            "saved_tensors_hooks, a checkpoint around the call). This call needs one: leave the "
            "hooks for it."
        )
    if "forward AD" in said or "forward mode AD" in said:
        return TransformError(
            "This call is inside forward-mode AD (torch.func.jvp, jacfwd), which torch does not "
            "have for all of it. Attention has it under sdpa_kernel(SDPBackend.MATH); else use "
            f"torch.func.grad. torch said: {said.splitlines()[0]}"
        )
    if "mutate a captured Tensor" in said:
        return InPlaceError(
            "model_fn writes in place to a tensor that it is given or closes over, inside a "
            f"torch.func transform. Work on a copy. torch said: {said.splitlines()[0]}"
        )
    if "randomness error mode" in said:
        return RandomnessError(
            "model_fn draws random numbers (dropout in training mode?) inside torch.vmap, which "
            'allows none. Call module.eval(), or pass randomness="different" to ghostfunc and '
            'randomness="same" to torch.vmap.'
        )
    return None
