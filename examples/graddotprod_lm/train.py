"""Train a GPT-2 on Pile-style token files, with a score for every sample of every step.

    python -m examples.graddotprod_lm.train --method GradDotProd --architecture GPT2-Small ...
    torchrun --nproc_per_node 8 -m examples.graddotprod_lm.train ...

Every option is required (`--help` lists them). The same command again goes on after an
interruption, and ends where an uninterrupted run does.
"""

from __future__ import annotations

import json
import traceback
from math import cos, pi
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import GPT2LMHeadModel

from examples.graddotprod_lm import atomic, log, scores
from examples.graddotprod_lm.config import Config, check_dtype
from examples.graddotprod_lm.data import Rows, Split, check_files, domains_of
from examples.graddotprod_lm.evaluate import estimate_loss
from examples.graddotprod_lm.log import logger
from examples.graddotprod_lm.models import ARCHITECTURES, build_model
from examples.graddotprod_lm.step import Step, make_step
from examples.graddotprod_lm.world import World, connected
from examples.strict_cli import parse

EVAL_SAMPLES = 64
"""Samples that a reading of the validation or test loss looks at, of every domain."""
MAX_NORM = 1.0


def main(config: Config) -> None:
    config.check()
    with connected() as world:
        run(config, world)


def run(config: Config, world: World) -> None:
    """Train to the end, from the start or from the last checkpoint."""
    check_dtype(config.dtype, world.device)
    world.divide(config.batch_size, "batch_size")
    world.divide(config.val_batch_size, "val_batch_size")
    domains = domains_of(config.pile_dir, config.num_domains)
    check_files(config.pile_dir, domains)
    claim(config, world)
    log.set_up(config.run_dir, world.rank)
    try:
        with logging_redirect_tqdm([logger]):
            Training(config, world, domains).run()
    except BaseException as error:
        logger.error("stopped by %r", error, extra={"traceback": traceback.format_exc()})
        raise
    finally:
        log.close()


def claim(config: Config, world: World) -> None:
    """Make the run's folder; refuse one that belongs to another configuration.

    Raises:
        ValueError: it does; says which options differ.
    """
    path = config.run_dir / "config.json"
    if path.exists():
        theirs = json.loads(path.read_text("utf-8"))
        ours = config.as_json()
        differ = [f"--{k} {theirs[k]}, now {ours[k]}" for k in ours if theirs[k] != ours[k]]
        if differ:
            raise ValueError(
                f"{config.run_dir} was begun with {'; '.join(differ)}. Use the same options to go "
                "on, or another --results_dir."
            )
    world.barrier()
    if world.rank == 0:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        atomic.remove_partial(config.run_dir)
        atomic.write_json(path, config.as_json())
    world.barrier()


