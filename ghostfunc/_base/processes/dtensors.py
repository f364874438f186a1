"""Distributed tensors: what they are called in errors. `torch.distributed` is not loaded for them:
where nobody else has loaded it, there are none."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def is_dtensor(x: object) -> bool:
    """Whether `x` is a `DTensor`, of which every rank holds a part or a copy."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(x, loaded.DTensor)


def described(x: Tensor) -> str:
    """Shape, placements and mesh of a `DTensor`, for errors."""
    tensor: Any = x
    placements = ", ".join(map(str, tensor.placements))
    names = tensor.device_mesh.mesh_dim_names
    mesh = " x ".join(map(str, tensor.device_mesh.shape))
    named = f" ({', '.join(names)})" if names else ""
    return f"a DTensor of shape {tuple(x.shape)}, placed [{placements}] on a mesh of {mesh}{named}"


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor; the tensor itself if it is not distributed."""
    tensor: Any = x.detach()
    part: Tensor = tensor.to_local() if is_dtensor(x) else tensor
    return part


def like_parameter(part: Tensor, p: Tensor) -> Tensor:
    """A tensor distributed like `p`, of which `part` is this rank's."""
    if not is_dtensor(p):
        return part
    like: Any = p
    out: Tensor = sys.modules["torch.distributed.tensor"].DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return out
