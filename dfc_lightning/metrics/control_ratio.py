from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dfc_lightning.metrics.base import SummedMetric, by_layer, norms_squared


def control_ratio(apical: Sequence[Tensor], basal: Sequence[Tensor]) -> dict[str, Tensor]:
    r"""How strong the feedback is beside the feedforward drive, of each layer and of all together.

    .. math:: \sqrt{\frac{\sum_b \lVert Q_i u \rVert^2}{\sum_b \lVert W_i r_{i-1} \rVert^2}}

    Small where DFC works with weak targets; order one under Strong-DFC (Meulemans et al. 2022).

    Args:
        apical: Q_i u, one (B, n_i) a layer.
        basal: W_i r_{i−1}, likewise.

    Returns:
        float64: ``layer_1`` … ``layer_L`` and ``total``.

    Example:
        >>> import torch
        >>> ratio = control_ratio([torch.tensor([[3.0, 4.0]])], [torch.tensor([[0.0, 10.0]])])
        >>> ratio["total"]
        tensor(0.5000, dtype=torch.float64)
    """
    return _ratios(norms_squared(apical), norms_squared(basal))


class ControlRatio(SummedMetric):
    """‖Qu‖ / ‖Wr‖ over all samples so far; see :func:`control_ratio`.

    Args:
        layers: the number of layers, L.
        **kwargs: of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> metric = ControlRatio(layers=1)
        >>> metric.update([torch.tensor([[3.0, 4.0]])], [torch.tensor([[0.0, 10.0]])])
        >>> metric.compute()["layer_1"]
        tensor(0.5000, dtype=torch.float64)
    """

    plot_lower_bound = 0.0

    apical: Tensor
    basal: Tensor

    def __init__(self, layers: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("apical", layers)
        self.add_sum("basal", layers)

    def update(self, apical: Sequence[Tensor], basal: Sequence[Tensor]) -> None:
        """Count a batch in: Q_i u and W_i r_{i−1}, one (B, n_i) a layer."""
        self.apical = self.apical + norms_squared(apical)
        self.basal = self.basal + norms_squared(basal)

    def compute(self) -> dict[str, Tensor]:
        """The ratio, of each layer and in total."""
        return _ratios(self.apical, self.basal)


def _ratios(apical: Tensor, basal: Tensor) -> dict[str, Tensor]:
    return by_layer((apical / basal).sqrt(), (apical.sum() / basal.sum()).sqrt())