class Training:
    """A run under way.

    Attributes:
        done: steps that are done.
    """

    def __init__(self, config: Config, world: World, domains: list[str]) -> None:
        self.config, self.world, self.domains = config, world, domains
        a = ARCHITECTURES[config.architecture]
        self.train, self.val, self.test = (
            Split(config.pile_dir, name, domains, length=a.positions, vocab_size=a.vocab_size)
            for name in ("train", "val", "test")
        )
        self.model: GPT2LMHeadModel = build_model(config.architecture, config.seed)
        self.model.to(world.device)  # type: ignore[arg-type]
        # With Adam's usual epsilon, a parameter whose true gradient is zero (a bias of keys) walks
        # along the signs of rounding errors, which no two ways of computing share.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            eps=1e-6,
            weight_decay=0.1,
        )
        self.compute = make_step(
            self.model, config.method, config.dtype, world, compiled=config.compile
        )
        self.checkpoint = config.run_dir / "checkpoint.pt"
        self.done = 0
        if self.checkpoint.exists():
            self._resume()
        world.barrier()
        if world.rank == 0:
            self.scores = scores.ScoreLog(config.run_dir)
            self.scores.forget_after(self.done)
            self.metrics = log.Metrics(config.run_dir, after=self.done)

    def run(self) -> None:
        c = self.config
        n_params = sum(p.numel() for p in self.model.parameters())
        logger.info(
            "%s with %d parameters on %s, %d processes, from step %d to %d",
            *(c.architecture, n_params, self.world.device, self.world.size, self.done, c.max_steps),
            extra={"domains": self.domains, "config": c.as_json()},
        )
        steps = tqdm(
            range(self.done + 1, c.max_steps + 1),
            initial=self.done,
            total=c.max_steps,
            unit="step",
            disable=self.world.rank > 0,
        )
        for step in steps:
            loss = self._step(step)
            steps.set_postfix(loss=f"{loss:.3f}")
            if step % c.eval_interval == 0 or step == c.max_steps:
                self._evaluate(step)
            self.done = step
            if step % c.dot_prod_save_interval == 0 or step == c.max_steps:
                self._save()
        self._conclude()

    # --- a step ---------------------------------------------------------------------------------

    def _step(self, step: int) -> float:
        start = perf_counter()
        c, world = self.config, self.world
        rows = self.train.draw(c.batch_size, seed=c.seed, step=step)
        val_rows = self.val.draw(c.val_batch_size, seed=c.seed, step=step)
        result = self.compute(self._batch(self.train, rows), self._batch(self.val, val_rows))
        for name, p in self.model.named_parameters():
            p.grad = result.grads[name]
        norm = clip_grad_norm_(self.model.parameters(), MAX_NORM)
        lr = learning_rate(c.learning_rate, step, c.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        losses = world.gather(result.losses)
        self._note(step, rows, losses, result, lr)
        loss = float(losses.mean())
        if world.rank == 0:
            seconds = perf_counter() - start
            self.metrics.add(step, loss=loss, grad_norm=float(norm), lr=lr, seconds=seconds)
        return loss

    def _batch(self, split: Split, rows: Rows) -> dict[str, Tensor]:
        mine = rows.part(self.world.rank, self.world.size)
        return {"input_ids": split.read(mine, self.world.device)}

    def _note(self, step: int, rows: Rows, losses: Tensor, result: Step, lr: float) -> None:
        if result.dot_prods is None:
            return
        dots = self.world.gather(result.dot_prods)
        if self.world.rank == 0:
            n = len(rows)
            self.scores.append(
                scores.Table(
                    step=np.full(n, step),
                    domain=rows.domain,
                    sample=rows.sample,
                    loss=losses.float().cpu().numpy(),
                    dot_prod=dots.cpu().numpy(),
                    learning_rate=np.full(n, lr),
                )
            )

    # --- readings -------------------------------------------------------------------------------

    def _loss(self, split: Split, domain: int) -> float:
        rows = split.of_domain(domain, EVAL_SAMPLES)
        size = self.config.val_batch_size
        batches = []
        for i in range(self.world.rank, -(-len(rows) // size), self.world.size):
            piece = Rows(rows.domain[i * size :][:size], rows.sample[i * size :][:size])
            tokens = split.read(piece, self.world.device)
            batches.append(({"input_ids": tokens}, tokens))
        return estimate_loss(self.model, batches, self.world, dtype=self.config.dtype)

    def _evaluate(self, step: int) -> None:
        by_domain = {d: self._loss(self.val, i) for i, d in enumerate(self.domains)}
        mean = float(np.mean(list(by_domain.values())))
        logger.info("step %d: validation loss %.4f", step, mean, extra={"val_loss": by_domain})
        if self.world.rank == 0:
            self.metrics.add(
                step, val_loss=mean, **{f"val_loss/{d}": x for d, x in by_domain.items()}
            )

    # --- coming back ----------------------------------------------------------------------------

    def _save(self) -> None:
        """Scores first: a checkpoint never speaks of scores that are not there."""
        if self.world.rank == 0:
            self.scores.flush()
            state = {
                "step": self.done,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            atomic.write(self.checkpoint, lambda file: torch.save(state, file))
        self.world.barrier()

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.world.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["step"]
        logger.info("resumed after step %d", self.done)

    # --- the end --------------------------------------------------------------------------------

    def _conclude(self) -> None:
        results: dict[str, Any] = {
            "config": self.config.as_json(),
            "domains": self.domains,
            "steps": self.done,
            "val_loss": {d: self._loss(self.val, i) for i, d in enumerate(self.domains)},
            "test_loss": {d: self._loss(self.test, i) for i, d in enumerate(self.domains)},
        }
        if self.world.rank > 0:
            return
        if self.config.method == "GradDotProd":
            table = scores.load(self.config.run_dir)
            results["mean_dot_prod"] = {
                d: float(table.dot_prod[table.domain == i].mean())
                if (table.domain == i).any()
                else None
                for i, d in enumerate(self.domains)
            }
        atomic.write_json(self.config.run_dir / "results.json", results)
        logger.info("results in %s", self.config.run_dir / "results.json")


def learning_rate(highest: float, step: int, max_steps: int) -> float:
    """Up on a line over the first tenth (at most 200 steps), then down a cosine to a tenth."""
    warm_up = max(1, min(200, max_steps // 10))
    if step <= warm_up:
        return highest * step / warm_up
    share = (step - warm_up) / max(1, max_steps - warm_up)
    return highest * (0.1 + 0.9 * (1 + cos(pi * share)) / 2)


if __name__ == "__main__":
    main(parse(Config, __doc__))
