from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfc_lightning.metrics.base import SummedMetric, by_layer, norms_squared


def control_effort(apical: Sequence[Tensor]) -> dict[str, Tensor]:
    r"""How much help the network needs, which Strong-DFC minimises (Meulemans et al. 2022).

    .. math:: \mathcal{H} = \frac{1}{B} \sum_b \lVert Q u_b \rVert^2

    Args:
        apical: Q_i u, one (B, n_i) a layer.

    Returns:
        float64: ``layer_1`` … ``layer_L`` and their sum, ``total``.

    Example:
        >>> import torch
        >>> control_effort([torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0]])])["total"]
        tensor(26., dtype=torch.float64)
    """
    return _mean(norms_squared(apical), torch.tensor(len(apical[0])))


class ControlEffort(SummedMetric):
    """‖Qu‖² in the mean over all samples so far; see :func:`control_effort`.

    Args:
        layers: the number of layers, L.
        **kwargs: of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> metric = ControlEffort(layers=1)
        >>> metric.update([torch.tensor([[3.0, 4.0]])])
        >>> metric.compute()["layer_1"]
        tensor(25., dtype=torch.float64)
    """

    plot_lower_bound = 0.0

    apical: Tensor
    samples: Tensor

    def __init__(self, layers: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("apical", layers)
        self.add_sum("samples")

    def update(self, apical: Sequence[Tensor]) -> None:
        """Count a batch in: Q_i u, one (B, n_i) a layer."""
        self.apical = self.apical + norms_squared(apical)
        self.samples = self.samples + len(apical[0])

    def compute(self) -> dict[str, Tensor]:
        """Of each layer and in total."""
        return _mean(self.apical, self.samples)


def _mean(squares: Tensor, samples: Tensor) -> dict[str, Tensor]:
    return by_layer(squares / samples, squares.sum() / samples)
