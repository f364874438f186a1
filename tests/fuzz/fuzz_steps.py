"""How the steps of programs are written: where parameters meet samples."""

from __future__ import annotations

from fuzz_program import Step
from fuzz_source import VOCABULARY, Writer, vector_of, weight_of, writes


@writes("product")
def product(to: Writer, step: Step) -> None:
    d, out = to.width, step.args["out"]
    bias = to.param(0, out) if step.args["bias"] else None
    if step.args["by linear"]:
        w = weight_of(to, step, out, d)
        b = f", {bias}" if bias else ""
        by_keyword = f", bias={bias}" if bias else ""
        to.chosen(step, f"F.linear(h, {w}{b})", f"F.linear(input=h, weight={w}{by_keyword})")
    else:
        w = weight_of(to, step, d, out)
        if bias and to.axes.count(" ") == 1 and step.args["spelling"] % 2:
            to.h(f"torch.addmm({bias}, h, {w})")
        else:
            to.chosen(step, *_products(to, w))
            if bias:
                to.h(f"h + {bias}")
    to.width = out


def _products(to: Writer, w: str) -> list[str]:
    spellings = [
        f"h @ {w}",
        f"torch.matmul(h, {w})",
        f"torch.einsum('...d,dp->...p', h, {w})",
        f"({w}.t() @ h.mT).mT",
        f"torch.tensordot(h, {w}, 1)",
        f"torch.matmul(input=h, other={w})",
    ]
    if to.axes.count(" ") == 1:
        return [*spellings, f"torch.mm(h, {w})", f"torch.mm(input=h, mat2={w})"]
    if to.axes.count(" ") == 2:
        return [*spellings, f"torch.bmm(h, {w}.expand(h.shape[0], -1, -1))"]
    return spellings


@writes("scale")
def scale(to: Writer, step: Step) -> None:
    s = vector_of(to, step)
    if step.args["spelling"] in (3, 7):
        to.h("h + 0.0")
        to.line(f"h *= {s}" if step.args["spelling"] == 3 else f"h.add_({s})")
        return
    to.chosen(
        step,
        f"h * {s}",
        f"torch.mul(input={s}, other=h)",
        f"h + {s}",
        f"h - {s}",
        f"torch.addcmul(h, {s}, h.sin())",
        f"torch.lerp(h, {s}.expand(h.shape[-1]), 0.3)",
        f"torch.maximum(h, {s})",
        f"torch.add(input=h, other={s}, alpha=2)",
        f"torch.where(h > 0, {s}, h)",
        f"torch.where(condition=h > 0, input={s}, other=h)",
        f"h / {s}.exp()",
        f"{s} * h",
    )


@writes("act")
def act(to: Writer, step: Step) -> None:
    to.chosen(
        step,
        "torch.tanh(h)",
        "F.gelu(h)",
        "h.sin()",
        "torch.softmax(h, -1)",
        "torch.softmax(input=h, dim=-1)",
        "F.leaky_relu(h + 0.1, inplace=True)",
        "h.sort(-1)[0]",
        "h.cumsum(-1) * 0.5",
        "F.log_softmax(h, -1)",
        "h.flip(-1)",
        "torch.cat(tensors=[h[..., 1:], h[..., :1]], dim=-1)",
        "torch.topk(input=h, k=h.shape[-1], dim=-1)[0]",
    )


@writes("norm")
def norm(to: Writer, step: Step) -> None:
    s, d = vector_of(to, step), to.width
    s = f"{s}.expand({d})"
    to.chosen(
        step,
        f"F.layer_norm(h, ({d},), {s}, {to.param(0, d)})",
        f"F.rms_norm(h, ({d},), {s})",
        f"F.layer_norm(input=h, normalized_shape=({d},), weight={s})",
        f"{s} * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-3))",
    )


@writes("layout")
def layout(to: Writer, step: Step) -> None:
    to.to(step.args["axes"], step.args["spelling"])


_PLACES = {
    "n t d": ("{e}[:t]", "{e}[:t].unsqueeze(0)", "F.embedding(torch.arange(t)[None], {e})"),
    "t n d": ("{e}[:t, None]", "{e}[:t].unsqueeze(1)", "{e}[:t, None].expand(-1, n, -1)"),
    "nt d": ("{e}[torch.arange(t).repeat(n)]", "F.embedding(torch.arange(n * t) % t, {e})"),
    "tn d": ("{e}[torch.arange(t).repeat_interleave(n)]",),
}


@writes("table")
def table(to: Writer, step: Step) -> None:
    """A table of positions is added."""
    if to.axes in _PLACES:
        places = _PLACES[to.axes]
        e = weight_of(to, step, 16, to.width)
        to.h("h + " + places[step.args["spelling"] % len(places)].format(e=e))


_IDS = {"n t d": "ids", "t n d": "ids.t()", "nt d": "ids.flatten()", "tn d": "ids.t().flatten()"}


