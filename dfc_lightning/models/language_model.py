from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dfc_lightning.models.supervised import Supervised


class LanguageModel(Supervised):
    """Prediction of the next token by cross-entropy.

    Takes batches of tokens of shape (B, T) and the same a token later; the network returns logits of shape
    (B, T, kinds). Logs the loss, a mean over samples and places, in nats: ``train/loss``, ``val/loss``, ``test/loss``.

    Args:
        network: Maps tokens of shape (B, T) to logits of shape (B, T, kinds).
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes a learning-rate scheduler from the optimizer, stepped once an epoch; one that waits
            for a plateau watches ``val/loss``, unless it names its own ``monitor``.
    """

    def loss(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy of the logits, shape (B, T, kinds), in nats a token."""
        return F.cross_entropy(output.flatten(0, 1), batch[1].flatten())
