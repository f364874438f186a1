"""Op rules: what an op's per-sample gradient looks like as a factor.

A rule is needed only where a parameter meets samples. It is a function with the op's own
signature, after the cotangent `b` of the op's output. That of `F.linear`, shortened:

    @register_rule(F.linear)
    def linear(b, input, weight, bias=None):
        return {
            "weight": lambda: Outer(flat_positions(b), flat_positions(input)),
            "bias": lambda: Dense(over_positions(b)),
        }

It returns, for every argument that may be a parameter, a function that makes the factor; only those
of arguments that are parameters are called. One layout holds everywhere: every tensor is stacked
over samples, `[n, *shape]`, where `shape` is what a call with one sample would have, whatever the
model does with its axes. See `docs/adding_a_rule.md`.

Two kinds of ops need no rule of their own: one that broadcasts a parameter against samples takes
`register_broadcasting`, one that is a composition of other ops `register_decomposition`.

A rule goes into the file of its family of ops; importing this room registers every rule, so a new
file joins the list below. Read: registry, products, contraction, and any rule file.
"""

from ghostfunc._rules import (
    broadcasting as broadcasting,
    composite as composite,
    conv as conv,
    dense as dense,
    experts as experts,
    inplace as inplace,
    look_up as look_up,
    norm as norm,
    products as products,
    recurrent as recurrent,
    reordering as reordering,
)
