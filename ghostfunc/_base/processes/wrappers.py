"""Modules around modules: what `from_module` has to be given instead of each."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from ghostfunc._base.errors import ParamsError
from ghostfunc._base.torch_private import compiled_in_place, uncompiled


class Wrapper(NamedTuple):
    """Why a class of wrappers is refused, and the way out."""

    why: str
    instead: str


WRAPPERS = {
    "DistributedDataParallel": Wrapper(
        "its ranks exchange gradients in loss.backward(), which ghostfunc does not call: the ranks "
        "would train models of their own",
        "Give it the module inside, gf.from_module(ddp.module, loss), and say whose gradients are "
        "averaged: gf.ghost_value_and_grad(..., group=ddp.process_group); gradients go to "
        "gf.accumulate_grads(ddp.module, step.grads).",
    ),
    "torch.distributed._composable.replicate.DDP": Wrapper(
        "its ranks exchange gradients in loss.backward(), which ghostfunc does not call: the ranks "
        "would train models of their own",
        "Give it the module as it was before replicate(module), and say whose gradients are "
        "averaged: gf.ghost_value_and_grad(..., group=torch.distributed.group.WORLD).",
    ),
    "DataParallel": Wrapper(
        "it runs copies of the module in threads, whose parameters nobody tracks",
        "Give it the module inside, gf.from_module(wrapped.module, loss); several devices take one "
        "process each, and gf.ghost_value_and_grad(..., group=...).",
    ),
    "FullyShardedDataParallel": Wrapper(
        "it keeps all parameters of a unit in one flat shard, in which a parameter's gradient "
        "cannot be told",
        "Shard the module with torch.distributed.fsdp.fully_shard (FSDP2), or give it a module "
        "that is not sharded and pass group=... to gf.ghost_value_and_grad.",
    ),
    "DeepSpeedEngine": Wrapper(
        "it keeps gradients and optimizer states in buffers of its own, which ghostfunc does not "
        "fill",
        "Give it the module inside, gf.from_module(engine.module, loss), at stage 0 alone, where "
        "parameters are whole, pass group=... to gf.ghost_value_and_grad and step with an "
        "optimizer of torch; to shard, use torch.distributed.fsdp.fully_shard.",
    ),
}
"""By the name of the class, or of one it is made from: DeepSpeed need not be installed for it."""


def refuse_wrapped(module: nn.Module) -> None:
    """Raise `ParamsError` for a module that another library or the compiler has wrapped, or that
    has such a module within."""
    _refuse_compiled(module)
    for place, part in module.named_modules():
        names = [(c.__name__, f"{c.__module__}.{c.__name__}") for c in type(part).__mro__]
        name = next((x for pair in names for x in pair if x in WRAPPERS), None)
        if name is not None:
            why, instead = WRAPPERS[name]
            where = f"{place!r} in {type(module).__name__} is" if place else "from_module got"
            raise ParamsError(f"{where} a {name}: {why}. {instead}")


def _refuse_compiled(module: nn.Module) -> None:
    """Raise for what `torch.compile` made of a module: it would be traced inside our passes."""
    if uncompiled(module) is not module:
        raise ParamsError(
            "from_module got a compiled module (torch.compile(module)). Give it the module itself "
            "(compiled._orig_mod) and compile the function that calls ghostfunc instead: "
            "torch.compile(lambda params, batch: gf.ghost_norm(model_fn, params, batch))."
        )
    for name, part in module.named_modules():
        if compiled_in_place(part) or uncompiled(part) is not part:
            raise ParamsError(
                f"{name or 'the module'!r} in {type(module).__name__} has been compiled "
                "(module.compile(), torch.compile(submodule)). Give from_module a module that has "
                "not, and compile the function that calls ghostfunc instead."
            )
