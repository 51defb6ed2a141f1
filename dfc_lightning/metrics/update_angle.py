from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfc_lightning.metrics.base import SummedMetric, by_layer

Layer = Tensor | Sequence[Tensor]
"""What belongs to one layer: a tensor, or several, such as the weight's and the bias's."""


def update_angle(update: Sequence[Layer], reference: Sequence[Layer]) -> dict[str, Tensor]:
    r"""Angle between two updates, of each layer and of all together.

    .. math:: \angle(a, b) = \arccos \frac{\sum a b}{\lVert a \rVert \, \lVert b \rVert}

    as in Figure 3 of Meulemans et al. 2021. The scale of either does not count.

    Args:
        update: one entry a layer, a tensor of any shape or several (weight and bias).
        reference: the same shapes.

    Returns:
        Degrees, float64: ``layer_1`` … ``layer_L`` and ``total``; NaN where one of the two is zero.

    Example:
        >>> import torch
        >>> weight, bias = torch.tensor([[1.0, 0.0]]), torch.tensor([1.0])
        >>> angles = update_angle([(weight, bias), weight], [(weight, -bias), 2 * weight])
        >>> {layer: round(float(angle), 1) for layer, angle in angles.items()}
        {'layer_1': 90.0, 'layer_2': 0.0, 'total': 61.9}
    """
    return _angles(*_products(update, reference))


class UpdateAngle(SummedMetric):
    """Angle between two updates; see :func:`update_angle`.

    Several updates count as one long one: inner products and squared norms are summed, over ranks as well.

    Args:
        layers: the number of layers, L.
        **kwargs: of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> metric = UpdateAngle(layers=1)
        >>> metric.update([torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 1.0])])
        >>> metric.update([torch.tensor([1.0, 0.0])], [torch.tensor([1.0, 0.0])])
        >>> round(float(metric.compute()["total"]), 1)
        60.0
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 180.0

    inner: Tensor
    squared: Tensor
    squared_reference: Tensor

    def __init__(self, layers: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("inner", "squared", "squared_reference"):
            self.add_sum(name, layers)

    def update(self, update: Sequence[Layer], reference: Sequence[Layer]) -> None:
        """Count a pair of updates in."""
        inner, squared, squared_reference = _products(update, reference)
        self.inner = self.inner + inner
        self.squared = self.squared + squared
        self.squared_reference = self.squared_reference + squared_reference

    def compute(self) -> dict[str, Tensor]:
        """Degrees, of each layer and in total."""
        return _angles(self.inner, self.squared, self.squared_reference)


def _products(a: Sequence[Layer], b: Sequence[Layer]) -> tuple[Tensor, Tensor, Tensor]:
    """⟨a, b⟩, ‖a‖², ‖b‖² of each layer, (L,), in float64."""
    if len(a) != len(b):
        raise ValueError(f"The update has {len(a)} layers, but the reference {len(b)}; give one entry a layer in both.")
    pairs = [(_flat(x), _flat(y)) for x, y in zip(a, b)]
    inner, squared, squared_reference = zip(*((x @ y, x @ x, y @ y) for x, y in pairs))
    return torch.stack(inner), torch.stack(squared), torch.stack(squared_reference)


def _flat(layer: Layer) -> Tensor:
    tensors = [layer] if isinstance(layer, Tensor) else layer
    return torch.cat([t.flatten() for t in tensors]).double()


def _angles(inner: Tensor, squared: Tensor, squared_reference: Tensor) -> dict[str, Tensor]:
    def angle(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
        # Of a tensor with itself all three are equal: the root of their product, unlike one of roots, is exact.
        return torch.rad2deg(torch.acos((xy / (xx * yy).sqrt()).clamp(-1.0, 1.0)))

    total = angle(inner.sum(), squared.sum(), squared_reference.sum())
    return by_layer(angle(inner, squared, squared_reference), total)
