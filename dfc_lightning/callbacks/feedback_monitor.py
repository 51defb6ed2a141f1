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
from dfc_lightning.metrics import update_angle
from dfc_lightning.training.logs import log


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
        if self._before:
            angles = update_angle(weights, self._before)
            metrics |= {f"turned/layer_{i}": angles[f"layer_{i}"] for i in range(1, len(weights) + 1)}
        self._before = weights
        log(trainer, {f"feedback_weights/{name}": value for name, value in metrics.items()}, trainer.global_step + 1)
