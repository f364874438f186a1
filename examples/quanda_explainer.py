"""EK-FAC influence as an explainer of quanda, whose metrics and benchmarks then judge it.

    python examples/quanda_explainer.py

Run it with `pip install quanda omegaconf` beside ghostfunc (as a file: packages that quanda needs
bring an `examples` of their own). It explains a tiny random classifier and prints shapes. https://github.com/dilyabareeva/quanda
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from quanda.explainers import Explainer
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import ghostfunc as gf


class GhostEKFAC(Explainer):
    """`(test samples, training samples)` influences, positive where a sample helps."""

    accepted_tasks = ["image_classification"]  # noqa: RUF012 (the base class has it so)

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset[Any],
        *,
        damping: float = 0.1,
        batch_size: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(model=model, train_dataset=train_dataset, **options)
        rows = [self.train_dataset[i] for i in range(len(self.train_dataset))]
        self._train = {
            "x": torch.stack([x for x, _ in rows]),
            "y": torch.tensor([int(y) for _, y in rows], device=self.device),
        }
        self._damping, self._size = damping, batch_size
        outputs, _ = gf.from_module(model.eval(), lambda m, b: m(b["x"]))
        self._model_fn, self._params = gf.from_module(
            model, lambda m, b: F.cross_entropy(m(b["x"]), b["y"], reduction="none")
        )
        self._curvature = gf.curvature.ekfac(
            self._model_fn,
            self._params,
            [self._train],
            likelihood=gf.curvature.softmax(outputs, lambda b: b["y"]),
            chunk_size=batch_size,
        )

    def explain(self, test_data: Tensor, targets: list[int] | Tensor) -> Tensor:
        """Influence of every training sample on the loss of each test sample."""
        queries = {"x": test_data, "y": torch.as_tensor(targets, device=self.device)}
        scores: Tensor = gf.influence(
            self._model_fn, self._params, self._train, queries,
            curvature=self._curvature, damping=self._damping, relative=True, chunk_size=self._size,
        )  # fmt: skip
        return scores.mT


def main() -> None:
    """Explain a random classifier of random images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    data = TensorDataset(torch.randn(24, 1, 8, 8), torch.randint(3, (24,)))
    explainer = GhostEKFAC(model, data)
    x, y = torch.randn(5, 1, 8, 8), torch.randint(3, (5,))
    print("explanations:", tuple(explainer.explain(x, y).shape))
    print("self-influences:", tuple(explainer.self_influence(batch_size=8).shape))


if __name__ == "__main__":
    main()
