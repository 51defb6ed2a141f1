from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dfc_lightning.models.supervised import Supervised


class Autoencoder(Supervised):
    """Reconstruction by mean squared error.

    Takes batches whose first entry is an input of shape (B, ...), and ignores the labels; the network returns
    reconstructions of shape (B, n), with n the entries of an input. Logs the loss, a mean over samples and
    entries, in squared units of the input: ``train/loss``, ``val/loss``, ``test/loss``.

    Args:
        network: Maps an input of shape (B, ...) with n entries a sample to an output of shape (B, n).
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes a learning-rate scheduler from the optimizer, stepped once an epoch; one that waits
            for a plateau watches ``val/loss``, unless it names its own ``monitor``.
    """

    def loss(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean squared difference of the reconstruction, shape (B, n), and the flattened input."""
        return F.mse_loss(output, batch[0].flatten(1))
