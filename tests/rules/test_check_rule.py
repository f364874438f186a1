"""`check_rule` passes right rules and fails wrong ones; the documentation's rule is right."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import wrap_torch_function

import ghostfunc as gf
from ghostfunc._rules.registry import DECOMPOSITIONS, RULES, register_decomposition
from ghostfunc.testing import Case, check_rule, ids

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_rule.md"


@wrap_torch_function(lambda x, w: (x, w))
def scaled(x: Tensor, w: Tensor) -> Tensor:
    return x * w.exp()


@pytest.fixture
def rule(request: Any) -> Any:
    """Registers a rule of `scaled` for one test."""
    gf.register_rule(scaled)(request.param)
    yield
    del RULES[scaled]


CASE = Case(lambda p, x: scaled(x["x"], p["w"]), {"w": (4,)}, {"x": (3, 4)}, "sequences")


def right(b: Tensor, x: Tensor, w: Tensor) -> Any:
    return {"w": lambda: gf.Dense((b * x * w[:, None, None].exp()).sum((1, 2)))}


def forgets_the_exponential(b: Tensor, x: Tensor, w: Tensor) -> Any:
    return {"w": lambda: gf.Dense((b * x).sum((1, 2)))}


def right_for_one_sample(b: Tensor, x: Tensor, w: Tensor) -> Any:
    return {
        "w": lambda: gf.Dense((b * x * w[:, None, None].exp()).sum((0, 1, 2)).expand(len(b), -1))
    }


def of_another_shape(b: Tensor, x: Tensor, w: Tensor) -> Any:
    return {"w": lambda: gf.Dense((b * x).sum(1))}


def of_another_argument(b: Tensor, x: Tensor, w: Tensor) -> Any:
    return {"x": lambda: gf.Dense(b)}


def with_another_signature(b: Tensor, weight: Tensor) -> Any:
    return {}


def that_breaks(b: Tensor, x: Tensor, w: Tensor) -> Any:
    return {"w": lambda: gf.Dense(b @ b)}


@pytest.mark.parametrize("rule", [right], indirect=True)
def test_a_right_rule(rule: None) -> None:
    check_rule(scaled, [CASE])


@pytest.mark.parametrize("rule", [forgets_the_exponential], indirect=True)
def test_a_wrong_rule(rule: None) -> None:
    with pytest.raises(
        gf.VerificationError, match=r"n = 2, g_i of 'w': off by .* where sizes"
    ) as e:
        check_rule(scaled, [CASE])
    assert "case 0 (sequences), n = 1" in str(e.value)


@pytest.mark.parametrize("rule", [right_for_one_sample], indirect=True)
def test_a_rule_that_mixes_samples(rule: None) -> None:
    with pytest.raises(gf.VerificationError) as caught:
        check_rule(scaled, [CASE])
    assert "n = 1, g_i" not in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (of_another_shape, r"factor of shape \(3, 4\)|factor of shape .* for shape \(4,\)"),
        (of_another_argument, "no factor for 'w'"),
        (with_another_signature, "cannot take this call"),
        (that_breaks, "cannot take this call"),
    ],
    indirect=["rule"],
)
def test_a_rule_that_cannot_be_applied_says_so_when_tracing(rule: None, match: str) -> None:
    with pytest.raises(gf.UnsupportedOpError, match=match) as caught:
        check_rule(scaled, [CASE])
    assert "'w'" in str(caught.value)


def test_cases_that_test_nothing() -> None:
    with pytest.raises(gf.OptionError, match="at least one case"):
        check_rule(scaled, [])
    beside = Case(lambda p, x: x["x"] * p["w"], {"w": (4,)}, {"x": (4,)})
    with pytest.raises(gf.VerificationError, match=r"case 0 does not test .*scaled.* in .*mul"):
        check_rule(scaled, [beside])
    with pytest.raises(gf.OptionError, match="first axis"):
        check_rule(
            Tensor.mul, [Case(lambda p, x: (x["x"] * p["w"]).sum(), {"w": (4,)}, {"x": (4,)})]
        )
    with pytest.raises(gf.UnsupportedOpError, match="no ghost rule"):
        check_rule(scaled, [CASE])


def of_groups(b: Tensor, x: Tensor, w: Tensor) -> Any:
    # b [n, 1, t, g, p], x [n, 1, t, g, d]: in the factor, groups come before positions.
    left, right = (v.flatten(1, 2).transpose(1, 2) for v in (b, x))
    return {"w": lambda: gf.Grouped(left, right)}


def of_one_group(b: Tensor, x: Tensor, w: Tensor) -> Any:
    left, right = (v.flatten(1, 2).transpose(1, 2)[:, :1] for v in (b, x))
    return {"w": lambda: gf.Grouped(left, right)}


def test_a_rule_may_return_an_outer_product_per_group() -> None:
    @wrap_torch_function(lambda x, w: (x, w))
    def grouped(x: Tensor, w: Tensor) -> Tensor:
        return (x[..., None, :] * w).sum(-1)

    case = Case(lambda p, x: grouped(x["x"], p["w"]), {"w": (2, 5, 4)}, {"x": (3, 2, 4)})
    try:
        gf.register_rule(grouped)(of_groups)
        check_rule(grouped, [case])
        del RULES[grouped]
        gf.register_rule(grouped)(of_one_group)
        with pytest.raises(gf.UnsupportedOpError, match=r"a factor of shape \(1, 5, 4\)"):
            check_rule(grouped, [case])
    finally:
        RULES.pop(grouped, None)


def test_an_op_has_one_rule() -> None:
    with pytest.raises(gf.OptionError, match="has a rule or a decomposition already"):
        gf.register_rule(F.linear)(lambda b, x: {})
    with pytest.raises(gf.OptionError, match="has a rule or a decomposition already"):
        register_decomposition(F.linear)(F.linear)
    with pytest.raises(gf.OptionError, match="has a rule or a decomposition already"):
        gf.register_rule(torch.lstm)(lambda b, x: {})
    with pytest.raises(gf.OptionError, match="takes the op itself"):
        gf.register_rule("linear")(lambda b, x: {})  # type: ignore[arg-type]


def test_a_check_comes_before_the_rule() -> None:
    def check(x: Tensor, w: Tensor) -> None:
        raise gf.UnsupportedOpError("not today")

    gf.register_rule(scaled, check=check)(right)
    try:
        with pytest.raises(gf.UnsupportedOpError, match="not today"):
            check_rule(scaled, [CASE])
    finally:
        del RULES[scaled]


def test_ids_and_tensors_of_ones_own() -> None:
    table = Case(
        lambda p, x: F.embedding(x["i"], p["w"]),
        {"w": lambda g: torch.eye(5, 3).double()},
        {"i": ids(5, 2)},
    )
    check_rule(F.embedding, [table], samples=(4, 1))


@torch.library.custom_op("ghostfunc_tests::gate", mutates_args=())
def gate(x: Tensor, w: Tensor) -> Tensor:
    return x * w


gate.register_autograd(
    lambda ctx, b: (b * ctx.saved_tensors[1], (b * ctx.saved_tensors[0]).flatten(0, -2).sum(0)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


PACKET = torch.ops.ghostfunc_tests.gate
GATES = {"decorated": gate, "packet": PACKET, "overload": PACKET.default}
"""All that the op is called by."""


def gated(call: Callable[..., Tensor]) -> Case:
    return Case(lambda p, x: call(x["x"], p["w"]), {"w": (4,)}, {"x": (3, 4)})


def check_every_name(op: Callable[..., Tensor]) -> None:
    for call in GATES.values():
        check_rule(op, [gated(call)])
        with pytest.raises(gf.OptionError, match="has a rule or a decomposition already"):
            gf.register_rule(call)(right)


@pytest.mark.parametrize("name", GATES)
def test_a_custom_op_by_every_name(name: str) -> None:
    op = GATES[name]
    gf.register_rule(op)(lambda b, x, w: {"w": lambda: gf.Dense((b * x).flatten(1, -2).sum(1))})
    try:
        check_every_name(op)
    finally:
        del RULES[PACKET]
    with pytest.raises(gf.UnsupportedOpError, match=r"ghostfunc_tests.gate.* 'w': no ghost rule"):
        check_rule(op, [gated(PACKET.default)])


@pytest.mark.parametrize("name", GATES)
def test_a_decomposition_of_a_custom_op_by_every_name(name: str) -> None:
    register_decomposition(GATES[name])(lambda x, w: x * w)
    try:
        check_every_name(GATES[name])
    finally:
        for known in (PACKET, PACKET.default):
            del DECOMPOSITIONS[known]


@wrap_torch_function(lambda x, w: (x, w))
def squared(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w.T) ** 2


def test_a_rule_for_one_number_of_axes_only() -> None:
    """Samples of the parameter broadcast against positions: as many numbers, in wrong places."""

    def rule(b: Tensor, x: Tensor, w: Tensor) -> Any:
        return {"w": lambda: gf.Outer(2 * b * (x @ w[:, None].mT), x)}

    def folded(p: Any, x: Any) -> Tensor:
        return squared(x["x"].flatten(0, 1), p["w"]).unflatten(0, (-1, 3))

    gf.register_rule(squared)(rule)
    try:
        check_rule(
            squared, [Case(lambda p, x: squared(x["x"], p["w"]), {"w": (2, 4)}, {"x": (3, 4)})]
        )
        with pytest.raises(gf.UnsupportedOpError, match=r"test_check_rule\.squared") as caught:
            check_rule(squared, [Case(folded, {"w": (2, 4)}, {"x": (3, 4)})])
        assert "Outer(left (3, 3, 3, 2), right (3, 3, 4))" in str(caught.value)
    finally:
        del RULES[squared]


def test_the_code_of_the_documentation_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    before = set(RULES)
    try:
        exec(compile(code, str(PAGE), "exec"), {"__name__": "page"})
    finally:
        for op in set(RULES) - before:
            del RULES[op]


@pytest.mark.parametrize("rule", [right], indirect=True)
def test_parameters_without_elements_are_no_difference(rule: Any) -> None:
    """A table of no rows beside the op's own parameter."""
    beside = Case(
        lambda p, x: scaled(x["x"], p["w"]) + p["table"].sum(),
        {**CASE.params, "table": (0, 4)},
        CASE.samples,
    )
    check_rule(scaled, [beside])


