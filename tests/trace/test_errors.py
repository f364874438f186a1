"""No wrong call returns a number: every error names the offender and a way out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, gram, sample_grads
from problems import Problem, energy, features, sequences, tokens, weights
from torch import Generator, Tensor, nn
from torch.overrides import wrap_torch_function

import ghostfunc as gf
from ghostfunc._rules.registry import RULES

ModelFn = Callable[[Any, Any], Any]


def linear(p: Any, x: Tensor) -> Tensor:
    return energy(x @ p["w"])


W = {"w": (4, 3)}


def params() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return weights(**W)


def batch(n: int = 4, seed: int = 0) -> Tensor:
    return features(4)(n, 1, Generator().manual_seed(seed))


def text(n: int = 4, t: int = 4) -> Tensor:
    return tokens(4)(n, t, Generator().manual_seed(0))


def dot_prod(f: ModelFn, p: Any = None, x: Any = None, **options: Any) -> Any:
    p, x = params() if p is None else p, batch() if x is None else x
    return gf.ghost_dot_prod(f, p, x, x, **options)


EVERYWHERE: dict[str, Callable[..., Any]] = {
    "ghost": lambda f, p, x: gf.ghost_dot_prod(f, p, x, x),
    "jvp": lambda f, p, x: gf.ghost_dot_prod(f, p, x, x, mode="jvp"),
    "materialized": lambda f, p, x: gf.ghost_dot_prod(f, p, x, x, mode="materialized"),
    "loop": lambda f, p, x: gf.ghost_dot_prod(f, p, x, x, mode="materialized", vectorize=False),
    "value_and_grad": lambda f, p, x: gf.ghost_value_and_grad(f, p, x, x),
    "value_and_grad_jvp": lambda f, p, x: gf.ghost_value_and_grad(f, p, x, x, mode="jvp"),
    "per_sample_grads": lambda f, p, x: gf.per_sample_grads(f, p, x),
    "per_sample_grads_ghost": lambda f, p, x: gf.per_sample_grads(f, p, x, mode="ghost"),
    "ghost_vjp": lambda f, p, x: gf.ghost_vjp(f, p, x, gf.SampleGrad()),
    "direction": lambda f, p, x: gf.direction(f, p, x),
    "verify": lambda f, p, x: gf.verify(f, p, x, x),
}
everywhere = pytest.mark.parametrize("call", EVERYWHERE.values(), ids=EVERYWHERE)
COUPLING_IS_SEEN = {k: v for k, v in EVERYWHERE.items() if k != "direction"}
where_samples_are_scored = pytest.mark.parametrize(
    "call", COUPLING_IS_SEEN.values(), ids=COUPLING_IS_SEEN
)
modes = pytest.mark.parametrize("mode", ["ghost", "jvp", "materialized"])


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dot_prod(linear, mode="fast"), "mode='fast'.*'ghost', 'jvp', 'materialized'"),
        (lambda: dot_prod(linear, reduction="max"), "reduction='max'.*'mean', 'sum', 'none'"),
        (lambda: dot_prod(linear, randomness="same"), "randomness='same'.*'error', 'different'"),
        (
            lambda: gf.ghost_value_and_grad(linear, params(), batch(), batch(), mode=None),
            "mode=None.*'ghost'",
        ),
        (
            lambda: gf.per_sample_grads(linear, params(), batch(), mode="jvp"),
            "mode='jvp'.*'materialized', 'ghost'",
        ),
        (
            lambda: gf.direction(linear, params(), batch(), reduction="none"),
            "reduction='none'.*'mean', 'sum'",
        ),
        (
            lambda: gf.ghost_vjp(linear, params(), batch(), {"norm": "sqnorm"}),
            r"quantities\['norm'\] is a str.*gf.Dot",
        ),
        (
            lambda: gf.ghost_vjp(linear, params(), batch(), gf.Dot(params()), randomness="same"),
            "randomness='same'",
        ),
        (
            lambda: gf.ghost_dot_prod(linear, params(), batch()),
            "exactly one of val and direction; neither",
        ),
        (
            lambda: gf.ghost_dot_prod(linear, params(), batch(), batch(), direction=params()),
            "exactly one of val and direction; both",
        ),
        (lambda: gf.register_rule("linear")(linear), "the op itself.*not 'linear'"),
        (
            lambda: gf.register_rule(F.linear)(linear),
            "linear has a rule or .* already",
        ),
    ],
)
def test_options(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(gf.OptionError, match=message):
        call()


def test_all_errors_are_ghost_errors() -> None:
    """One `except` catches them, and those with a builtin meaning are caught as that too."""
    errors = [getattr(gf, name) for name in gf.__all__ if name.endswith("Error")]
    assert len(errors) > 10
    assert all(issubclass(x, gf.GhostError) for x in errors)
    assert issubclass(gf.OptionError, ValueError)
    assert issubclass(gf.UnsupportedOpError, NotImplementedError)


# --- parameters and directions ----------------------------------------------------------------


@everywhere
@pytest.mark.parametrize(
    ("p", "message"),
    [
        ({}, "no tensors in it.*at least one tensor"),
        ({"w": 1.5}, "'w' is a float, not a tensor.*close over"),
        ({"a": {"w": np.ones((4, 3))}}, "'a.w' is a ndarray"),
        ({"w": torch.ones(4, 3, dtype=torch.long)}, "'w' has dtype torch.int64.*floating-point"),
        ({"w": torch.ones(4, 3, dtype=torch.complex64)}, "'w' has dtype torch.complex64, which is"),
    ],
    ids=["empty", "float", "numpy", "integers", "complex"],
)
def test_params(call: Callable[..., Any], p: Any, message: str) -> None:
    with pytest.raises(gf.ParamsError, match=message):
        call(linear, p, batch())


@modes
@pytest.mark.parametrize(
    ("u", "message"),
    [
        ({}, r"direction must be a pytree like params. Missing: \['w'\]"),
        ({"w": torch.ones(4, 3), "v": torch.ones(1)}, r"not in params: \['v'\]"),
        ([torch.ones(4, 3)], r"Missing: \['w'\]; not in params: \['0'\]"),
        ({"w": torch.ones(3, 4)}, r"'w' must have the shape of the parameter, \(4, 3\).*\(3, 4\)"),
        ({"w": torch.ones(3)}, r"\(4, 3\).*\(3,\)"),
        ({"w": 0.0}, r"\(4, 3\).*float"),
    ],
    ids=["empty", "extra", "list", "transposed", "broadcastable", "number"],
)
def test_directions(u: Any, message: str, mode: str) -> None:
    with pytest.raises(gf.ParamsError, match=message):
        gf.ghost_dot_prod(linear, params(), batch(), direction=u, mode=mode)
    with pytest.raises(gf.ParamsError, match=message):
        gf.ghost_vjp(linear, params(), batch(), gf.Dot(u))


def test_a_module_without_trainable_parameters() -> None:
    for module in (nn.Linear(2, 2).requires_grad_(False), nn.Tanh()):
        with pytest.raises(gf.ParamsError, match=r"no parameter with requires_grad=True.*Unfreeze"):
            gf.from_module(module, lambda m, x: m(x).sum(1))


# --- batches ----------------------------------------------------------------------------------

BATCHES = {
    "empty": (torch.ones(0, 4), r"is empty \(its leaves have 0 samples\).*at least one"),
    "uneven": ({"x": torch.ones(3, 4), "y": torch.ones(2)}, r"unequal.*\['x'\]: 3.*\['y'\]: 2"),
    "scalar": ({"x": torch.ones(3, 4), "scale": torch.ones(())}, r"\['scale'\] is a scalar tensor"),
    "string": ({"x": torch.ones(3, 4), "name": "bert"}, r"\['name'\] is a str.*Close over"),
    "number": ([torch.ones(3, 4), 3], r"\[1\] is a int"),
    "numpy": (np.ones((3, 4)), "is a ndarray"),
    "nothing": ({}, "no tensors in it"),
}


@everywhere
@pytest.mark.parametrize(("x", "message"), BATCHES.values(), ids=BATCHES)
def test_batches(call: Callable[..., Any], x: Any, message: str) -> None:
    with pytest.raises(gf.BatchError, match=message):
        call(linear, params(), x)


@modes
@pytest.mark.parametrize("call", [gf.ghost_dot_prod, gf.ghost_value_and_grad])
def test_which_batch_is_empty(call: Callable[..., Any], mode: str) -> None:
    with pytest.raises(gf.BatchError, match="train is empty"):
        call(linear, params(), batch(0), batch(), mode=mode)
    with pytest.raises(gf.BatchError, match="val is empty"):
        call(linear, params(), batch(), batch(0), mode=mode)


# --- losses -----------------------------------------------------------------------------------

LOSSES: dict[str, tuple[ModelFn, str]] = {
    "scalar": (lambda p, x: linear(p, x).mean(), r"shape \(\).*one floating-point loss per sample"),
    "column": (lambda p, x: linear(p, x)[:, None], r"shape \(\d, 1\).*expected one"),
    "integers": (lambda p, x: (x @ p["w"]).argmax(1), r"torch.int64.*floating-point"),
    "tuple": (lambda p, x: (linear(p, x), x), "returned a tuple"),
    "nothing": (lambda p, x: None, "returned a NoneType"),
    "too_many": (lambda p, x: linear(p, torch.cat([x, x])), r"shape \(\d,\).*for \d samples"),
}


@everywhere
@pytest.mark.parametrize(("model_fn", "message"), LOSSES.values(), ids=LOSSES)
def test_shape_of_the_losses(call: Callable[..., Any], model_fn: ModelFn, message: str) -> None:
    with pytest.raises(gf.LossShapeError, match=message):
        call(model_fn, params(), batch())


@everywhere
@pytest.mark.parametrize("bad", [0, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_not_finite(call: Callable[..., Any], bad: int, value: float) -> None:
    x = batch()
    x[bad, 1] = value
    with pytest.raises(
        gf.NonFiniteLossError, match=r"losses are not finite.*losses\[\d\] = (nan|inf)"
    ):
        call(linear, params(), x)


@modes
def test_a_validation_loss_that_is_not_finite(mode: str) -> None:
    val = batch()
    val[2] = float("nan")
    for reduction in ("mean", "none"):
        with pytest.raises(gf.NonFiniteLossError, match=r"losses\[2\] = nan"):
            gf.ghost_dot_prod(linear, params(), batch(), val, mode=mode, reduction=reduction)


# --- samples that talk to each other ----------------------------------------------------------


def contrastive(p: Any, x: Tensor) -> Tensor:
    h = F.normalize(x @ p["w"], dim=1)
    return F.cross_entropy(h @ h.t(), torch.arange(len(x)), reduction="none")


def mean_loss(p: Any, x: Tensor) -> Tensor:
    return linear(p, x).mean().expand(len(x))


def divided_by_n(p: Any, x: Tensor) -> Tensor:
    return linear(p, x) / len(x)


def centred(p: Any, x: Tensor) -> Tensor:
    h = x @ p["w"]
    return energy(h - h.mean(0))


def scaled_by_the_largest_activation(p: Any, x: Tensor) -> Tensor:
    h = x @ p["w"]
    return energy(h / h.abs().amax(0))


def scaled_by_the_largest_input(p: Any, x: Tensor) -> Tensor:
    return linear(p, x / x.abs().max())


def ranked(p: Any, x: Tensor) -> Tensor:
    losses = linear(p, x)
    return losses * losses.argsort().argsort()


def next_sample(p: Any, x: Tensor) -> Tensor:
    return energy(x.roll(1, 0) @ p["w"])


COUPLED = [
    contrastive,
    mean_loss,
    divided_by_n,
    centred,
    scaled_by_the_largest_activation,
    ranked,
    next_sample,
]


@where_samples_are_scored
@pytest.mark.parametrize("model_fn", COUPLED)
def test_coupled_samples(call: Callable[..., Any], model_fn: ModelFn) -> None:
    with pytest.raises(gf.CoupledSamplesError, match="loss of one sample depends on the others"):
        call(model_fn, params(), batch())


@pytest.mark.parametrize("call", ["ghost", "jvp", "materialized", "value_and_grad"])
@pytest.mark.parametrize("largest", [0, 1, 3])
def test_normalisation_by_the_largest_input(call: str, largest: int) -> None:
    """A copy of a sample leaves a maximum as it is: company has to be taken away to see it."""
    x = batch()
    x[largest, 0] = 10.0
    with pytest.raises(gf.CoupledSamplesError, match="loss of one sample depends on the others"):
        EVERYWHERE[call](scaled_by_the_largest_input, params(), x)


@modes
def test_one_sample_proves_nothing_for_many(mode: str) -> None:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        return scaled_by_the_largest_input(p, x)

    dot_prod(model_fn, x=batch(1), mode=mode)
    with pytest.raises(gf.CoupledSamplesError, match="loss of one sample depends on the others"):
        dot_prod(model_fn, x=batch(4), mode=mode)


@modes
@pytest.mark.parametrize("n", [1, 2])
def test_coupled_validation_samples(mode: str, n: int) -> None:
    """The two batches differ in structure: what is known of one says nothing of the other."""

    def model_fn(p: Any, x: Any) -> Tensor:
        return mean_loss(p, x["x"]) if "y" in x else linear(p, x["x"])

    train, val = {"x": batch(n)}, {"x": batch(), "y": batch()}
    with pytest.raises(gf.CoupledSamplesError, match="depends on the others"):
        gf.ghost_dot_prod(model_fn, params(), train, val, mode=mode, reduction="none")


@everywhere
def test_batch_norm_in_training_mode(call: Callable[..., Any]) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    state = copy.deepcopy(net.state_dict())
    model_fn, p = gf.from_module(net, lambda m, x: energy(m(x)))
    with pytest.raises(
        gf.CoupledSamplesError, match=r"batch_norm in training mode.*module.eval\(\)"
    ):
        call(model_fn, p, batch())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()), "statistics moved"


@where_samples_are_scored
def test_batch_norm_without_running_statistics(call: Callable[..., Any]) -> None:
    net = nn.BatchNorm1d(4, track_running_stats=False).double().eval()
    with pytest.raises(gf.CoupledSamplesError, match="normalises over the batch"):
        call(*gf.from_module(net, lambda m, x: energy(m(x))), batch())


def test_training_mode_is_noticed_later() -> None:
    """A trace made in evaluation mode must not serve training mode."""
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).double().eval()
    net[0].requires_grad_(False)
    model_fn, p = gf.from_module(net, lambda m, x: energy(m(x)))
    dot_prod(model_fn, p)
    net[1].train()
    with pytest.raises(gf.RandomnessError):
        dot_prod(model_fn, p)
    net.train()
    with pytest.raises(gf.CoupledSamplesError):
        dot_prod(model_fn, p)


# --- randomness -------------------------------------------------------------------------------


def dropped(p: Any, x: Tensor) -> Tensor:
    return energy(F.dropout(x, 0.5) @ p["w"])


@where_samples_are_scored
def test_dropout(call: Callable[..., Any]) -> None:
    with pytest.raises(gf.RandomnessError, match=r"random numbers.*module.eval\(\).*randomness="):
        call(dropped, params(), batch())


@modes
def test_dropout_that_hardly_ever_drops(mode: str) -> None:
    """The few samples of a trace will not show it."""
    with pytest.raises(gf.RandomnessError, match="random numbers"):
        dot_prod(lambda p, x: energy(F.dropout(x, 1e-9) @ p["w"]), mode=mode)


@pytest.mark.parametrize("mode", ["ghost", "materialized"])
def test_every_sample_may_have_its_own_dropout(mode: str) -> None:
    """Linear in its input, the loss has a gradient that is the dropped-out input itself."""

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return (F.dropout(x, 0.5) @ p["w"]).sum(1)

    x = torch.ones(64, 4, dtype=torch.float64)
    grads = gf.per_sample_grads(model_fn, params(), x, mode=mode, randomness="different")["w"]
    assert grads.unique().tolist() == [0.0, 2.0]
    assert len(grads[:, :, 0].unique(dim=0)) > 8, "samples share their draws"
    dots = dot_prod(model_fn, x=x, mode=mode, randomness="different", reduction="none")
    assert dots.shape == (64, 64)
    assert torch.isfinite(dots).all()


def test_randomness_different_still_sees_coupled_samples() -> None:
    with pytest.raises(gf.CoupledSamplesError, match="depends on the others"):
        dot_prod(centred, randomness="different")


# --- ops without a rule -----------------------------------------------------------------------


@wrap_torch_function(lambda x, y, w: (x, y, w))
def form(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """An op of the user's own, `sum_ij x_i w_ij y_j`, of which ghostfunc cannot know."""
    return torch.einsum("ni,ij,nj->n", x, w, y)


