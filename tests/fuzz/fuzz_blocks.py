"""How the steps of programs that hold other steps are written: ways and orders."""

from __future__ import annotations

from fuzz_program import Step, rowwise
from fuzz_source import Writer, writes

_BY_LENGTH = (
    ("h.transpose(0, k)", "h.transpose(0, k)"),
    ("h.swapaxes(0, k)", "h.swapaxes(k, 0)"),
    ("h.movedim(0, k)", "h.movedim(k, 0)"),
    ("h.permute((k, 1 - k, 2))", "h.permute((k, 1 - k, 2))"),
    ("torch.stack(h.unbind(k))", "torch.stack(h.unbind(0), k)"),
    (
        "torch.einsum(('ntd->ntd', 'ntd->tnd')[k], h)",
        "torch.einsum(('ntd->ntd', 'tnd->ntd')[k], h)",
    ),
)


@writes("by length")
def by_length(to: Writer, step: Step) -> None:
    """The same ops, with axes that depend on the length."""
    to.to("n t d", step.args["spelling"])
    if to.axes != "n t d":
        to.steps(step.body)
        return
    there, back = _BY_LENGTH[step.args["spelling"] % len(_BY_LENGTH)]
    to.line("k = int(t > 3)")
    to.h(there)
    to.axes = "? ? d"
    if step.args["fold"]:
        to.line("sizes = h.shape[:2]")
        to.h("h.reshape(n * t, -1)")
        to.axes = "rows d"
    to.steps(step.body)
    if step.args["fold"]:
        to.h("h.reshape(*sizes, -1)")
    to.line("k = int(t > 3)")
    to.h(back)
    to.axes = "n t d"


@writes("route")
def route(to: Writer, step: Step) -> None:
    """One body in one of two layouts."""
    to.to("n t d", step.args["spelling"])
    if to.axes != "n t d":
        to.steps(step.body)
        return
    width, condition = to.width, step.args["condition"]
    body = step.body if condition.startswith("t ") else rowwise(step.body)
    for head, axes in zip((f"if {condition}:", "else:"), step.args["layouts"], strict=True):
        with to.indented(head):
            to.width = width
            to.to(axes, step.args["spelling"])
            to.steps(body)
            to.to("n t d", step.args["spelling"] + 1)


_ORDERS = {
    "argsort": ["order = lengths.argsort(stable=True)", "back = order.argsort()"],
    "sort": ["order = lengths.sort(stable=True)[1]", "back = torch.sort(input=order)[1]"],
    "numpy": [
        "order = torch.from_numpy(np.argsort(np.asarray(lengths), kind='stable'))",
        "back = torch.from_numpy(np.argsort(np.asarray(order)))",
    ],
    "python": [
        "keys = lengths.tolist()",
        "order = sorted(range(n), key=lambda i: -keys[i])",
        "back = sorted(range(n), key=lambda i: order[i])",
    ],
    "comparisons": [
        "keys = lengths + torch.arange(n) / (n + 1)",
        "back = (keys[:, None] > keys).sum(1)",
        "order = torch.zeros_like(back).index_add(0, back, torch.arange(n))",
    ],
    "kthvalue": [
        "keys = lengths + torch.arange(n) / (n + 1)",
        "order = torch.stack([keys.kthvalue(i + 1)[1] for i in range(n)])",
        "back = torch.zeros_like(order).index_add(0, order, torch.arange(n))",
    ],
    "roll": ["order = torch.arange(n).roll(1)", "back = torch.arange(n).roll(-1)"],
    "halves": [
        "order = torch.cat([torch.arange(n // 2, n), torch.arange(n // 2)])",
        "back = torch.cat([torch.arange(n - n // 2, n), torch.arange(n - n // 2)])",
    ],
}


@writes("reorder")
def reorder(to: Writer, step: Step) -> None:
    """Samples in another order, and back."""
    to.to("n t d", step.args["spelling"])
    order, when = step.args["order"], step.args["when"]
    if to.axes != "n t d":
        to.steps(step.body)
        return
    there, back = _moves(order, step.args["spelling"])
    with to.indented(f"if {when}:" if when else "if True:"):
        for line in _ORDERS.get(order, _ORDERS["argsort"]):
            to.line(line)
        to.h(there)
    outside, to.reordered = to.reordered, True
    to.steps(step.body)
    to.to("n t d", step.args["spelling"])
    to.reordered = outside
    with to.indented(f"if {when}:" if when else "if True:"):
        for line in _ORDERS.get(order, _ORDERS["argsort"]):
            to.line(line)
        to.h(back)


