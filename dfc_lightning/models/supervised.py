from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn


class Supervised(L.LightningModule):
    """A network, a loss and an optimizer. A subclass says what :meth:`loss` is.

    Logs ``train/loss``, the mean of the epoch's batch losses, and ``val/loss`` and ``test/loss``, the means
    over the samples.

    Args:
        network: Maps an input of shape (B, ...) to an output of shape (B, n).
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes a learning-rate scheduler from the optimizer, stepped once an epoch; one that waits
            for a plateau watches ``val/loss``, unless it names its own ``monitor``.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.optimizer = optimizer
        self.scheduler = scheduler

    def loss(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The scalar loss of the network's output, shape (B, n), for a batch."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The network's output, shape (B, n), for an input of shape (B, ...)."""
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The batch's loss."""
        return self._step("train", batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val/loss``."""
        self._step("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test/loss``."""
        self._step("test", batch)

    def configure_optimizers(self) -> Any:
        """The optimizer over all parameters, with its scheduler if there is one."""
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        monitor = getattr(scheduler, "monitor", "val/loss")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}

    def _step(self, stage: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        output = self(batch[0])
        loss = self.loss(output, batch)
        # Each training batch counts once, whatever its size; each held-out sample counts once.
        weight = 1 if stage == "train" else len(output)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, batch_size=weight, sync_dist=True)
        self._log_metrics(stage, output, batch)
        return loss

    def _log_metrics(self, stage: str, output: Tensor, batch: tuple[Tensor, Tensor]) -> None:
        """Log more than the loss; nothing here."""
