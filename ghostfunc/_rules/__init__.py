"""Op rules: what an op's per-sample gradient looks like as a factor.

A rule is needed only where a parameter meets samples. It is a function with the op's own
signature, after the cotangent `b` of the op's output:

    @register_rule(F.linear)
    def linear(b, input, weight, bias=None):
        return {
            "weight": lambda: Outer(rows(b), rows(input)),
            "bias": lambda: Dense(rows(b).sum(1)),
        }

It returns, for every argument that may be a parameter, a function that makes the factor; only those
of arguments that are parameters are called. One layout holds everywhere: every tensor is stacked
over samples, `[n, *shape]`, where `shape` is what a call with one sample would have, whatever the
model does with its axes. See `docs/adding_a_rule.md`.
"""

from ghostfunc._rules import (
    activation,
    composite,
    conv,
    distance,
    elementwise,
    embedding,
    gradients,
    inplace,
    linear,
    norm,
    recurrent,
    routed,
)
from ghostfunc._rules._registry import (
    DECOMPOSITIONS,
    REFUSED,
    RULES,
    BroadcastRule,
    FactorRule,
    Rule,
    lookup,
    register_rule,
)

__all__ = [
    "DECOMPOSITIONS",
    "REFUSED",
    "RULES",
    "BroadcastRule",
    "FactorRule",
    "Rule",
    "activation",
    "composite",
    "conv",
    "distance",
    "elementwise",
    "embedding",
    "gradients",
    "inplace",
    "linear",
    "lookup",
    "norm",
    "recurrent",
    "register_rule",
    "routed",
]
