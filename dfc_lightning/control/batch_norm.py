"""Batch normalisation under control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfc_lightning.control.operations import Deviations, Exact, Frame


class BatchNorm(Exact):
    """Batch normalisation with the statistics of the feedforward pass held: an affine map of each channel.

    Args:
        x: what was normalised, (B, C, …).
    """

    def __init__(self, *args: Any, x: Tensor) -> None:
        super().__init__(*args)
        named = dict(zip(_BATCH_NORM, self.args)) | self.kwargs
        self.weight, self.bias, self.eps = named.get("weight"), named.get("bias"), named.get("eps", 1e-5)
        self.by_batch = named.get("training", False)
        if self.by_batch:
            axes = [0, *range(2, x.dim())]
            self.variance, self.mean = torch.var_mean(x.detach().to(_full(x.dtype)), axes, correction=0)
        else:
            self.variance, self.mean = (named[n].detach().clone() for n in ("running_var", "running_mean"))

    @property
    def scale(self) -> Tensor:
        """γ / σ of each channel, (C,)."""
        inverse = (self.variance + self.eps).rsqrt()
        return inverse if self.weight is None else inverse * self.weight.detach()

    def values(self, frame: Frame) -> Sequence[Tensor]:
        x = frame[self.inputs[0]]
        centred = (x - _per_channel(self.mean, x)) * _per_channel(self.scale, x)
        return [centred if self.bias is None else centred + _per_channel(self.bias.detach(), x)]

    def deviations(self, frame: Frame, moved: Deviations) -> Sequence[Tensor | None]:
        change = moved[self.inputs[0]]
        assert change is not None
        return [change * _per_channel(self.scale, change)]


class Live(BatchNorm):
    """The same, the statistics following their batch: what backprop differentiates."""

    def __init__(self, norm: BatchNorm) -> None:
        self.__dict__.update(norm.__dict__)

    def values(self, frame: Frame) -> Sequence[Tensor]:
        return [self.normalised(frame[self.inputs[0]], self.weight, self.bias)]

    def normalised(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Normalise ``x``; no running statistics move."""
        if self.by_batch:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        return F.batch_norm(x, self.mean, self.variance, weight, bias, False, 0.0, self.eps)


_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def _per_channel(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.dim() - 2)).expand_as(like)


def _full(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
