from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dfc_lightning.metrics.base import SampleMean


def condition_one(presynaptic: Sequence[Tensor]) -> Tensor:
    r"""How far the layers' inputs are from equal norms: Condition 1 of Meulemans et al. 2021, Eq. (8).

    .. math:: \frac{1}{B} \sum_b \frac{\mathrm{std}_i \lVert r_{i-1} \rVert}{\mathrm{mean}_i \lVert r_{i-1} \rVert}

    with the standard deviation over the L layers (divided by L). Where it is zero, the minimum-norm update of the
    voltages is, layer by layer, a Gauss-Newton update of the weights (Theorem 2).

    Args:
        presynaptic: r_{i−1} of each layer, the first being the input; one (B, n_{i−1}) a layer.

    Example:
        >>> import torch
        >>> condition_one([torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0]])])
        tensor(0., dtype=torch.float64)
        >>> condition_one([torch.tensor([[3.0, 4.0]]), torch.tensor([[15.0]])])
        tensor(0.5000, dtype=torch.float64)
    """
    return _spread(presynaptic).mean()


class ConditionOne(SampleMean):
    """Spread of the norms of the layers' inputs, a mean over samples; see :func:`condition_one`.

    Example:
        >>> import torch
        >>> metric = ConditionOne()
        >>> metric.update([torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0]])])
        >>> metric.update([torch.tensor([[3.0, 4.0]]), torch.tensor([[15.0]])])
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound = 0.0

    def update(self, presynaptic: Sequence[Tensor]) -> None:
        """Count a batch in: r_{i−1}, one (B, n_{i−1}) a layer."""
        self.add(_spread(presynaptic))


def _spread(presynaptic: Sequence[Tensor]) -> Tensor:
    norms = torch.stack([torch.linalg.vector_norm(r.double(), dim=1) for r in presynaptic])
    return norms.std(0, correction=0) / norms.mean(0)
