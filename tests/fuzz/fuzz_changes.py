"""How the steps are written whose faults show on later batches alone.

A latent step moves rows from sample to sample and weighs the result by `f` of the batch, which is
zero in a setting that is not `later`. An ambient step has a value that the model closes over: it
lies in `box`, and the text's function `turn(later)` sets it before every setting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fuzz_program import Step
from fuzz_source import Writer, writes

_BACKWARDS = "torch.arange(n - 1, -1, -1)"
MOVED: dict[str, tuple[str, ...]] = {
    "flip": ("h.flip({k})", "torch.flip(h, ({k},))"),
    "roll": ("h.roll(1, {k})", "torch.roll(h, -1, {k})"),
    "join": (
        "torch.cat([h.narrow({k}, 1, n - 1), h.narrow({k}, 0, 1)], {k})",
        "torch.cat(h.chunk(2, {k})[::-1], {k})",
        "torch.stack(h.unbind({k})[::-1], {k})",
    ),
    "index": (
        f"h.index_select({{k}}, {_BACKWARDS})",
        "h.index_select({k}, (torch.arange(n) + 1) % n)",
        f"h.movedim({{k}}, 0)[{_BACKWARDS}].movedim(0, {{k}})",
    ),
    "order of the batch": (
        "h.index_select({k}, order % n)",
        "h.movedim({k}, 0)[order % n].movedim(0, {k})",
        "h.gather({k}, (order % n).view({rows}).expand_as(h))",
    ),
    "gather": (
        f"h.gather({{k}}, {_BACKWARDS}.view({{rows}}).expand_as(h))",
        f"torch.take_along_dim(h, {_BACKWARDS}.view({{rows}}), {{k}})",
    ),
    "scatter": (
        f"torch.zeros_like(h).scatter({{k}}, {_BACKWARDS}.view({{rows}}).expand_as(h), h)",
        f"torch.zeros_like(h).index_add({{k}}, {_BACKWARDS}, h)",
    ),
    "matrix": ("torch.einsum('nm,{sum}->{axes}', torch.eye(n, dtype=h.dtype).flip(0), h)",),
    "sort": ("h.sort({k})[0]", "h.cumsum({k})"),
}  # fmt: skip

_WEIGHED = (
    "h + f * moved",
    "torch.where(f > 0, moved, h)",
    "torch.lerp(h, moved, f)",
    "(1 - f) * h + f * moved",
    "torch.addcmul(h, f, moved)",
    "h + (moved * f).tanh()",
    "torch.where(f > 0.6, h, moved) * (f > 0) + h",
    "h + moved.masked_fill(f == 0, 0)",
    "h + moved.sin() * f.square()",
)
_ROWS = {"n t d": "n, 1, 1", "t n d": "1, n, 1"}
_SUMMED = {"n t d": "mtd", "t n d": "tmd"}


def _samples_on_an_axis(to: Writer, step: Step) -> bool:
    """Bring `h` to axes of which one holds the samples; False where that cannot be."""
    if to.axes not in _ROWS:
        to.to("n t d", step.args["spelling"])
    return to.axes in _ROWS


def _filled(to: Writer, text: str, **more: str) -> str:
    axes = {
        "k": str(int(to.axes == "t n d")),
        "rows": _ROWS[to.axes],
        "sum": _SUMMED[to.axes],
        "axes": to.axes.replace(" ", ""),
    }
    return text.format(**axes, **more)


@writes("latent")
def latent(to: Writer, step: Step) -> None:
    """Rows of other samples, weighed by what is zero at first."""
    if not _samples_on_an_axis(to, step):
        return
    spelling = step.args["spelling"]
    to.line(f'f, order = batch["f"].view({_ROWS[to.axes]}), batch["order"]')
    move = _filled(to, to.spelt(MOVED[step.args["move"]], spelling))
    if step.args["weighed first"]:
        to.line("own = h")
        to.h("f * h")
        to.h(move)
        to.h("own + h")
    else:
        to.line(f"moved = {move}")
        to.h(_WEIGHED[step.args["weighed"] % len(_WEIGHED)])


class _Closed(NamedTuple):
    """What is closed over first and later, and the expressions that have it."""

    first: str
    later: str
    expressions: tuple[str, ...]


_CLOSED = {
    "float": _Closed(
        "0.0", "0.5",
        (
            "h + {c} * h.sin()", "torch.lerp(h, h.tanh(), {c})", "F.leaky_relu(h, 1 - {c})",
            "torch.add(h, h.cos(), alpha={c})", "h - {c} * h.mean({k}, keepdim=True)",
            "h + {c} * h.flip({k})", "F.dropout(h, {c}, True)", "h + {c} * {s}",
        ),
    ),
    "factor": _Closed(
        "1.0", "2.0",
        ("h * {c}", "h @ ({w} * {c})", "({c} * h).tanh()", "h / {c}", "h + {s} * {c}"),
    ),
    "int": _Closed(
        "0", "1",
        (
            "h.roll({c}, -1)", "h.roll({c}, {k})", "torch.stack([h, h.tanh()])[{c}]",
            "h @ ({w}, {w}.t())[{c}]", "torch.stack([h, h.flip({k})])[{c}]",
            "torch.stack([h] * (1 + {c})).sum(0)",
        ),
    ),
    "bool": _Closed(
        "False", "True",
        (
            "h.tanh() if {c} else h", "h.detach() if {c} else h", "h.flip({k}) if {c} else h",
            "h - h.mean({k}, keepdim=True) if {c} else h", "h @ {w} if {c} else h @ {w}.t()",
            "h + {s} if {c} else h - {s}", "F.dropout(h, 0.5, {c})",
            "h.sort(-1, descending={c})[0]",
        ),
    ),
    "index": _Closed(
        "torch.arange({d})", "torch.arange({d}).flip(0)",
        (
            "h[..., {c}]", "h.index_select(-1, {c})", "h @ {w}[:, {c}]", "h @ {w}[{c}]",
            "h.gather(-1, {c}.expand_as(h))",
        ),
    ),
    "index of samples": _Closed(
        "torch.arange(64)", "torch.arange(64) ^ 1",
        (
            "h.index_select({k}, {c}[:n] % n)", "h.gather({k}, ({c}[:n] % n).view({rows})"
            ".expand_as(h))", "torch.zeros_like(h).index_add({k}, {c}[:n] % n, h)",
        ),
    ),
    "mask": _Closed(
        "torch.ones({d}, dtype=torch.bool)", "torch.arange({d}) % 2 > 0",
        ("h * {c}", "h.masked_fill(~{c}, 0.5)", "torch.where({c}, h, h.sin())", "h @ ({w} * {c})"),
    ),
    "mask of samples": _Closed(
        "torch.ones(64, dtype=torch.bool)", "torch.arange(64) % 2 > 0",
        (
            "torch.where({c}[:n].view({rows}), h, h.flip({k}))",
            "torch.where({c}[:n].view({rows}), h, h.roll(1, {k}))",
        ),
    ),
    "mixing": _Closed(
        "torch.eye(64).double()", "0.9 * torch.eye(64).double() + 0.1",
        ("torch.einsum('nm,{sum}->{axes}', {c}[:n, :n], h)",),
    ),
}  # fmt: skip


@writes("ambient")
def ambient(to: Writer, step: Step) -> None:
    """What the model closes over is another thing later."""
    what, spelling = step.args["what"], step.args["spelling"]
    if what in _SPECIAL:
        _SPECIAL[what](to, spelling)
        return
    first, later, expressions = _CLOSED[what]
    text = to.spelt(expressions, spelling)
    if any(x in text for x in ("{k}", "{rows}", "{sum}")) and not _samples_on_an_axis(to, step):
        return
    d = to.width
    in_place = step.args["in place"] and first.startswith("torch.")  # numbers are not written to
    names = {"c": to.closed(first.format(d=d), later.format(d=d), in_place=in_place)}
    if "{w}" in text:
        names["w"] = to.param(step.args["slot"], d, d)
    if "{s}" in text:
        names["s"] = to.param(step.args["slot"], d)
    to.h(_filled(to, text, **names) if to.axes in _ROWS else text.format(**names))


def _dropout(to: Writer, spelling: int) -> None:
    """A module's flag, or its rate."""
    drop = to.name("box.drop")
    rate, turn = (
        ("0.5", f"{drop}.train(later)"),
        ("0.0", f"{drop}.p = 0.5 if later else 0.0"),
    )[spelling % 2]
    to.made.append(f"{drop} = torch.nn.Dropout({rate})")
    to.turns.append(turn)
    to.h(f"{drop}(h)")


def _no_grad(to: Writer, spelling: int) -> None:
    c = to.closed("False", "True")
    heads = (f"torch.set_grad_enabled(not {c})", f"torch.no_grad() if {c} else torch.enable_grad()")
    with to.indented(f"with {heads[spelling % 2]}:"):
        d = to.width
        bodies = ("h.tanh()", f"h @ {to.param(0, d, d)}", f"h * {to.param(0, d)}")
        to.h(bodies[spelling % 3])


def _default_dtype(to: Writer, spelling: int) -> None:
    dtype = ("torch.bfloat16", "torch.float64")[spelling % 2]
    to.turns.append(f"torch.set_default_dtype({dtype} if later else torch.float32)")
    d = to.width
    values = (f"h * torch.linspace(0.1, 1.3, {d})", f"h + torch.full(({d},), 0.3)")
    to.h((*values, "h * torch.tensor(0.3)")[spelling % 3])


_SPECIAL: dict[str, Callable[[Writer, int], None]] = {
    "dropout": _dropout,
    "no_grad": _no_grad,
    "default dtype": _default_dtype,
}

CHANGED = (*_CLOSED, *_SPECIAL)
