"""A callback that logs what becomes of the feedback weights of each layer."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from dfc_lightning.callbacks.controlled_trainer import controlled
from dfc_lightning.errors import require
from dfc_lightning.metrics import update_angle
from dfc_lightning.training.logs import log


class FeedbackMonitor(Callback):
    """Logs size and turning of the feedback weights of each layer: Q_i, or B_i of a rule that goes layer by layer.

    Every so many optimizer steps; the weights are alike on all processes. Logged, to all loggers of the trainer, for
    each layer that has feedback weights:

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
        self._before: dict[str, Tensor] = {}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            controlled(trainer, self)
        self._before = {}

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        network = controlled(trainer, self).network
        if (trainer.global_step + 1) % self.every_n_steps or network is None or not network.feedback:
            return
        weights = {f"layer_{i}": q.detach().clone() for i, q in enumerate(network.feedback, start=1) if q.numel()}
        metrics = {f"norm/{layer}": torch.linalg.vector_norm(q) for layer, q in weights.items()}
        for layer, before in self._before.items():
            metrics[f"turned/{layer}"] = update_angle([weights[layer]], [before])["total"]
        self._before = weights
        log(trainer, {f"feedback_weights/{name}": value for name, value in metrics.items()}, trainer.global_step + 1)