@wrap_torch_function(lambda tensors: tuple(tensors))
def form_of_list(tensors: list[Tensor]) -> Tensor:
    return form(*tensors)


def square_form(p: Any, x: Tensor) -> Tensor:
    return energy(form(x, x, p["w"] @ p["w"].mT)[:, None])


UNSUPPORTED: dict[str, tuple[ModelFn, str]] = {
    "parameter": (lambda p, x: form(x, x[:, :3], p["w"]), "form.*'w'"),
    "derived": (square_form, r"form.*\(w, mT\(w\)\)|form.*matmul\(w"),
    "in_a_list": (lambda p, x: form_of_list([x, x[:, :3], p["w"]]), "form_of_list.*'w'"),
}


@pytest.mark.parametrize(("model_fn", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_an_op_without_a_rule(model_fn: ModelFn, message: str) -> None:
    with pytest.raises(gf.UnsupportedOpError, match=message) as error:
        dot_prod(model_fn)
    for way_out in ('mode="jvp"', 'mode="materialized"', "vectorize=False", "gf.register_rule"):
        assert way_out in str(error.value)


@pytest.mark.parametrize("mode", ["jvp", "materialized"])
def test_the_ways_out_are_ways_out(mode: str) -> None:
    problem = Problem(square_form, params(), features(4))
    grads = sample_grads(problem, batch())
    assert_close(dot_prod(square_form, mode=mode), sum(gram(grads, grads)).mean(1), 1e-10)


@pytest.fixture
def own_rules() -> Iterator[None]:
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def register_form(factor: float = 1.0) -> None:
    @gf.register_rule(form)
    def rule(b, x, y, w):  # type: ignore[no-untyped-def]
        b, x, y = (z.reshape(len(z), -1) for z in (factor * b, x, y))
        return {"w": lambda: gf.Dense((b * x)[:, :, None] * y[:, None])}


@pytest.mark.usefixtures("own_rules")
def test_a_rule_of_ones_own() -> None:
    register_form()
    problem = Problem(square_form, params(), features(4))
    grads = gf.per_sample_grads(square_form, problem.params, batch(), mode="ghost")
    assert_close(grads, sample_grads(problem, batch()), 1e-10)
    with pytest.raises(gf.OptionError, match=r"form.* has a rule or a decomposition already"):
        register_form()


def test_embedding_that_rewrites_its_weight() -> None:
    table = weights(w=(4, 3))
    before = table["w"].clone()
    with pytest.raises(gf.UnsupportedOpError, match=r"max_norm rewrites its weight.*drop max_norm"):
        dot_prod(lambda p, ids: energy(F.embedding(ids, p["w"], max_norm=0.1)), table, text())
    assert torch.equal(table["w"], before)


@modes
def test_embedding_that_counts_over_the_batch(mode: str) -> None:
    with pytest.raises(
        gf.CoupledSamplesError, match=r"scale_grad_by_freq.*scale_grad_by_freq=False"
    ):
        dot_prod(
            lambda p, ids: energy(F.embedding(ids, p["w"], scale_grad_by_freq=True)),
            weights(w=(4, 3)),
            text(),
            mode=mode,
        )


def test_forward_mode_that_torch_does_not_have() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).double()
    model_fn, p = gf.from_module(layer, lambda m, x: energy(m(x)))
    with pytest.raises(gf.TransformError, match=r'(?s)mode="jvp" needs.*mode="ghost"'):
        dot_prod(model_fn, p, mode="jvp")


def test_a_model_that_vmap_cannot_run() -> None:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        return linear(p, x) * (2 if bool((x.abs() < 100).all()) else 1)

    with pytest.raises(gf.TransformError, match=r"vmap cannot run this model.*vectorize=False"):
        dot_prod(model_fn, mode="materialized", vectorize=True)
    for vectorize in (False, None):
        loop = dot_prod(model_fn, mode="materialized", vectorize=vectorize)
        assert_close(loop, dot_prod(model_fn), 1e-10)


# --- uses that are not seen -------------------------------------------------------------------


class HandWritten(torch.autograd.Function):
    """`x @ w` behind a custom Function, which torch function modes do not look into."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return b @ w.mT, x.mT @ b


UNSEEN: dict[str, ModelFn] = {
    "alone": lambda p, x: energy(HandWritten.apply(x, p["w"])),
    "beside_a_seen_use": lambda p, x: energy(HandWritten.apply(x, p["w"]) + x @ p["w"]),
    "of_a_derived_tensor": lambda p, x: energy(HandWritten.apply(x, p["w"] * 2)),
    "before_any_sample": lambda p, x: energy(x @ HandWritten.apply(p["w"], p["w"].mT)),
}


@pytest.mark.parametrize("model_fn", UNSEEN.values(), ids=UNSEEN)
def test_a_custom_function(model_fn: ModelFn) -> None:
    with pytest.raises(gf.UntrackedUseError, match=r"'w'.*custom autograd.Function") as error:
        dot_prod(model_fn)
    assert 'mode="materialized"' in str(error.value)


def test_a_custom_function_behind_a_closed_gate() -> None:
    """Its gradient is zero when the model is traced, and not zero later."""

    def model_fn(p: Any, x: Tensor) -> Tensor:
        return energy(x @ p["v"] + p["gate"] * HandWritten.apply(x, p["w"]))

    p = weights(w=(4, 3), v=(4, 3))
    for gate in (0.0, 1.0):
        with pytest.raises(gf.UntrackedUseError, match="'w'"):
            dot_prod(model_fn, p | {"gate": torch.full_like(p["v"][0, 0], gate)})


# --- writes -----------------------------------------------------------------------------------


def add_to_parameter(p: Any, x: Tensor) -> Tensor:
    return energy(x @ p["w"].add_(1))


def write_into_parameter(p: Any, x: Tensor) -> Tensor:
    p["w"][0] = 1.0
    return linear(p, x)


def write_into_view_of_parameter(p: Any, x: Tensor) -> Tensor:
    p["w"].view(-1).mul_(2)
    return linear(p, x)


def write_without_grad(p: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        p["w"].mul_(2)
    return linear(p, x)


def write_into_data(p: Any, x: Tensor) -> Tensor:
    p["w"].data.clamp_(-0.1, 0.1)
    return linear(p, x)


def activate_parameter_in_place(p: Any, x: Tensor) -> Tensor:
    return energy(x @ F.relu(p["w"], inplace=True))


WRITES = [
    add_to_parameter,
    write_into_parameter,
    write_into_view_of_parameter,
    write_without_grad,
    write_into_data,
    activate_parameter_in_place,
]


def check_write_is_refused(call: Callable[..., Any], model_fn: ModelFn) -> None:
    p = params()
    before = p["w"].clone()
    with pytest.raises(gf.InPlaceError, match=r"parameter '.*w.*' in place.*out-of-place"):
        call(model_fn, p, batch())
    assert torch.equal(p["w"], before), "the parameter has been overwritten"


@pytest.mark.parametrize("model_fn", WRITES)
def test_a_model_that_writes_to_its_parameters(model_fn: ModelFn) -> None:
    check_write_is_refused(EVERYWHERE["ghost"], model_fn)


@everywhere
def test_writes_are_refused_everywhere(call: Callable[..., Any]) -> None:
    check_write_is_refused(call, add_to_parameter)


@everywhere
def test_a_model_that_writes_to_its_batch(call: Callable[..., Any]) -> None:
    x = batch()
    before = x.clone()
    with pytest.raises(gf.InPlaceError, match=r"writes to its batch in place.*copy"):
        call(lambda p, x: linear(p, x.mul_(2)), params(), x)
    assert torch.equal(x, before), "the batch has been overwritten"


def test_data_is_a_constant() -> None:
    """As to autograd: reading `.data` is no use of the parameter."""
    report = gf.verify(
        lambda p, x: energy(x @ p["w"].data + p["b"]), weights(**W, b=(3,)), batch(), batch()
    )
    assert report.ok
    assert report.unused == ("w",)
    assert "unused (the losses do not depend on them): w" in str(report)


# --- control flow -----------------------------------------------------------------------------


def branch_on_values(p: Any, x: Tensor) -> Tensor:
    if x[0, 0] > 0:
        return energy((x @ p["w"]).tanh() @ p["w"].mT)
    return linear(p, x)


def test_control_flow_on_values() -> None:
    """A trace of the one branch must not serve the other: exact, or an error."""
    x = batch()
    for sign in (1, -1):
        x[:, 0] = sign * x[:, 0].abs()
        problem = Problem(branch_on_values, params(), features(4))
        grads = sample_grads(problem, x)
        assert_close(dot_prod(branch_on_values, x=x), sum(gram(grads, grads)).mean(1), 1e-10)


def test_ops_that_change_from_call_to_call() -> None:
    calls = []

    def model_fn(p: Any, x: Tensor) -> Tensor:
        calls.append(None)
        h = x @ p["w"] if len(calls) % 2 else F.linear(x, p["w"].mT)
        return energy(h)

    with pytest.raises(gf.ControlFlowError, match=r"control flow depends.*Ways out"):
        dot_prod(model_fn)


def loop_over_samples(p: Any, x: Tensor) -> Tensor:
    return torch.stack([energy(row[None] @ p["w"])[0] for row in x])


def test_control_flow_on_the_number_of_samples() -> None:
    with pytest.raises(gf.ControlFlowError, match="calls other ops for 3 samples than for 2"):
        dot_prod(loop_over_samples)


# --- rows that belong to no sample, or to another one -----------------------------------------


def gather(p: Any, batch: Any) -> Tensor:
    """Labelled positions alone: how many there are, differs from sample to sample."""
    x, keep = batch
    losses = (x[keep] @ p["w"]).square().mean(1)
    owner = torch.arange(len(x))[:, None].expand(keep.shape)[keep]
    return torch.zeros(len(x), dtype=x.dtype).index_add(0, owner, losses)


def test_rows_selected_by_a_mask() -> None:
    x = sequences(4)(4, 4, Generator().manual_seed(0))
    even = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 1, 1]]).bool()
    problem = Problem(gather, params(), features(4))
    grads = sample_grads(problem, (x, even))
    assert_close(dot_prod(gather, x=(x, even)), sum(gram(grads, grads)).mean(1), 1e-10)

    # As many rows in all, and as many for the first two samples: only the others tell.
    uneven = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0]]).bool()
    with pytest.raises(gf.SampleAxisError, match=r"'w'.*rows"):
        dot_prod(gather, x=(x, uneven))


def longest_first(p: Any, x: Tensor) -> Tensor:
    """As before `pack_padded_sequence`: samples are sorted, and sorted back."""
    order = x[:, 0].argsort(descending=True)
    return energy((x[order] @ p["w"])[order.argsort()])


@pytest.mark.parametrize("keys", [[3, 2, 1, 0], [0, 1, 2, 3], [2, 3, 0, 1], [3, 2, 0, 1]])
def test_samples_that_change_places(keys: list[int]) -> None:
    x = batch()
    x[:, 0] = torch.tensor(keys)
    problem = Problem(longest_first, params(), features(4))
    grads = sample_grads(problem, x)
    expected = sum(gram(grads, grads)).mean(1)
    try:
        scores = dot_prod(longest_first, x=x)
    except gf.GhostError:
        return
    assert_close(scores, expected, 1e-10)


def test_a_parameter_for_every_sample() -> None:
    """A row of the parameter for each place in the batch: a sample's loss depends on its place."""
    with pytest.raises((gf.CoupledSamplesError, gf.UnsupportedOpError), match="sample"):
        dot_prod(lambda p, x: energy(x[:, :3] * p["w"][: len(x)]))


def test_a_table_of_all_pairs() -> None:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        h = x @ p["w"]
        return energy((h @ h.t() * p["scale"]).diagonal()[:, None])

    with pytest.raises(gf.SampleAxisError, match=r'table of sample pairs.*mode="jvp"'):
        dot_prod(model_fn, weights(**W, scale=()))


# --- verify -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_rules")
def test_verify_tells_a_wrong_rule() -> None:
    def model_fn(p: Any, x: Tensor) -> Tensor:
        return energy(form(x, x, p["w"])[:, None] + x @ p["v"])

    register_form(1.001)
    args = (model_fn, weights(w=(4, 4), v=(4, 1)), batch(), batch(3, seed=1))
    report = gf.verify(*args)
    assert not report.ok
    assert [row.name for row in report.rows if row.error > report.tolerance] == ["w"]
    assert "NOT EXACT" in str(report)
    with pytest.raises(gf.VerificationError, match=r"more than 1.0e-10 for w, total"):
        report.check()
    with pytest.raises(gf.VerificationError, match="FAIL"):
        gf.verify(*args, check=True)
    assert gf.verify(*args, tolerance=0.1).ok
