"""Batch normalisation under control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfc_lightning.operations.linear import Exact
from dfc_lightning.operations.operation import Deviations, Frame


class BatchNorm(Exact):
    """Batch normalisation with the statistics of the feedforward pass held: an affine map of each channel.

    Args:
        x: what was normalised, (B, C, …).
    """

    def __init__(self, *args: Any, x: Tensor) -> None:
        super().__init__(*args)
        given = self.arguments
        self.weight, self.bias, self.eps = given.get("weight"), given.get("bias"), given.get("eps", 1e-5)
        self.by_batch = given.get("training", False)
        if self.by_batch:
            axes = [0, *range(2, x.dim())]
            self.variance, self.mean = torch.var_mean(x.detach().to(_full(x.dtype)), axes, correction=0)
        else:
            self.variance, self.mean = (given[n].detach().clone() for n in ("running_var", "running_mean"))

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

    def pulled(self, frame: Frame, errors: Sequence[Tensor | None], live: bool = False) -> Sequence[Tensor | None]:
        error = errors[0]
        assert error is not None
        if not (live and self.by_batch):
            return [error * _per_channel(self.scale, error)]

        # The batch is normalised feedforward: only there is its mean zero and its size one, and only by that derivative
        # does no error ask of the layers before to move what is taken out again.
        x, layout = (frame.fed or frame)[self.inputs[0]], frame.layouts[self.inputs[0]]
        weight = None if self.weight is None else self.weight.detach().to(x)
        moments = self.mean.to(x), (self.variance + self.eps).rsqrt().to(x)
        wanted, backward = [True, False, False], torch.ops.aten.native_batch_norm_backward
        parts = layout.split(error, frame.batch)
        return [layout.joined([backward(e, x, weight, None, None, *moments, True, self.eps, wanted)[0] for e in parts])]

    def live(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Normalise ``x``, the statistics following their batch: what backprop differentiates.

        No running statistics move.
        """
        if self.by_batch:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        return F.batch_norm(x, self.mean, self.variance, weight, bias, False, 0.0, self.eps)


def _per_channel(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.dim() - 2)).expand_as(like)


def _full(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
