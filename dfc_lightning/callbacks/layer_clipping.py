"""A callback that bounds the gradient of each layer by itself."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.pytorch import Callback
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from typing_extensions import override

from dfc_lightning.errors import require


class LayerClipping(Callback):
    """Bounds the joint norm of each module's own parameters, a layer's weight and bias, before every optimizer step.

    Lightning's ``gradient_clip_val`` bounds that of all parameters together. What is clipped is the mean over batches
    that are accumulated, and over processes.

    Args:
        max_norm: the bound.
    """

    def __init__(self, max_norm: float) -> None:
        require(0 < max_norm < math.inf, "max_norm", max_norm, "give a finite norm above zero")
        self.max_norm = max_norm

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        for module in pl_module.modules():
            own = list(module.parameters(recurse=False))
            if own:
                clip_grad_norm_(own, self.max_norm)
