from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmUpCosine(LambdaLR):
    """The learning rate rises in equal steps over the first epochs, then falls as half a cosine.

    In epoch t, from 0, it is the optimizer's times (t + 1)/(w + 1) while t < w, then times
    (1 + cos(π (t − w)/(T − w)))/2.

    Args:
        optimizer: Its learning rates are the largest.
        epochs: T, as many as are trained.
        warm_up: w, the first epochs; fewer than ``epochs``.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
        >>> WarmUpCosine(optimizer, epochs=5, warm_up=1).get_last_lr()
        [1.0]
    """

    def __init__(self, optimizer: Optimizer, epochs: int, warm_up: int = 1) -> None:
        if not 0 <= warm_up < epochs:
            raise ValueError(f"warm_up={warm_up} must lie between 0 and epochs - 1, {epochs - 1}.")
        self.epochs, self.warm_up = epochs, warm_up
        super().__init__(optimizer, self.factor)

    def factor(self, epoch: int) -> float:
        """The learning rate of an epoch, from 0, in units of the largest; beyond the last epoch, 0."""
        if epoch < self.warm_up:
            return (epoch + 1) / (self.warm_up + 1)
        return (1 + math.cos(math.pi * min(1.0, (epoch - self.warm_up) / (self.epochs - self.warm_up)))) / 2
