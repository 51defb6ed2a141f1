from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dfc_lightning.models.supervised import Supervised


class Regressor(Supervised):
    """Regression by mean squared error.

    Takes batches of an input of shape (B, ...) and a target of shape (B, n); the network returns outputs of
    shape (B, n). Logs the loss, a mean over samples and outputs, in squared units of the target:
    ``train/loss``, ``val/loss``, ``test/loss``.

    Args:
        network: Maps an input of shape (B, ...) to an output of shape (B, n).
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes a learning-rate scheduler from the optimizer, stepped once an epoch; one that waits
            for a plateau watches ``val/loss``, unless it names its own ``monitor``.
    """

    def loss(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean squared difference of the output and the target, both of shape (B, n)."""
        return F.mse_loss(output, batch[1])