def _moves(order: str, spelling: int) -> tuple[str, str]:
    match order:
        case "flip":
            return "h.flip(0)", "torch.flip(h, (0,))"
        case "matrix":
            hot = "F.one_hot({}, n).double()"
            move = "({} @ h.flatten(1)).view(n, t, -1)"
            return move.format(hot.format("order")), move.format(hot.format("back"))
        case "stack of slices":
            return "torch.stack([h[i] for i in order])", "torch.stack([h[i] for i in back])"
        case "scatter":
            index = "{}[:, None, None].expand_as(h)"
            return (
                f"torch.zeros_like(h).scatter(0, {index.format('back')}, h)",
                f"torch.gather(h, 0, {index.format('back')})",
            )
    pick = ("h[{}]", "h.index_select(0, torch.as_tensor({}))")[spelling % 2]
    return pick.format("order"), pick.format("back")


@writes("unpad")
def unpad(to: Writer, step: Step) -> None:
    """Rows of padding are left out, and come back as zeros."""
    to.to("n t d", step.args["spelling"])
    if to.axes != "n t d" or to.reordered:
        to.steps(step.body)
        return
    width, spelling, body = to.width, step.args["spelling"] % 4, rowwise(step.body)
    unless_full = step.args["unless full"]
    if unless_full:
        with to.indented("if mask.all():"):
            to.axes = "n t d"
            to.steps(body)
            to.to("n t d", 0)
    with to.indented("else:" if unless_full else "if True:"):
        to.width, to.axes = width, "rows d"
        to.line("at = mask.flatten().nonzero().flatten()")
        if spelling == 3:  # by capacity: room for every row
            to.line("places = (mask.flatten().cumsum(0) - 1).clamp_min(0)")
            to.line("rows = h.flatten(0, 1) * mask.flatten()[:, None]")
            to.h("torch.zeros_like(rows).index_add(0, places, rows)")
        else:
            to.h(
                ("h[mask]", "h.flatten(0, 1)[at]", "h.flatten(0, 1).index_select(0, at)")[spelling]
            )
        to.steps(body)
        if spelling == 3:
            to.h("h.index_select(0, places) * mask.flatten()[:, None]")
        elif spelling == 0:
            to.line("y = h.new_zeros(n, t, h.shape[-1])")
            to.line("y[mask] = h")
            to.h("y")
        else:
            to.h("h.new_zeros(n * t, h.shape[-1]).index_copy(0, at, h)")
        to.h("h.reshape(n, t, -1)")
        to.axes = "n t d"


@writes("residual")
def residual(to: Writer, step: Step) -> None:
    """The body's result is added to what was there, where it fits."""
    width, axes = to.width, to.axes
    r = to.let("r", "h")
    to.steps(step.body)
    to.to(axes, 0)
    if (to.width, to.axes) == (width, axes):
        to.h(f"h + {r}")


@writes("twice")
def twice(to: Writer, step: Step) -> None:
    """The same parameters again, where shapes allow."""
    to.steps(step.body)
    to.steps(step.body)


@writes("by place")
def by_place(to: Writer, step: Step) -> None:
    """Positions in blocks, one after the other: a fold that depends on the length."""
    to.to("n t d", 0)
    if to.axes != "n t d":
        to.steps(step.body)
        return
    width = to.width
    to.line("parts = []")
    with to.indented("for h in h.split(max(1, t // 2), dim=1):"):
        to.axes = "n t d"
        to.line("t = h.shape[1]")
        to.line("a, b = (2, t // 2) if t % 2 == 0 else (1, t)")
        to.line("here = slice(len(parts), len(parts) + t)")
        to.steps(rowwise(step.body))
        to.line("parts.append(h)")
    to.h("torch.cat(parts, 1)")
    to.line("t = h.shape[1]")
    to.line("a, b = (2, t // 2) if t % 2 == 0 else (1, t)")
    to.axes, to.width = "n t d", to.width if to.width else width
