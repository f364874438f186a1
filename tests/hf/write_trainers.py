"""Write the table of `docs/trainers.md`: what `GhostTrainer` makes of Trainer's settings.

    python tests/hf/write_trainers.py

Every row is run: with scores and without, and its scores are held against the definition, by the
trainer's own loss of one sample at a time. TRL's rows need TRL (`pip install 'ghostfunc[trl]'`).
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import test_flattened as flattened  # noqa: E402
import test_settings as settings  # noqa: E402
import test_trained as trained  # noqa: E402
from hf_trainers import (  # noqa: E402
    DEFAULTS,
    Recorded,
    arguments,
    gpt2,
    in_order,
    llama,
    mixtral,
    scores_by_definition,
)

import ghostfunc as gf  # noqa: E402

PAGE = HERE.parent.parent / "docs" / "trainers.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
Case = trained.Case
LM = Case(gpt2)
LM_BALANCED = Case(lambda: mixtral(output_router_logits=True, router_aux_loss_coef=0.1))


def with_args(case: Any, **args: Any) -> Any:
    return replace(case, args={**case.args, **args})


def with_options(case: Any, **options: Any) -> Any:
    return replace(case, options={**case.options, **options})


LORA = trained.CASES["lora"]
ON = {"activation_checkpointing": True}
RECIPE = {**ON, "warmup_steps": 2, "lr_scheduler_type": "cosine"}

ROWS: dict[str, Any] = {
    **{f"{name}, accumulation 2": case for name, case in trained.CASES.items()},
    "accumulation 1": with_args(LM, gradient_accumulation_steps=1),
    "classes, accumulation 3": with_args(trained.CASES["classes"], gradient_accumulation_steps=3),
    "no clipping, no decay": with_args(LM, max_grad_norm=0.0, weight_decay=0.0),
    "SGD with momentum": with_args(LM, optim="sgd", optim_args="momentum=0.9"),
    "cosine schedule with warm-up": with_args(LM, lr_scheduler_type="cosine", warmup_steps=2),
    "activation checkpoints": with_args(LM, **ON),
    "activation checkpoints, Llama": with_args(Case(llama), **ON),
    "activation checkpoints, classes": with_args(trained.CASES["classes"], **ON),
    "lora, activation checkpoints, schedule": with_args(LORA, **RECIPE),
    "lora on a base in eight bits": Case(settings.quantised),
    "lora, smoothed": with_args(LORA, label_smoothing_factor=0.1),
    "bf16": with_args(LM, bf16=True),
    "lora, bf16, activation checkpoints": with_args(LORA, bf16=True, **ON),
    'score_form="previous_state"': with_options(LM, score_form="previous_state"),
    'score_form="exact"': with_options(LM, score_form="exact"),
    'score_form="exact", activation checkpoints': with_options(
        with_args(LM, **ON), score_form="exact"
    ),
    "score_order=2": with_options(LM, score_order=2),
    "score_batch_size=1": with_options(LM, score_batch_size=1),
    "log_gradients=True": with_options(LM, log_gradients=True),
    "auto_find_batch_size": with_args(LM, auto_find_batch_size=True),
    "bf16, score_order=2": with_options(with_args(LM, bf16=True), score_order=2),
    "batches by length": with_args(LM, train_sampling_strategy="group_by_length"),
    "last batch dropped": with_args(LM, dataloader_drop_last=True),
    "evaluated at the start and at every step": with_options(
        with_args(LM, eval_on_start=True, eval_strategy="steps", eval_steps=1),
        eval_dataset=LM.data(4, 5),
    ),
    "two epochs": with_args(LM, max_steps=-1, num_train_epochs=2),
    "a worker process": with_args(LM, dataloader_num_workers=1),
    "tokens counted": with_args(LM, include_num_input_tokens_seen="all"),
    "fused AdamW": with_args(LM, optim="adamw_torch_fused"),
    "a rate that falls on a plateau": with_options(
        with_args(
            LM, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1
        ),
        eval_dataset=LM.data(4, 5),
    ),
    "optimizer_cls_and_kwargs": with_options(
        LM, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9})
    ),
    'compile=True, score_form="exact"': with_options(LM, compile=True, score_form="exact"),
}
REFUSED: dict[str, Any] = {
    "NEFTune": with_args(LM, neftune_noise_alpha=5.0),
    "routed experts, load balancing loss": LM_BALANCED,
    'an optimizer of one\'s own, score_form="exact"': with_options(
        LM, optimizer_cls_and_kwargs=(settings.Signs, {"lr": 1e-3}), score_form="exact"
    ),
    "token sums for a mean": with_options(LORA, sample_loss=trained.token_sums),
}


def largest(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def weights_error(model: nn.Module, plain: nn.Module) -> float:
    pairs = zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
    moved = [(a.double(), b.double()) for a, b in pairs if a.is_floating_point()]
    size = max(float(b.abs().max()) for _, b in moved)
    return max(float((a - b).abs().max()) for a, b in moved) / size


def measured(case: Any, folder: Path) -> tuple[str, str]:
    """The errors of weights and scores of one row."""
    given = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, **case.args}
    args, train, score = arguments(folder, **given), case.data(8, 0), case.data(5, 1)
    own = ("score_form", "score_order", "score_batch_size", "log_gradients", "sample_loss")
    plain = case.make()
    rest = {k: x for k, x in case.options.items() if k not in (*own, "compile")}
    Trainer(model=plain, args=args, train_dataset=train, **rest).train()
    trainer = Recorded(
        model=case.make(), args=args, train_dataset=train, score_dataset=score, **case.options
    )
    trainer.train()
    error = f"{weights_error(trainer.model, plain):.0e}"
    if {"score_form", "score_order"} & case.options.keys():
        return error, "as `gf.shapley.step`"
    want = scores_by_definition(
        trainer,
        in_order(score, DEFAULTS["per_device_eval_batch_size"]),
        case.counts,
        counted=case.counted,
        averaged=case.averaged,
    )
    return error, f"{largest(trainer.scores.values, want):.0e}"


def refusal(case: Any, folder: Path) -> str:
    """What a row is refused with."""
    try:
        measured(case, folder)
    except gf.GhostError as error:
        said = re.sub(r"[0-9.]{6,}| at 0x[0-9a-f]+", "...", str(error)).replace("|", "or")
        return f"{type(error).__name__}: {said}"
    raise AssertionError("this setting is not refused; move it among those that work")


def flattened_rows(folder: Path) -> dict[str, Callable[[], tuple[str, ...]]]:
    """Rows into which a collator puts all samples of a batch."""

    def run(make: Callable[[], nn.Module], **options: Any) -> tuple[str, ...]:
        args = arguments(folder, gradient_accumulation_steps=2, **options)
        data = {k: x for k, x in flattened.FLAT.items() if k != "score_dataset"}
        plain = make()
        Trainer(model=plain, args=args, **data).train()
        trainer = Recorded(model=make(), args=args, **flattened.FLAT)
        trainer.train()
        error = f"{weights_error(trainer.model, plain):.0e}"
        want = flattened.expected(trainer, flattened.SCORE)
        return error, f"{largest(trainer.scores.values, want):.0e}"

    return {
        "DataCollatorWithFlattening, accumulation 2": partial(run, gpt2),
        "DataCollatorWithFlattening, activation checkpoints, Llama": partial(run, llama, **ON),
        "DataCollatorWithFlattening, lora": partial(run, trained.lora()),
    }


def trl_rows(folder: Path) -> dict[str, Callable[[], tuple[str, ...]]]:
    """The rows of TRL's trainers."""
    import test_trl as trl

    def run(
        name: str,
        adapters: bool,
        bf16: bool,
        scoring: Mapping[str, Any] = MappingProxyType({}),
        **given: Any,
    ) -> tuple[str, ...]:
        options = {"max_steps": 6, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, **given}
        tokenizer = trl.make_tokenizer()
        plain, ghost = trl.trained(name, tokenizer, folder, adapters, scoring, bf16=bf16, **options)
        return f"{weights_error(ghost.model, plain.model):.0e}", trl.score_error(ghost, name)

    def packed(adapters: bool) -> tuple[str, ...]:
        options = {"max_steps": 6, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
        options |= {"packing": True, "max_length": 16, "bf16": False}
        plain, ghost = trl.trained("sft", trl.make_tokenizer(), folder, adapters, **options)
        error = f"{weights_error(ghost.model, plain.model):.0e}"  # the loop goes back to others
        return error, f"{largest(ghost.scores.values, trl.scores_of_rows(ghost)):.0e}"

    losses = {
        f"TRL dpo, {case}": partial(run, "dpo", False, False, **given)
        for case, given in trl.DPO_LOSSES.items()
    }
    losses["TRL dpo, several, use_weighting, compile"] = partial(
        run, "dpo", False, False, {"compile": True}, **trl.DPO_LOSSES["several"], use_weighting=True
    )
    packing = {
        "TRL sft, dft": partial(run, "sft", False, False, loss_type="dft"),
        "TRL sft, dft, lora, bf16": partial(run, "sft", True, True, loss_type="dft"),
        "TRL sft, packing": partial(packed, False),
        "TRL sft, packing, lora": partial(packed, True),
    }
    return {**losses, **packing} | {
        f"TRL {name}{', lora' * adapters}, accumulation 2, activation checkpoints"
        f"{', bf16' * bf16}": partial(run, name, adapters, bf16)
        for name in trl.CASES
        for adapters in (False, True)
        for bf16 in (False, True)
    }


def table(page: str, wanted: str) -> str:
    """All rows, in Markdown; those that are not wanted as the page has them."""
    kept = {line.split(" | ")[0][2:]: line for line in page.splitlines() if line.startswith("| ")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        working = {name: partial(measured, case, folder) for name, case in ROWS.items()}
        refused = {name: partial(refusal, case, folder) for name, case in REFUSED.items()}
        lines = []
        for head, rows in (
            (
                "| setting | weights | scores |",
                {**working, **flattened_rows(folder), **trl_rows(folder)},
            ),
            ("| setting | refused with |", refused),
        ):
            lines += ["", head, "| --- " * (head.count("|") - 1) + "|"]
            for name, run in rows.items():
                if name in kept and not re.search(wanted, name):
                    lines.append(kept[name])
                    continue
                cells = run()
                cells = (cells,) if isinstance(cells, str) else cells
                lines.append(f"| {' | '.join((name, *cells))} |")
                print(lines[-1], flush=True)
    return "\n".join(lines[1:])


def main() -> None:
    """Put the table where it belongs in the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="", help="only rows with this regular expression")
    wanted = parser.parse_args().rows
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    kept, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(kept, wanted)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
