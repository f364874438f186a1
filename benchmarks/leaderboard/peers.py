"""Peers' own implementations of the same scores, used the way their documentation says."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tasks import Task
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ghostfunc.unrolled import Trained


def module_of(task: Task, trained: Trained) -> nn.Module:
    """The module, with the trained parameters."""
    task.module.load_state_dict(trained.params, strict=False)
    return task.module.eval()


def kronfluence_ekfac(task: Task, trained: Trained) -> Tensor:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task as KronfluenceTask

    logging.disable(logging.WARNING)

    class Ours(KronfluenceTask):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            x, y = batch
            z = model(x).flatten(0, -2)
            if sample:
                with torch.no_grad():
                    y = torch.multinomial(z.softmax(-1), 1)
            return F.cross_entropy(z, y.flatten(), reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    ours = Ours()
    model = prepare_model(module_of(task, trained), ours)
    sides = [TensorDataset(b["x"], b["y"]) for b in (task.train, task.queries)]
    with tempfile.TemporaryDirectory() as directory:
        analyzer = Analyzer(
            "leaderboard", model, ours, cpu=True, output_dir=directory, disable_tqdm=True
        )
        analyzer.fit_all_factors(
            "ekfac", sides[0], per_device_batch_size=64,
            factor_args=FactorArguments(strategy="ekfac"),
        )  # fmt: skip
        analyzer.compute_pairwise_scores(
            "scores", "ekfac", query_dataset=sides[1], train_dataset=sides[0],
            per_device_query_batch_size=32, per_device_train_batch_size=128,
            score_args=ScoreArguments(damping_factor=None),
        )  # fmt: skip
        return analyzer.load_pairwise_scores("scores")["all_modules"].mT.float()


def trak(task: Task, trained: Trained) -> Tensor:
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    if task.texts is not None:
        raise NotImplementedError("traker has no model output function for language models")
    module = module_of(task, trained)
    # Fewer dimensions than samples: traker inverts their second moment without damping.
    size = sum(p.numel() for p in module.parameters())
    m = len(task.queries["y"])
    with tempfile.TemporaryDirectory() as directory:
        traker = TRAKer(
            model=module, task="image_classification", train_set_size=task.n, save_dir=directory,
            device="cpu", proj_dim=128, use_half_precision=False, logging_level=logging.ERROR,
            projector=BasicProjector(size, 128, 0, ProjectionType.normal, "cpu", block_size=100),
        )  # fmt: skip
        state = module.state_dict()
        traker.load_checkpoint(state, model_id=0)
        loader = DataLoader(TensorDataset(task.train["x"], task.train["y"]), batch_size=64)
        for batch in loader:
            traker.featurize(batch=batch, num_samples=len(batch[0]))
        traker.finalize_features()
        traker.start_scoring_checkpoint("q", state, model_id=0, num_targets=m)
        traker.score(batch=(task.queries["x"], task.queries["y"]), num_samples=m)
        return torch.from_numpy(traker.finalize_scores("q").copy()).float()


def dattri_ekfac(task: Task, trained: Trained) -> Tensor:
    from dattri.algorithm.influence_function import IFAttributorEKFAC
    from dattri.task import AttributionTask

    module = module_of(task, trained)

    def loss(params: Any, batch: Any) -> Tensor:
        x, y = batch
        z = torch.func.functional_call(module, params, (x[None] if x.ndim < 2 else x,))
        return F.cross_entropy(z.flatten(0, -2), y.flatten())

    of_task = AttributionTask(loss_func=loss, model=module, checkpoints=module.state_dict())
    loaders = [
        DataLoader(TensorDataset(b["x"], b["y"]), batch_size=64) for b in (task.train, task.queries)
    ]
    attributor = IFAttributorEKFAC(task=of_task, device="cpu", damping=1e-3)
    attributor.cache(loaders[0])
    out: Tensor = attributor.attribute(*loaders)
    return out.detach().float()


def bergson(task: Task, trained: Trained) -> Tensor:
    """Projected gradients of linear layers, preconditioned by the inverse of their damped second
    moment. Its pipelines read Hugging Face data sets; its hooks take any module."""
    from bergson import GradientProcessor
    from bergson.collector.gradient_collectors import TraceCollector
    from bergson.hessians.preconditioner import DensePreconditioner

    module = module_of(task, trained)
    processor = GradientProcessor(projection_dim=16, include_bias=True, projection_seed=0)

    def rows(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        collector = TraceCollector(
            model=module, processor=processor, device="cpu", dtype=torch.float32
        )
        with collector:
            for batch in batches:
                x, y = batch["x"], batch["y"]
                x = x[:, None] if x.ndim == 2 and x.is_floating_point() else x  # [n, s, d]
                z = module(x)
                losses = F.cross_entropy(z.flatten(0, -2), y.flatten(), reduction="none")
                losses.view(len(y), -1).mean(1).sum().backward()
        return {name: torch.cat(x).flatten(1) for name, x in collector.mod_grads.items()}

    train, queries = rows(task.batches()), rows([task.queries])
    processor.hessians = {name: g.mT @ g / task.n for name, g in train.items()}
    inverse = DensePreconditioner.from_processor(processor)
    return sum((train[k] @ q.mT for k, q in inverse.apply(queries).items()), torch.zeros(()))


PEERS: dict[str, Callable[[Task, Trained], Tensor]] = {
    "kronfluence EK-FAC": kronfluence_ekfac,
    "traker": trak,
    "dattri EK-FAC": dattri_ekfac,
    "bergson": bergson,
}
MODULES = {
    "kronfluence EK-FAC": ["kronfluence.analyzer", "kronfluence.task"],
    "traker": ["trak"],
    "dattri EK-FAC": ["dattri.algorithm.influence_function", "dattri.task"],
    "bergson": [
        "bergson",
        "bergson.collector.gradient_collectors",
        "bergson.hessians.preconditioner",
    ],
}
"""What each of them imports."""
