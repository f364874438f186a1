"""Convolutions of every dimension, with every option, against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, strategies as st
from torch import nn

import ghostfunc as gf
from ghostfunc.testing import Case, check_rule

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def per_axis(draw: Any, dims: int, numbers: Any) -> Any:
    """One number for all axes, or one for each."""
    return draw(st.one_of(numbers, st.tuples(*[numbers] * dims)))


def tuple_of(x: Any, dims: int) -> tuple[int, ...]:
    return x if isinstance(x, tuple) else (x,) * dims


@st.composite
def convolutions(draw: Any) -> tuple[Any, Case]:
    dims = draw(st.sampled_from([1, 1, 2, 2, 3]))
    groups = draw(st.integers(1, 3))
    channels, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel = draw(st.tuples(*[st.integers(1, 3)] * dims))
    dilation = per_axis(draw, dims, st.integers(1, 2))
    padding = draw(st.sampled_from(["valid", "same", None]))
    stride: Any = 1
    if padding != "same":
        stride = per_axis(draw, dims, st.integers(1, 3))
    if padding is None:
        padding = per_axis(draw, dims, st.integers(0, 2))
    spread = tuple_of(dilation, dims)
    least = [d * (k - 1) + 1 for k, d in zip(kernel, spread, strict=True)]
    sizes = tuple(x + draw(st.integers(0, 3)) for x in least)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    params = {"weight": (out, channels // groups, *kernel)}
    if draw(st.booleans()):
        params["bias"] = (out,)
    op = CONV[dims]
    return op, Case(lambda p, x: op(x["x"], **p, **options), params, {"x": (channels, *sizes)})


@given(convolutions())
def test_convolutions(drawn: tuple[Any, Case]) -> None:
    op, case = drawn
    check_rule(op, [case])


@st.composite
def transposed_convolutions(draw: Any) -> tuple[Any, Case]:
    dims = draw(st.sampled_from([1, 1, 2, 2, 3]))
    groups = draw(st.integers(1, 3))
    channels, out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel = draw(st.tuples(*[st.integers(1, 3)] * dims))
    stride = per_axis(draw, dims, st.integers(1, 3))
    dilation = per_axis(draw, dims, st.integers(1, 3))
    padding = per_axis(draw, dims, st.integers(0, 2))
    most = [
        max(s, d) - 1 for s, d in zip(tuple_of(stride, dims), tuple_of(dilation, dims), strict=True)
    ]
    output_padding = tuple(draw(st.integers(0, x)) for x in most)
    sizes = draw(st.tuples(*[st.integers(1, 4)] * dims))
    options = {
        "stride": stride,
        "padding": padding,
        "output_padding": output_padding,
        "groups": groups,
        "dilation": dilation,
    }
    params = {"weight": (channels, out // groups, *kernel)}
    if draw(st.booleans()):
        params["bias"] = (out,)
    op = TRANSPOSED[dims]
    case = Case(lambda p, x: op(x["x"], **p, **options), params, {"x": (channels, *sizes)})
    tensors = {"x": torch.ones(1, channels, *sizes, dtype=torch.float64)}
    try:
        case.call({k: torch.ones(s, dtype=torch.float64) for k, s in params.items()}, tensors)
    except RuntimeError:  # padding eats everything
        assume(False)
    return op, case


@given(transposed_convolutions())
def test_transposed_convolutions(drawn: tuple[Any, Case]) -> None:
    op, case = drawn
    try:
        check_rule(op, [case])
    except gf.VerificationError as error:
        assume("tests nothing" not in str(error))  # all that the kernel makes is cut off
        raise


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate", "zeros"])
@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("dims", CONV)
def test_padding_modes(dims: int, mode: str, padding: Any) -> None:
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    for first in (3, 2) if padding == "same" else (3,):
        kernel = (first, 3, 1)[:dims]
        padded = padding if padding == "same" else (1, 1, 0)[:dims]
        conv = layer(2, 4, kernel, padding=padded, padding_mode=mode, groups=2).double()

        def call(p: Any, x: Any, conv: nn.Module = conv) -> Any:
            return torch.func.functional_call(conv, p, (x["x"],))

        params = {"weight": (4, 1, *kernel), "bias": (4,)}
        check_rule(CONV[dims], [Case(call, params, {"x": (2, *(4, 5, 2)[:dims])})], samples=(1, 3))


def test_a_batch_of_frames_folded_with_the_samples() -> None:
    def sample_major(p: Any, x: Any) -> Any:
        frames = F.conv1d(x["x"].flatten(0, 1), p["w"], p["b"], padding=1)
        return frames.unflatten(0, x["x"].shape[:2])

    def frame_major(p: Any, x: Any) -> Any:
        frames = x["x"].transpose(0, 1)
        out = F.conv_transpose1d(frames.flatten(0, 1), p["v"], stride=2)
        return out.unflatten(0, frames.shape[:2]).transpose(0, 1)

    check_rule(F.conv1d, [Case(sample_major, {"w": (4, 2, 3), "b": (4,)}, {"x": (3, 2, 5)})])
    check_rule(F.conv_transpose1d, [Case(frame_major, {"v": (2, 4, 3)}, {"x": (3, 2, 5)})])


def test_samples_on_a_spatial_axis() -> None:
    """A kernel of size 1 along the samples treats them one by one, without a batch axis at all."""

    def call(p: Any, x: Any) -> Any:
        image = x["x"].transpose(0, 1)  # [channels, n, t]
        return F.conv2d(image, p["w"], p["b"]).transpose(0, 1)

    check_rule(F.conv2d, [Case(call, {"w": (4, 2, 1, 3), "b": (4,)}, {"x": (2, 5)})])


def test_many_small_and_few_large_products() -> None:
    """A kernel smaller than its factors is summed up at once, a larger one stays factored."""
    shapes = {"depthwise": (6, 1, 3), "groups": (6, 3, 2), "wide groups": (24, 12, 1)}
    for name, shape in shapes.items():
        groups = {"depthwise": 6, "groups": 2, "wide groups": 2}[name]

        def call(p: Any, x: Any, groups: int = groups) -> Any:
            return F.conv1d(x["x"], p["w"], groups=groups)

        check_rule(F.conv1d, [Case(call, {"w": shape}, {"x": (shape[1] * groups, 3)}, name)])


def test_a_kernel_made_of_parameters() -> None:
    """Weight standardisation: the kernel is derived."""

    def call(p: Any, x: Any) -> Any:
        w = p["w"] - p["w"].mean((1, 2), keepdim=True)
        return F.conv1d(x["x"], w / w.std((1, 2), keepdim=True) * p["gain"])

    check_rule(F.conv1d, [Case(call, {"w": (4, 2, 3), "gain": (4, 1, 1)}, {"x": (2, 5)})])


def test_kernels_by_sample_are_refused() -> None:
    def call(p: Any, x: Any) -> Any:
        n = len(x["x"])
        image = p["image"].expand(1, n, -1, -1).reshape(1, -1, p["image"].shape[-1])
        kernels = x["x"].reshape(-1, 1, 3)
        return F.conv1d(image, kernels, groups=kernels.shape[0]).unflatten(1, (n, -1))[0]

    def learned_image(p: Any, x: Any) -> Any:
        return F.conv1d(p["image"], x["x"]).movedim(1, 0)

    check_rule(torch.Tensor.expand, [Case(call, {"image": (1, 2, 5)}, {"x": (2, 3)})])
    with pytest.raises(gf.UnsupportedOpError, match="no factor for 'input'"):
        check_rule(F.conv1d, [Case(learned_image, {"image": (1, 2, 5)}, {"x": (2, 3)})])