@pytest.mark.parametrize("rule", [right], indirect=True)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": []}, "samples is empty: nothing would be checked"),
        ({"samples": 3}, "samples is a int"),
        ({"samples": [0]}, "a member of samples=0 must be an integer, 1 or more"),
        ({"tolerance": float("inf")}, "tolerance=inf must be a finite number"),
        ({"tolerance": 0}, "tolerance=0 must be a positive number"),
        ({"seed": "a"}, "seed='a' must be an integer"),
    ],
)
def test_a_check_of_nothing_is_refused(rule: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(gf.OptionError, match=said):
        check_rule(scaled, [CASE], **options)
    with pytest.raises(gf.OptionError, match=said):
        gf.testing.check_quantity(gf.SqNorm(), lambda g: g.flatten(1).square().sum(1), **options)


@pytest.mark.parametrize("rule", [right], indirect=True)
def test_cases_are_looked_at(rule: Any) -> None:
    with pytest.raises(gf.OptionError, match="cases is a Case; expected a list"):
        check_rule(scaled, CASE)  # type: ignore[arg-type]
    with pytest.raises(gf.OptionError, match="a member of cases is a dict"):
        check_rule(scaled, [{"call": CASE.call}])  # type: ignore[list-item]
    none: Any = Case(lambda p, x: None, CASE.params, CASE.samples)  # type: ignore[arg-type, return-value]
    with pytest.raises(gf.OptionError, match="a case's call returned is a NoneType"):
        check_rule(scaled, [none])
    for call in (lambda p, x: CASE.call(p, x)[:, :0], lambda p, x: 0 * CASE.call(p, x)):
        with pytest.raises(gf.VerificationError, match="tests nothing: all its gradients are zero"):
            check_rule(scaled, [Case(call, CASE.params, CASE.samples)])


def test_quantities_that_read_nothing() -> None:
    class Nothing(gf.Quantity):
        degree = 1

        def readers(self, leaves: Any, spec: Any) -> list[Any]:
            return [None] * len(leaves)

    with pytest.raises(gf.VerificationError, match=r"nothing was read, defined as \(1,\)"):
        gf.testing.check_quantity(Nothing(), lambda g: g.flatten(1).sum(1))
    none: Any = lambda g: None  # noqa: E731
    with pytest.raises(gf.OptionError, match="what definition returned is a NoneType"):
        gf.testing.check_quantity(gf.SqNorm(), none)
