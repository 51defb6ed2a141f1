"""What the metrics share: exact sums over samples and ranks, and ``plot``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class SummedMetric(Metric):
    """A metric whose states are float64 sums, so that updates and ranks add up exactly."""

    is_differentiable = False
    full_state_update = False

    def add_sum(self, name: str, *shape: int) -> None:
        """A state that starts at zero and is summed over ranks."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot a value, or a sequence of values over time.

        Args:
            val: what ``forward`` or ``compute`` returned, or a list of these; None to call ``compute``.
            ax: matplotlib axes to draw in; None for a figure of their own.

        Returns:
            The figure and the axes.
        """
        return self._plot(val, ax)


class SampleMean(SummedMetric):
    """A mean over samples."""

    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("total")
        self.add_sum("count")

    def add(self, values: Tensor) -> None:
        """Count these values in, one a sample, (B,)."""
        self.total = self.total + values.sum()
        self.count = self.count + values.numel()

    def compute(self) -> Tensor:
        """The mean of all values so far."""
        return self.total / self.count


def by_layer(layers: Tensor, total: Tensor) -> dict[str, Tensor]:
    """``layer_1`` … ``layer_L`` and ``total``."""
    return {**{f"layer_{i}": value for i, value in enumerate(layers, start=1)}, "total": total}


def norms_squared(tensors: Sequence[Tensor]) -> Tensor:
    """Σ t² of each tensor, (L,), in float64."""
    return torch.stack([t.double().square().sum() for t in tensors])