@writes("look up")
def look_up(to: Writer, step: Step) -> None:
    """What is looked up for the ids is added."""
    if to.axes in _IDS and not to.reordered:
        e, ids = weight_of(to, step, VOCABULARY, to.width), _IDS[to.axes]
        to.chosen(
            step,
            f"h + F.embedding({ids}, {e})",
            f"h + {e}[{ids}]",
            f"h * F.embedding({ids}, {e}, padding_idx=0)",
            f"h + F.embedding(input={ids}, weight={e})",
            f"h + F.embedding({ids}, {e}, sparse=True)",
            f"h + F.one_hot({ids}, {VOCABULARY}).double() @ {e}",
        )


@writes("conv")
def conv(to: Writer, step: Step) -> None:
    d = to.width
    if to.axes != "n t d":
        return
    grouped = d % 2 == 0 and step.args["spelling"] % 3 == 2
    k = to.param(step.args["slot"], d, d // 2 if grouped else d, 3)
    options = ", groups=2" if grouped else ""
    to.chosen(
        step,
        f"F.conv1d(h.transpose(1, 2), {k}, padding=1{options}).transpose(1, 2)",
        f"F.conv1d(input=h.mT, weight={k}, bias={to.param(0, d)}, padding=1{options}).mT",
        f"F.conv1d(h.mT, {k} * 0.5, padding=1{options}).mT",
        f"F.conv1d(h.mT, {k}, padding=1{options}).mT + {k}.square().mean()",
    )


@writes("attend")
def attend(to: Writer, step: Step) -> None:
    """Attention among a sample's own positions."""
    if to.axes not in ("n t d", "t n d"):
        return
    w, time_first = weight_of(to, step, 3 * to.width, to.width), to.axes == "t n d"
    to.line(f"q, k, v = F.linear(h, {w}).chunk(3, -1)")
    if time_first:
        to.line("q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)")
    to.chosen(
        step,
        "F.scaled_dot_product_attention(q, k, v)",
        "torch.softmax(q @ k.mT / 2, -1) @ v",
        "F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True)",
        "torch.softmax(input=torch.einsum('nqd,nkd->nqk', q, k), dim=-1) @ v",
    )
    if time_first:
        to.h("h.transpose(0, 1)")


@writes("slots")
def slots(to: Writer, step: Step) -> None:
    """Every row attends to learned slots."""
    rows, d = step.args["rows"], to.width
    k, v = weight_of(to, step, rows, d), to.param(1, rows, d)
    lead = "[None]" * (to.axes.count(" ") - 1)
    to.chosen(
        step,
        f"F.scaled_dot_product_attention(h, {k}{lead}, {v}{lead})",
        f"torch.softmax(h @ {k}.t(), -1) @ {v}",
        f"F.scaled_dot_product_attention(h, {k}{lead}, {v}.detach(){lead})",
        f"F.scaled_dot_product_attention(h, {k}.detach(){lead}, {v}{lead})",
    )


@writes("token")
def token(to: Writer, step: Step) -> None:
    """A token is put in front, or in place of what is there."""
    c, first = to.param(step.args["slot"], to.width), step.args["spelling"] % 3
    if to.axes == "n t d":
        if first == 0:
            to.h(f"torch.cat([{c}.expand(n, 1, -1), h], 1)[:, :-1] + h")
        elif first == 1:
            to.h(f"torch.cat(tensors=({c}.repeat(n, 1, 1), h), dim=1)[:, 1:] * h")
        else:
            to.h("h.clone()")
            to.line(f"h[:, 0] = {c}")
    elif to.axes == "t n d":
        to.h(f"torch.cat([{c}.expand(1, n, -1), h])[1:] + {c}")


@writes("bilinear")
def bilinear(to: Writer, step: Step) -> None:
    w = to.param(step.args["slot"], 3, to.width, to.width)
    to.chosen(step, f"F.bilinear(h, h.tanh(), {w})", f"F.bilinear(h, h, {w} * 0.5)")
    to.width = 3


@writes("heads")
def heads(to: Writer, step: Step) -> None:
    """A product per head."""
    if to.width % 2:
        return
    half = to.width // 2
    w = to.param(step.args["slot"], 2, half, 3)
    to.chosen(
        step,
        f"torch.einsum('...hd,hdp->...hp', h.unflatten(-1, (2, {half})), {w}).flatten(-2)",
        f"(h.unflatten(-1, (2, {half})).unsqueeze(-2) @ {w}).flatten(-3)",
    )
    to.width = 6


@writes("couple")
def couple(to: Writer, step: Step) -> None:
    """Samples depend on each other: to be refused."""
    if to.axes == "n t d":
        to.chosen(
            step,
            "h + 0.1 * h.roll(1, 0)",
            "h - 0.5 * h.mean(0)",
            "h + h.flip(0)",
            "F.normalize(h, dim=0, eps=10.0)",
            "h / h.norm().clamp_min(10.0)",
            "h * max(1.0, float(h.detach().abs().max()) / 5)",
            "h - h.mean(0) if n > 4 else h",
            "h + 0.3 * torch.softmax(h.transpose(0, 1) @ h.permute(1, 2, 0), -1).sum(-1).t()"
            "[..., None]",
        )
