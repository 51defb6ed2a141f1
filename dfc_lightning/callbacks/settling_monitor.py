"""A callback that logs how the samples of a batch have settled."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import override

from dfc_lightning.callbacks.controlled_trainer import controlled
from dfc_lightning.errors import require
from dfc_lightning.training.logs import log


class SettlingMonitor(Callback):
    """Logs the distribution over samples of what settling came to, where the strategy itself logs its mean.

    Every so many optimizer steps, over all samples of the step: those of accumulated batches, and of all processes.
    Logged, to all loggers of the trainer:

    - ``settling/residual_median``, ``settling/residual_90`` and ``settling/residual_max``: median, ninth decile and
      largest of the residuals ‖δ_L − δr_L − α̃ u‖ / ‖δ_L‖; infinite where a sample has no finite one;
    - ``settling/unconverged`` and ``settling/diverged``: shares of samples that miss the method's tolerance, and of
      those that therefore do not teach at all;
    - ``settling/control_norm``: mean of ‖u‖ over samples that have not diverged, in units of the target stepsize λ.

    Args:
        every_n_steps: number of optimizer steps from one look to the next.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        require(every_n_steps >= 1, "every_n_steps", every_n_steps, "look every step, 1, or less often")
        self.every_n_steps = every_n_steps
        self._seen: list[Tensor] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            controlled(trainer, self)
        self._seen = []

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        lesson = controlled(trainer, self).lesson
        if (trainer.global_step + 1) % self.every_n_steps or lesson is None or lesson.settled is None:
            return
        settled = lesson.settled
        norm = torch.linalg.vector_norm(settled.control, dim=1) / lesson.rule.control.target.stepsize
        sound = settled.counted(drop_unconverged=False)
        rows = (settled.residual.nan_to_num(torch.inf), settled.converged, sound, torch.where(sound, norm, 0.0))
        self._seen.append(torch.stack([row.to(norm) for row in rows]))

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if not self._seen:
            return
        here = torch.cat(self._seen, dim=1).T.contiguous()
        self._seen = []
        everywhere = gather_all_tensors(here) if trainer.world_size > 1 else [here]  # batches may differ in size
        residual, converged, sound, norm = torch.cat(everywhere).double().T
        ordered = residual.sort().values
        metrics = {
            "residual_median": ordered[(len(ordered) - 1) // 2],
            "residual_90": ordered[9 * (len(ordered) - 1) // 10],
            "residual_max": ordered[-1],
            "unconverged": 1 - converged.mean(),
            "diverged": 1 - sound.mean(),
            "control_norm": norm.sum() / sound.sum().clamp_min(1),
        }
        log(trainer, {f"settling/{name}": value for name, value in metrics.items()}, trainer.global_step + 1)
