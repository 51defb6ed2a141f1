from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfc_lightning.metrics.base import SummedMetric


def nullspace_ratio(update: Tensor, jacobian: Tensor, presynaptic: Tensor, rtol: float | None = None) -> Tensor:
    r"""How much of a layer's weight update does nothing, to first order, to any output of the batch.

    .. math:: \frac{\lVert P_0 \, \mathrm{vec}\, \Delta W_i \rVert}{\lVert \Delta W_i \rVert}

    with P_0 the projector on the null space of ∂r_L/∂W_i, the outputs of all samples taken together; what the code of
    Meulemans et al. 2021 calls the relative norm in the null space. Zero for Gauss-Newton updates.

    Holds B n_L rows of n_i n_{i−1} entries and decomposes them: for small layers.

    Args:
        update: ΔW_i, (n_i, n_{i−1}).
        jacobian: J_i = ∂r_L/∂v_i of each sample, (B, n_L, n_i).
        presynaptic: r_{i−1}, (B, n_{i−1}).
        rtol: singular values below this part of the largest count as zero; None for the update's precision times the
            larger dimension.

    Example:
        >>> import torch
        >>> jacobian, presynaptic = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[0.0, 1.0]])
        >>> nullspace_ratio(torch.tensor([[4.0, 3.0], [0.0, 0.0]]), jacobian, presynaptic)
        tensor(0.8000, dtype=torch.float64)
    """
    idle, whole = _squares(update, jacobian, presynaptic, rtol)
    return (idle / whole).sqrt()


class NullspaceRatio(SummedMetric):
    """Part of weight updates that changes no output; see :func:`nullspace_ratio`.

    Several updates count as one long one, each with the null space of its own batch: squared norms are summed.

    Args:
        rtol: singular values below this part of the largest count as zero; None for the update's precision times the
            larger dimension.
        **kwargs: of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> metric = NullspaceRatio()
        >>> jacobian, presynaptic = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[0.0, 1.0]])
        >>> metric.update(torch.tensor([[4.0, 3.0], [0.0, 0.0]]), jacobian, presynaptic)
        >>> metric.compute()
        tensor(0.8000, dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    idle: Tensor
    whole: Tensor

    def __init__(self, rtol: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rtol = rtol
        self.add_sum("idle")
        self.add_sum("whole")

    def update(self, update: Tensor, jacobian: Tensor, presynaptic: Tensor) -> None:
        """Count a layer's update in: ΔW_i, J_i, r_{i−1} as for :func:`nullspace_ratio`."""
        idle, whole = _squares(update, jacobian, presynaptic, self.rtol)
        self.idle, self.whole = self.idle + idle, self.whole + whole

    def compute(self) -> Tensor:
        """The ratio of the norms."""
        return (self.idle / self.whole).sqrt()


def _squares(update: Tensor, jacobian: Tensor, presynaptic: Tensor, rtol: float | None) -> tuple[Tensor, Tensor]:
    """‖P_0 ΔW‖² and ‖ΔW‖²."""
    flat, j, r = update.double().flatten(), jacobian.double(), presynaptic.double()
    # ∂r_L[k] / ∂W_i[m, n] = J_i[k, m] r_{i−1}[n], one row for each sample and output.
    rows = torch.einsum("bkm,bn->bkmn", j, r).flatten(0, 1).flatten(1)
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    if rtol is None:
        rtol = torch.finfo(update.dtype).eps * max(rows.shape)
    felt = directions[sizes > rtol * sizes[0]]
    idle = flat - felt.T @ (felt @ flat)
    return idle @ idle, flat @ flat
