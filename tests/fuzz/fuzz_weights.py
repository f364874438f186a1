"""Weights that derive from parameters, as lines of Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from fuzz_program import RARE

Shape = tuple[int, ...]


class Lines(Protocol):
    """What weights are written to."""

    rare: bool

    def spelt(self, spellings: Sequence[str], number: int) -> str: ...

    def let(self, name: str, expression: str) -> str:
        """Write `name = expression` under a new name, which is returned."""

    def line(self, text: str) -> None: ...

    def param(self, slot: int, *shape: int) -> str:
        """The expression of a parameter; the same one for the same slot and shape."""


_TRANSPOSES = (
    "{w}.t()", "{w}.mT", "{w}.T", "torch.transpose({w}, 0, 1)", "{w}.swapaxes(0, 1)",
    "torch.transpose(input={w}, dim0=0, dim1=1)", "{w}.permute(1, 0)",
    "torch.einsum('ij->ji', {w})", "{w}.adjoint()",
)  # fmt: skip

_EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "transposed": _TRANSPOSES,
    "scaled": ("{w} * 0.5", "2 * {w}", "{w} / 3", "-{w}", "{w}.mul(0.7)"),
    "squashed": ("{w}.tanh()", "torch.sin({w})", "F.gelu({w})", "{w}.exp() * 0.3"),
    "summed": ("{w} + {q}", "torch.add({w}, {q}, alpha=0.5)", "torch.add(input={w}, other={q})"),
    "product": ("{w} * {q}.cos()", "torch.mul(input={w}, other={q})", "{w}.addcmul({q}, {w})"),
    "joined": ("torch.cat([{w}[:1], {q}[1:]])", "torch.vstack([{w}[:1], {q}[1:]])"),
    "joined by keyword": ("torch.cat(tensors=[{w}[:1], {q}[1:]], dim=0)",),
    "stacked": (
        "torch.stack([{w}, {q}]).sum(0)", "torch.stack([{w}, {q}])[1] + {w}",
        "torch.stack(tensors=[{w}, {q}]).mean(0)",
    ),
    "chunk": (
        "torch.cat([{w}, {q}], 1).chunk(2, 1)[0]", "torch.cat([{w}, {q}]).split({r})[1] + {w}",
    ),
    "indexed": ("{w}[torch.arange({r} - 1, -1, -1)]", "{w}.index_select(0, torch.arange({r}))"),
    "flipped": ("{w}.flip(0)", "torch.flip({w}, (0, 1))"),
    "normalised": ("F.normalize({w}, dim=0)", "F.layer_norm({w}, {w}.shape)"),
    "weight norm": ("{w} / {w}.norm(dim=1, keepdim=True)", "{w} * (1 / {w}.norm())"),
    "low rank": ("{w} + {left} @ {right}", "torch.addmm({w}, {left}, {right})"),
    "cubed": ("{w} + 0.1 * {w} @ {w}.t() @ {w}",),
    "residual": ("{w} + 0.1 * torch.tanh({w})", "torch.lerp({w}, {w}.sin(), 0.2)"),
    "reflected": ("{w} - 0.1 * {w}[:, :1] @ ({w}[:, :1].t() @ {w})",),
    "bits": (
        "{w} + 0.1 * {w}.contiguous().view(torch.float32)[..., 1::2].double()",
        "{w} * (1 - 0.5 * ({w}.contiguous().view(torch.int64) < 0).double())",
        "{w} + 0.1 * {w}.contiguous().view(dtype=torch.float32)[..., 1::2].double()",
    ),
    "detached": ("{w} + {w}.detach()", "{w} * {q}.detach()", "{w} + {w}.data"),
    "where": (
        "torch.where({w} > 0, {w}, {q})",
        "torch.where(condition={w} > 0, input={w}, other={q})",
    ),
    "softmax": ("torch.softmax({w}, 0)", "torch.softmax(input={w}, dim=1)", "{w}.log_softmax(0)"),
    "looked up": ("F.embedding(torch.arange({r}), {w})", "{w}[torch.arange({r}) // 2]"),
    "sparse": (
        "torch.sparse_coo_tensor(torch.ones({r}, {c}).nonzero().t(), {w}.flatten(), ({r}, {c}),"
        " check_invariants=True).to_dense()",
    ),
    "viewed anew": (
        "{w}.t().contiguous().view({r}, {c})", "{w}.t().reshape({r}, {c})",
        "{w}.t().clone(memory_format=torch.contiguous_format).view({r}, {c})",
    ),
    "expanded": ("{w}.expand(2, {r}, {c}).mean(0)", "{w}.repeat(2, 1)[:{r}]"),
    "padded": ("F.pad({w}[:, 1:], (1, 0))", "F.pad({w}[1:], (0, 0, 0, 1))"),
    "sorted": ("{w}.sort(0)[0]", "{w}[:, {w}.sum(0).argsort()]"),
    "cumulated": ("{w}.cumsum(0)", "torch.cumsum(input={w}, dim=1)"),
    "masked": ("{w} * ({w}.abs() > 0.2)", "{w}.masked_fill({w} > 0.5, 0.5)", "{w}.tril()"),
    "rolled": ("{w}.roll(1, 0)", "torch.roll({w}, (1, 1), (0, 1))"),
    "outer": ("{w} * torch.outer({left}[:, 0], {right}[0])",),
    "flat and back": ("{w}.flatten().view({r}, {c})", "torch.flatten(input={w}).view({r}, {c})"),
    "cloned": ("{w}.clone()", "{w}.to(torch.float64)", "{w} + 0"),
    "contiguous": ("{w}.contiguous()", "{w}.contiguous() * 1.5"),
    "einsum": ("torch.einsum('ij,kj->ik', {w}, {w}) @ {w} * 0.1", "torch.einsum('ij->ij', {w})"),
}  # fmt: skip


def weight(to: Lines, slot: int, chain: tuple[tuple[str, int], ...], shape: Shape) -> str:
    """The name of a matrix of this shape, derived from a parameter by a chain of ops."""
    chain = tuple(x for x in chain if to.rare or x[0] not in RARE)
    for name, _ in reversed(chain):
        shape = shape[::-1] if name == "transposed" else shape
    w = to.let("w", to.param(slot, *shape))
    for name, spelling in chain:
        w = _derived(to, name, spelling, w, slot, shape)
        shape = shape[::-1] if name == "transposed" else shape
    return w


def _derived(to: Lines, name: str, spelling: int, w: str, slot: int, shape: Shape) -> str:
    r, c = shape
    if name in _WRITTEN:
        return _WRITTEN[name](to, w, to.param(1 - slot, r, c), r, c)
    text = to.spelt(_EXPRESSIONS[name], spelling)
    values = {"w": w, "r": r, "c": c}
    if "{q}" in text:
        values["q"] = to.param(1 - slot, r, c)
    if "{left}" in text:
        values |= {"left": to.param(slot, r, 2), "right": to.param(slot, 2, c)}
    return to.let("w", text.format(**values))


def _constant_norm(to: Lines, w: str, q: str, r: int, c: int) -> str:
    to.line("with torch.no_grad():")
    to.line(f"    size = {w}.norm()")
    return to.let("w", f"{w} / size")


def _in_place(to: Lines, w: str, q: str, r: int, c: int) -> str:
    v = to.let("w", f"{w} * 1.5")
    to.line(f"{v}.mul_(0.5)")
    to.line(f"{v} += {q}")
    return v


def _written_into(to: Lines, w: str, q: str, r: int, c: int) -> str:
    v = to.let("w", f"{w}.clone()")
    to.line(f"{v}[0] = {q}[-1]")
    return v


def _detached_in_place(to: Lines, w: str, q: str, r: int, c: int) -> str:
    size = to.let("size", f"{w}.norm() * 1.0")
    to.line(f"{size}.detach_()")
    return to.let("w", f"{w} / {size}")


def _rearranged(to: Lines, w: str, q: str, r: int, c: int) -> str:
    if r % 2:
        return w
    text = f"{w}.reshape(2, {r // 2}, {c}).permute(1, 0, 2).contiguous().view({r}, {c})"
    return to.let("w", text)


def _complex(to: Lines, w: str, q: str, r: int, c: int) -> str:
    if r * c % 2:
        return w
    pairs = f"torch.view_as_complex({w}.reshape({r * c // 2}, 2))"
    return to.let("w", f"torch.view_as_real({pairs} * 1j).view({r}, {c})")


_WRITTEN: dict[str, Callable[[Lines, str, str, int, int], str]] = {
    "constant norm": _constant_norm,
    "in place": _in_place,
    "written into": _written_into,
    "detached in place": _detached_in_place,
    "rearranged": _rearranged,
    "complex": _complex,
}


def vector(to: Lines, slot: int, kind: str, size: int) -> str:
    """The name of a vector of this size, or of a number."""
    match kind:
        case "squashed":
            return to.let("s", f"{to.param(slot, size)}.tanh()")
        case "column sums":
            return to.let("s", f"{to.param(slot, 4, size)}.sum(0)")
        case "first row":
            return to.let("s", f"{to.param(slot, 4, size)}[0]")
        case "detached":
            v = to.param(slot, size)
            return to.let("s", f"{v} + {v}.detach()")
        case "scalar":
            return to.let("s", f"{to.param(slot, size)}.mean()")
    return to.param(slot, size)
