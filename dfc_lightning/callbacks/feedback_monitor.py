"""A callback that logs what becomes of the feedback weights of each layer."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from dfc_lightning.callbacks.lessons import controlled
from dfc_lightning.control.checks import require


class FeedbackMonitor(Callback):
    """Logs size and turning of the feedback weights Q_i of each layer.

    Every so many optimizer steps; the weights are alike on all processes. Logged, to all loggers of the trainer, with L
    the number of layers:

    - ``feedback_weights/norm/layer_1`` … ``layer_L``: ‖Q_i‖;
    - ``feedback_weights/turned/layer_1`` … ``layer_L``: the angle in degrees between Q_i and what it was at the last
      look; left out at the first.

    How they relate to the forward weights is for :class:`AlignmentMonitor` to say.

    Args:
        every_n_steps: number of optimizer steps from one look to the next.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        require(every_n_steps >= 1, "every_n_steps", every_n_steps, "look every step, 1, or less often")
        self.every_n_steps = every_n_steps
        self._before: list[Tensor] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            controlled(trainer, self)
        self._before = []

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        network = controlled(trainer, self).network
        if (trainer.global_step + 1) % self.every_n_steps or network is None:
            return
        weights = [q.detach().clone() for q in network.feedback]
        metrics = {f"norm/layer_{i}": torch.linalg.vector_norm(q) for i, q in enumerate(weights, start=1)}
        for i, (now, before) in enumerate(zip(weights, self._before), start=1):
            metrics[f"turned/layer_{i}"] = _angle(now, before)
        self._before = weights
        for logger in trainer.loggers:
            logger.log_metrics({f"feedback_weights/{k}": float(v) for k, v in metrics.items()}, trainer.global_step + 1)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """In degrees; accurate near zero as well."""
    a, b = (t.double() / torch.linalg.vector_norm(t.double()).clamp_min(1e-300) for t in (a, b))
    halves = torch.linalg.vector_norm(a - b), torch.linalg.vector_norm(a + b)
    return torch.rad2deg(2 * torch.atan2(*halves))
